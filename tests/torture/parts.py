"""The three ways in which moebit is tortured; each trial is one harm, and says whether it found something."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

import moebit
from moebit.calibration.text import load_tokenizer, tokenize
from moebit.profiling.adapt import former_texts
from moebit.profiling.allocate import allocate
from tests.support.models import ARCHITECTURES, random_model, save
from tests.support.outputs import byte_tokenizer, file_bytes, small_recipe, token_file
from tests.support.victims import Victims
from tests.torture.forked import BROKEN, FINE, forked
from tests.torture.mutants import damage, mutate

SAMPLES, LENGTH = 4, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "rtn dense": {"method": "rtn", "format": "dense"},
    "rtn asymmetric": {"method": "rtn", "weights": {"symmetric": False}},
    "rtn of 3 bits": {"method": "rtn", "weights": {"bits": 3}},
    "rtn compressed-tensors": {"method": "rtn", "format": "compressed-tensors"},
    "gptq": {"method": "gptq"},
    "gptq dense": {"method": "gptq", "format": "dense"},
    "gptq in little memory": {"method": "gptq", "memory": 2**17},
    "gptq of 2 bits": {"method": "gptq", "weights": {"bits": 2}},
    "gptq asymmetric": {"method": "gptq", "weights": {"symmetric": False}},
}
Found = tuple[str, str | None]


class Part(Protocol):
    """One way of torturing. each_turn: trials before the next part has its turn."""

    each_turn: int

    def trial(self, chance: random.Random) -> Found:
        """(what happened, what was found)."""


def make_model(directory: Path) -> Path:
    model = save(random_model(ARCHITECTURES["qwen3_moe"], vocab_size=257), directory / "model")
    byte_tokenizer().save_pretrained(model)
    (model / "generation_config.json").write_text('{"eos_token_id": [0]}')
    return model


class Kills:
    """A run is killed at a moment, half of the time with what was not synced undone; --resume ends with an undisturbed run's bytes."""

    each_turn = 1

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory, self.model = directory, make_model(directory)
        token_file(directory / "text.jsonl", 2 * SAMPLES * LENGTH)
        self.victims = Victims(directory)
        self.victims.prepare(self.model)
        self.undisturbed: dict[str, tuple[int, dict[str, bytes]]] = {}
        self.made = 0

    def words(self, setting: str, out: Path) -> list[str]:
        options = OPTIONS[setting]
        recipe = self.directory / f"{setting}.yaml"
        if not recipe.exists():
            made = small_recipe(options["method"], weights=options.get("weights"), samples=SAMPLES, seq_len=LENGTH)
            recipe.write_text(yaml.safe_dump(made))
        words = ["quantize", str(self.model), "-o", str(out), "--recipe", str(recipe)]
        words += ["--text", str(self.directory / "text.jsonl")] if options["method"] == "gptq" else []
        words += ["--format", options["format"]] if "format" in options else []
        return [*words, *(["--memory", str(options["memory"])] if "memory" in options else [])]

    def straight(self, setting: str) -> tuple[int, dict[str, bytes]]:
        if setting not in self.undisturbed:
            out = self.directory / f"straight {setting}" / "out"
            out.parent.mkdir()
            fate = self.victims.run(self.words(setting, out))
            assert fate.code == 0, fate.messages
            self.undisturbed[setting] = len(fate.trace), file_bytes(out)
        return self.undisturbed[setting]

    def trial(self, chance: random.Random) -> Found:
        setting = chance.choice(list(OPTIONS))
        moments, wanted = self.straight(setting)
        self.made += 1
        out = self.directory / f"work{self.made}" / "out"
        out.parent.mkdir()
        torn, kills = chance.random() < 0.5, chance.choice((1, 1, 2))
        at = [chance.randrange(moments) for _ in range(kills)]
        codes = [self.victims.run([*self.words(setting, out), "--resume"], at=number, torn=torn).code for number in at]
        story = f"{setting}, killed at {at}{', torn' if torn else ''}"
        last = self.victims.run([*self.words(setting, out), "--resume"]) if codes[-1] != 0 else None
        try:
            if any(code not in (0, 2, -signal.SIGKILL) for code in codes):
                return "ended strangely", f"{story}: {codes}"
            if last is not None and last.code == 2 and out.exists() and not list(out.parent.glob("out.partial")):
                last = None  # it was whole already
            if last is not None and last.code != 0:
                return "not resumed", f"{story}: {last.messages.strip()[-400:]}"
            there = file_bytes(out)
            if there != wanted or [path.name for path in out.parent.iterdir()] != ["out"]:
                other = [name for name in {*there, *wanted} if there.get(name) != wanted.get(name)]
                return "other bytes", f"{story}: {other[:3]}"
            return f"{setting}, the same bytes{' (torn)' if torn else ''}", None
        finally:
            shutil.rmtree(out.parent)


class Damages:
    """A file of an output is damaged: verify says so, unless what loads is the same."""

    each_turn = 5

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory, model = directory, make_model(directory)
        self.outputs = []
        for name in ("native", "dense", "compressed-tensors"):
            moebit.quantize(model, directory / name, recipe=small_recipe("rtn"), format=name)
            self.outputs.append(directory / name)

    def trial(self, chance: random.Random) -> Found:
        out = chance.choice(self.outputs)
        file = chance.choice([file for file in sorted(out.iterdir()) if not file.name.startswith("report.")])
        before = file.read_bytes()
        try:
            what = damage(file, chance)
            if file.exists() and file.read_bytes() == before:
                return "nothing changed", None
            ending = forked(lambda: _expect_findings(out), (self.directory,), 20)
        finally:
            file.write_bytes(before)
        if ending.code == FINE:
            return "found", None
        return ("refused", None) if ending.code == 2 else ("missed", f"{out.name}/{file.name}, {what}: {ending.said or 'hung'}")


def _expect_findings(out: Path) -> None:
    if not moebit.verify(out)["findings"]:
        raise AssertionError("no finding")


class Mutants:
    """A document is mutated, and what reads it answers: fine, or in one sentence; never with a traceback, a hang, or a file elsewhere."""

    each_turn = 40

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory, self.model = directory, make_model(directory)
        self.text = directory / "text.jsonl"
        self.text.write_text('{"text": "some words"}\n{"input_ids": [1, 2, 3]}\n' + '{"text": "' + "more words " * 60 + '"}\n')
        self.out, self.profile, self.plan = directory / "out", directory / "profile", directory / "plan.json"
        self.partial, self.recipe = directory / "stopped.partial", directory / "recipe.yaml"
        recipe = {**small_recipe("rtn", samples=4, seq_len=16), "switching": {"share": 0.05}}
        self.recipe.write_text(yaml.safe_dump(recipe))
        texts = {"a": token_file(directory / "a.jsonl", 500, 1), "b": token_file(directory / "b.jsonl", 500, 2)}
        moebit.quantize(self.model, self.out, recipe=recipe, text=texts)
        moebit.profile(self.model, self.profile, text=texts, samples=4, length=16, recipe=recipe)
        allocate(self.profile, target_bits=4.0, out=self.plan)
        self._stop(recipe, texts)
        self.evaluation, self.adapted = directory / "evaluation.json", directory / "adapted"
        self.evaluation.write_text(
            json.dumps(moebit.evaluate(self.out, against=self.model, text={"a": texts["a"]}, max_tokens=64, window=16))
        )
        moebit.adapt(self.out, text={"b": texts["b"]}, to=self.adapted, samples=4, length=16)
        self.doors = self._doors(recipe, texts)

    def _stop(self, recipe: Any, texts: Any) -> None:
        def stop(what: str, done: int, total: int) -> None:
            if what == "layers" and done == 1:
                raise KeyboardInterrupt

        try:
            moebit.quantize(self.model, self.directory / "stopped", recipe=recipe, text=texts, progress=stop)
        except KeyboardInterrupt:
            return

    def _doors(self, recipe: Any, texts: Any) -> list[tuple[Path, Callable[[], object]]]:
        """(document, what reads it)."""
        model, out, made = self.model, self.out, self.directory / "made"
        gptq = small_recipe("gptq", samples=2, seq_len=16)
        tokenizing = [
            (model / name, lambda: tokenize("t", self.text, load_tokenizer(model), 257))
            for name in ("tokenizer.json", "tokenizer_config.json")
        ]
        return [
            (model / "config.json", lambda: moebit.inspect(model)),
            (model / "config.json", lambda: moebit.quantize(model, made, recipe=gptq, text={"t": texts["a"]}, dry_run=True)),
            *tokenizing,
            (self.text, lambda: moebit.quantize(model, made, recipe=gptq, text={"t": self.text}, dry_run=True)),
            (self.recipe, lambda: moebit.inspect(model, self.recipe)),
            (self.plan, lambda: moebit.quantize(model, made, recipe=small_recipe("rtn"), plan=self.plan, dry_run=True)),
            (self.profile / "profile.json", lambda: allocate(self.profile, target_bits=4.0)),
            (out / "config.json", lambda: moebit.inspect(out)),
            (out / "config.json", lambda: moebit.verify(out)),
            (out / "model.safetensors.index.json", lambda: moebit.inspect(out)),
            (out / "moebit.json", lambda: moebit.verify(out)),
            (out / "moebit.json", lambda: moebit.quantize(model, out, recipe=small_recipe("rtn"), overwrite=True, dry_run=True)),
            (out / "moebit.json", lambda: moebit.drift(out, text={"t": texts["a"]}, samples=2, length=16)),
            (out / "recipe.yaml", lambda: moebit.verify(out)),
            (out / "report.json", lambda: moebit.report(out)),
            (self.evaluation, lambda: moebit.report(out, evaluation=self.evaluation)),
            (self.adapted / "overlay.json", lambda: former_texts(self.adapted)),
            (
                model / "generation_config.json",
                lambda: moebit.sample(model, self.directory / "s.jsonl", kind="self", sequences=2, length=16, overwrite=True),
            ),
            (self.partial / "journal.jsonl", lambda: moebit.verify(self.partial)),
            (
                self.partial / "journal.jsonl",
                lambda: moebit.quantize(model, self.directory / "stopped", recipe=recipe, text=texts, resume=True),
            ),
        ]

    def trial(self, chance: random.Random) -> Found:
        document, read = chance.choice(self.doors)
        before = document.read_bytes()
        kept = shutil.copytree(self.partial, self.directory / "kept") if document.parent == self.partial else None
        document.write_bytes(mutated := mutate(before, document.name, chance))
        try:
            ending = forked(lambda: (torch.set_num_threads(1), read()), (self.directory, Path("/tmp")), 30 if kept else 10)
        finally:
            document.write_bytes(before)
            if kept:
                shutil.rmtree(self.directory / "stopped", ignore_errors=True)
                shutil.rmtree(self.partial, ignore_errors=True)
                kept.rename(self.partial)
        story = f"{document.parent.name}/{document.name}"
        if ending.hung or ending.code == BROKEN or ending.code < 0 or ending.outside:
            saved = Path("runs/torture") / f"{chance.randrange(10**9)}-{document.name}"
            saved.parent.mkdir(parents=True, exist_ok=True)
            saved.write_bytes(mutated)
            why = "hangs" if ending.hung else f"wrote to {ending.outside}" if ending.outside else ending.said or f"code {ending.code}"
            return "a traceback, a hang or a file elsewhere", f"{story}: {why} ({saved})"
        return "read" if ending.code == FINE else "refused in a sentence", None


PARTS: dict[str, Callable[[Path], Part]] = {"kills": Kills, "damages": Damages, "mutants": Mutants}
