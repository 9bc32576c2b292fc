"""Whatever stops a run, at whatever moment: nothing half done passes for done, and --resume ends with an undisturbed run's bytes.

The runs are processes of the command line (tests/support/victims.py) on a model with a dense layer between two with experts.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

import moebit
from moebit.errors import BadInputError, InterruptedWorkError
from tests.support.models import ARCHITECTURES, HIDDEN, random_model, save
from tests.support.outputs import byte_tokenizer, file_bytes, small_recipe, token_file
from tests.support.victims import Fate, Moment, Victims

SAMPLES, LENGTH, LAYERS = 6, 24, 3
SETTINGS = {
    "gptq native": ["--recipe", "gptq.yaml", "--text", "text.jsonl"],
    "gptq dense": ["--recipe", "gptq.yaml", "--text", "text.jsonl", "--format", "dense"],
    "gptq in little memory": ["--recipe", "gptq.yaml", "--text", "text.jsonl", "--memory", "128KiB"],
    "rtn native": ["--recipe", "rtn.yaml"],
}
GPTQ = "gptq native"


@dataclass
class Workplace:
    """A model, recipes and a text, and what undisturbed runs make of them."""

    directory: Path
    victims: Victims
    _undisturbed: dict[str, tuple[Fate, dict[str, bytes]]] = field(default_factory=dict)
    _made: int = 0

    @property
    def model(self) -> Path:
        return self.directory / "model"

    def new(self) -> Path:
        """A name for an output, in a directory of its own."""
        self._made += 1
        (self.directory / f"work{self._made}").mkdir()
        return self.directory / f"work{self._made}" / "out"

    def quantize(self, setting: str, out: Path, *more: str, **harm: Any) -> Fate:
        words = [str(self.directory / word) if word.endswith((".yaml", ".jsonl")) else word for word in SETTINGS[setting]]
        return self.victims.run(["quantize", self.model, "-o", out, *words, *more], **harm)

    def undisturbed(self, setting: str) -> tuple[Fate, dict[str, bytes]]:
        """(what happened, every file but the reports)."""
        if setting not in self._undisturbed:
            out = self.new()
            fate = self.quantize(setting, out)
            assert fate.code == 0, fate.messages
            assert moebit.verify(out)["findings"] == []
            self._undisturbed[setting] = fate, file_bytes(out)
        return self._undisturbed[setting]

    def check(self, setting: str, out: Path) -> None:
        """The output is that of the undisturbed run, and there is nothing beside it."""
        wanted, there = self.undisturbed(setting)[1], file_bytes(out)
        assert there.keys() == wanted.keys()
        assert [name for name in wanted if there[name] != wanted[name]] == []
        assert [path.name for path in out.parent.iterdir()] == ["out"]

    def resume(self, setting: str, out: Path) -> None:
        """After a stop: OUT is whole if it is there, what is there is sound, and --resume completes it."""
        if any(out.parent.iterdir()):
            assert moebit.verify(out)["state"] == ("fine" if out.exists() else "unfinished")
        fate = self.quantize(setting, out, "--resume")
        assert fate.code == 0, fate.messages
        self.check(setting, out)


@pytest.fixture(scope="module")
def place() -> Iterator[Workplace]:
    with tempfile.TemporaryDirectory(prefix="moebit-interruption-") as name:
        directory = Path(name).resolve()
        directory.chmod(0o755)  # one of the victims is another user
        model = save(random_model(ARCHITECTURES["qwen3_moe"], vocab_size=257), directory / "model")
        byte_tokenizer().save_pretrained(model)
        token_file(directory / "text.jsonl", 2 * SAMPLES * LENGTH)
        for method in ("gptq", "rtn"):
            (directory / f"{method}.yaml").write_text(yaml.safe_dump(small_recipe(method, samples=SAMPLES, seq_len=LENGTH)))
        (model / "model.safetensors").chmod(0o644)
        victims = Victims(directory)
        victims.prepare(model)
        yield Workplace(directory, victims)
        victims.close()


def last(trace: list[Moment], what: str, name: str) -> int:
    """Number of the last moment at which this happens to (the last of) these files."""
    return max(i for i, moment in enumerate(trace) if moment.what == what and moment.names[-1].endswith(name))


def shard(number: int) -> str:
    return f"model-{number + 1:05d}-of-{LAYERS + 1:05d}.safetensors"


# --- killed

# In the order of a run. Twice: the resumed run is killed as well; it does less, so that its moments have smaller numbers.
KILLS: dict[str, Callable[[list[Moment]], list[int]]] = {
    "before a shard has its name": lambda trace: [last(trace, "rename", shard(1))],
    "before the journal knows, then in the next layer": lambda trace: [last(trace, "sync", "stream-00001.safetensors.writing") + 3, 150],
    "before OUT is tidied up": lambda trace: [last(trace, "remove", "journal.jsonl")],
}
MORE_KILLS: dict[str, Callable[[list[Moment]], list[int]]] = {
    "before there is a journal": lambda trace: [last(trace, "write", "journal.jsonl.writing")],
    "before the journal has its name": lambda trace: [last(trace, "rename", "journal.jsonl")],
    "in the first layer": lambda trace: [last(trace, "write", shard(0) + ".writing") + 5],
    "before the journal is synced": lambda trace: [last(trace, "sync", "journal.jsonl")],
    "before the last stream goes": lambda trace: [last(trace, "remove", "stream-00002.safetensors")],
    "before the index": lambda trace: [last(trace, "write", "model.safetensors.index.json")],
    "before moebit.json is synced": lambda trace: [last(trace, "sync", "moebit.json")],
}


@pytest.mark.parametrize(
    "when", [*KILLS.items(), *(pytest.param(item, marks=pytest.mark.slow) for item in MORE_KILLS.items())], ids=lambda item: item[0]
)
def test_killed_at(when: tuple[str, Callable[[list[Moment]], list[int]]], place: Workplace) -> None:
    out = place.new()
    for at in when[1](place.undisturbed(GPTQ)[0].trace):
        fate = place.quantize(GPTQ, out, "--resume", at=at)
        assert fate.code == -signal.SIGKILL, fate.messages
    place.resume(GPTQ, out)


@pytest.mark.slow
def test_killed_before_and_after_out_has_its_name(place: Workplace) -> None:
    out, copied = place.new(), place.new()
    fate = place.quantize(GPTQ, out, at=last(place.undisturbed(GPTQ)[0].trace, "rename", "out"))
    assert fate.code == -signal.SIGKILL, fate.messages
    shutil.copytree(out.parent, copied.parent, dirs_exist_ok=True)
    again = place.quantize(GPTQ, copied, "--resume")  # what the second one will do
    fate = place.quantize(GPTQ, out, "--resume", at=last(again.trace, "rename", "out") + 1)
    assert fate.code == -signal.SIGKILL, fate.messages
    assert out.exists()
    place.resume(GPTQ, out)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_killed_at_random(trial: int, place: Workplace) -> None:
    """Five times in each setting, spread from shortly before the first file it makes to the end; once by the clock."""
    setting, part = list(SETTINGS)[trial % 4], trial // 4
    chance = random.Random(trial)
    undisturbed = place.undisturbed(setting)[0]
    out, share = place.new(), (part + chance.random()) / 5
    first = last(undisturbed.trace, "mkdir", "out.partial") - 10
    harm = (
        {"at": first + int(share * (len(undisturbed.trace) - first))} if part != trial % 5 else {"after": share * undisturbed.seconds * 0.8}
    )
    fate = place.quantize(setting, out, **harm)
    if fate.code == 0 and "after" in harm:  # it was faster this time
        place.check(setting, out)
        return
    assert fate.code == -signal.SIGKILL, fate.messages
    if trial % 3 == 0:
        again = place.quantize(setting, out, "--resume", at=chance.randrange(30, 120))
        assert again.code == -signal.SIGKILL, again.messages
    place.resume(setting, out)


def test_nothing_is_relied_on_before_it_is_durable(place: Workplace) -> None:
    """Content, name, journal, and only then away with what has been replaced."""
    trace = place.undisturbed(GPTQ)[0].trace
    partial = next(moment.names[0] for moment in trace if moment.what == "mkdir")
    assert partial.endswith("out.partial")
    work = partial.rpartition("/")[0]

    def after(start: int, what: str, *names: str) -> int:
        """Number of the first such moment after `start`."""
        return next(i for i, m in enumerate(trace) if i > start and m == Moment(what, names))

    at = after(-1, "mkdir", partial)
    at = after(at, "sync", work)
    journal = f"{partial}/journal.jsonl"
    for what, names in (
        ("sync", [f"{journal}.writing"]), ("rename", [f"{journal}.writing", journal]), ("sync", [partial]),
    ):  # fmt: skip
        at = after(at, what, *names)
    for layer in range(LAYERS):
        for name in (f"{partial}/{shard(layer)}", f"{partial}/stream-{layer:05d}.safetensors"):
            at = after(at, "sync", f"{name}.writing")
            at = after(at, "rename", f"{name}.writing", name)
            at = after(at, "sync", partial)
        at = after(at, "write", journal)
        at = after(at, "sync", journal)
        if layer:
            gone = f"{partial}/stream-{layer - 1:05d}.safetensors"
            at = after(at, "remove", gone)
            assert sum(moment == Moment("remove", (gone,)) for moment in trace) == 1
    opened = [i for i, moment in enumerate(trace) if moment == Moment("write", (journal,))]
    assert len(opened) == LAYERS + 2, "once per layer, for the rest, and for what finishing makes"
    named = last(trace, "rename", "out")
    for name in place.undisturbed(GPTQ)[1]:
        stem = f"{partial}/{name}" + (".writing" if name.endswith(".safetensors") else "")
        written = max(i for i, moment in enumerate(trace) if moment == Moment("write", (stem,)))
        assert written < after(written, "sync", stem) < named, name
    assert any(moment == Moment("sync", (partial,)) for moment in trace[named - 3 : named])
    assert after(named, "sync", work) < last(trace, "remove", "out/journal.jsonl") == len(trace) - 1


# --- Ctrl-C


@pytest.mark.parametrize("share", [0.4, 0.75, 1.0])
def test_ctrl_c(share: float, place: Workplace) -> None:
    out = place.new()
    count = len(place.undisturbed(GPTQ)[0].trace)
    fate = place.quantize(GPTQ, out, at=min(int(share * count), count - 1), signal=signal.SIGINT)
    assert fate.code == 130, fate.messages
    assert "Stopped." in fate.messages
    assert "--resume" in fate.messages
    assert "Traceback" not in fate.messages
    place.resume(GPTQ, out)


# --- the disk


@pytest.mark.parametrize("what", ["the journal", "the activations", "a layer", "the rest"])
def test_a_file_that_cannot_grow(what: str, place: Workplace) -> None:
    """What a full disk looks like where the limit is that of a file: a failed write in the middle of the work."""
    files = place.undisturbed(GPTQ)[1]
    layers, rest = [len(files[shard(layer)]) for layer in range(LAYERS)], len(files[shard(LAYERS)])
    assert max(layers) < rest
    out = place.new()
    limit = {"the journal": 100, "the activations": SAMPLES * LENGTH * HIDDEN * 4 - 1, "a layer": min(layers), "the rest": rest - 1}[what]
    setting = "gptq in little memory" if what == "the activations" else GPTQ
    fate = place.quantize(setting, out, file_size=limit)
    assert fate.code == 3, fate.messages
    assert "File too large" in fate.messages
    assert "--resume" in fate.messages
    durable = moebit.verify(out)["durable"]
    assert durable["layers"] == (LAYERS if what == "the rest" else 0)
    assert not durable["rest"]
    place.resume(setting, out)


def test_a_directory_that_cannot_be_written(place: Workplace) -> None:
    out = place.new()
    out.parent.chmod(0o555)
    somebody = 65534 if os.geteuid() == 0 else os.geteuid()  # root may write anywhere
    fate = place.quantize("rtn native", out, user=somebody)
    assert fate.code == 2, fate.messages
    assert f"cannot write to {out.parent}" in fate.messages
    assert "choose another -o" in fate.messages
    assert list(out.parent.iterdir()) == []


# --- the input


@pytest.fixture
def copied(place: Workplace, tmp_path: Path) -> Path:
    return shutil.copytree(place.model, tmp_path / "model")


def when_done(layers: int, harm: Callable[[], object]) -> Callable[[str, int, int], None]:
    """A progress callback that does something between two layers."""

    def progress(what: str, done: int, total: int) -> None:
        if what == "layers" and done == layers:
            harm()

    return progress


def test_an_input_that_changes_during_the_run(copied: Path, tmp_path: Path) -> None:
    weights, recipe = copied / "model.safetensors", small_recipe("rtn")

    def write() -> None:
        raw = bytearray(weights.read_bytes())
        raw[-1] ^= 1
        weights.write_bytes(raw)

    with pytest.raises(BadInputError, match=r"model\.safetensors changed while it was being read.*--overwrite"):
        moebit.quantize(copied, tmp_path / "out", recipe=recipe, progress=when_done(2, write))
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadInputError, match=r"model\.safetensors changed since.*--overwrite"):
        moebit.quantize(copied, tmp_path / "out", recipe=recipe, resume=True)
    assert moebit.verify(tmp_path / "out")["state"] == "unfinished"
    moebit.quantize(copied, tmp_path / "out", recipe=recipe, overwrite=True)
    moebit.quantize(copied, tmp_path / "straight", recipe=recipe)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "straight")


def test_an_input_that_is_gone_for_a_while(copied: Path, tmp_path: Path) -> None:
    weights, recipe = copied / "model.safetensors", small_recipe("rtn")
    with pytest.raises(InterruptedWorkError, match=r"reading .*model\.safetensors failed: No such file.*--resume"):
        moebit.quantize(copied, tmp_path / "out", recipe=recipe, progress=when_done(1, lambda: weights.rename(tmp_path / "away")))
    (tmp_path / "away").rename(weights)
    moebit.quantize(copied, tmp_path / "out", recipe=recipe, resume=True)
    moebit.quantize(copied, tmp_path / "straight", recipe=recipe)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "straight")


def test_a_lost_journal(copied: Path, tmp_path: Path) -> None:
    """Shards that nothing vouches for are not taken up, nor thrown away unasked."""

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moebit.quantize(copied, tmp_path / "out", recipe=small_recipe("rtn"), progress=when_done(2, stop))
    partial = tmp_path / "out.partial"
    (partial / "journal.jsonl").write_bytes(b"\0" * 100)
    before = file_bytes(partial)
    with pytest.raises(BadInputError, match=r"journal\.jsonl is missing or damaged; remove .*out\.partial yourself"):
        moebit.quantize(copied, tmp_path / "out", recipe=small_recipe("rtn"), resume=True)
    assert file_bytes(partial) == before
