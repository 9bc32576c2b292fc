"""`moebit verify`: every kind of damage is found, and the right file and tensor are named.

Damage is done to bytes and JSON directly; the checksums of the resealed cases are made here, from docs/format.md.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

import moebit
from moebit import cli
from moebit.cli import terminal
from moebit.errors import BadInputError
from moebit.formats import consistency
from moebit.plan.bitplan import BitPlan
from moebit.storage.files import read_header
from tests.support.models import ARCHITECTURES, Architecture, random_model, save
from tests.support.observer import observed
from tests.support.outputs import Outputs, byte_tokenizer, small_recipe

MIXTRAL = ARCHITECTURES["mixtral"]
INDEX, FIRST, SECOND, REST = "model.safetensors.index.json", *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
EXPERTS, Q = "model.layers.0.mlp.experts", "model.layers.0.self_attn.q_proj"
NORM = "model.layers.1.post_attention_layernorm.weight"
WIDTHS = [3, 4, 2, 3, 8, 5, 6, 3]
Expected = list[tuple[str, str]]  # (part of `where`, pattern of `what`)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With tokenizer and generation settings; rows of 36 values, so that packed rows end in padding."""
    path = save(random_model(MIXTRAL, vocab_size=257, intermediate_size=36), tmp_path_factory.mktemp("model") / "model")
    byte_tokenizer().save_pretrained(path)
    GenerationConfig(temperature=0.7, do_sample=True).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Asymmetric, with mixed widths."""
    out = tmp_path_factory.mktemp("whole") / "out"
    recipe = small_recipe("rtn", weights={"bits": 3, "symmetric": False})
    moebit.quantize(model, out, recipe=recipe, plan=BitPlan({EXPERTS: {"up_proj": WIDTHS}}, {}))
    return out


@pytest.fixture(scope="module")
def dense(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dense") / "out"
    moebit.quantize(model, out, recipe=small_recipe("rtn"), format="dense")
    return out


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "out")


def span(file: Path, name: str) -> tuple[int, int]:
    """Where a tensor's bytes lie, read from the header as safetensors specifies it."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    return 8 + length + begin, 8 + length + end


def flip(file: Path, at: int, mask: int = 1) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= mask
    file.write_bytes(raw)


def overwrite(file: Path, at: int, data: bytes) -> None:
    raw = bytearray(file.read_bytes())
    raw[at : at + len(data)] = data
    file.write_bytes(raw)


def change_json(file: Path, change: Callable[[Any], Any]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document, indent=1) + "\n")


def modules(document: Any) -> Any:
    return document["quantization_config"]["modules"]


def reseal(out: Path) -> None:
    """Checksums that fit what is there now, as docs/format.md says they are made."""
    document = json.loads((out / "moebit.json").read_text())
    document["files"] = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.iterdir())
        if file.name != "moebit.json" and not file.name.startswith("report.")
    }
    document["sha256"] = "0" * 64
    text = json.dumps(document, indent=1)
    (out / "moebit.json").write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest()))


def found(result: dict[str, Any], where: str, what: str) -> list[dict[str, str]]:
    return [finding for finding in result["findings"] if where in finding["where"] and re.search(what, finding["what"])]


# --- each damage: done to an output, it returns what has to be found: by the checksums, and by those who know what the files mean


def flipped_codes(out: Path) -> tuple[Expected, Expected]:
    flip(out / FIRST, span(out / FIRST, f"{EXPERTS}.gate_proj.codes")[0] + 100)
    return [(FIRST, "sha256")], []


def flipped_header(out: Path) -> tuple[Expected, Expected]:
    at = (out / SECOND).read_bytes().index(b"self_attn.k_proj.scale")
    flip(out / SECOND, at)
    return [(SECOND, "sha256")], [("config.json", r"self_attn\.k_proj\.scale.*no shard"), (INDEX, r"self_attn\.k_proj\.scale.*not in")]


def flipped_offset(out: Path) -> tuple[Expected, Expected]:
    raw = (out / SECOND).read_bytes()
    at = raw.index(b'"data_offsets":[') + len(b'"data_offsets":[0,')
    flip(out / SECOND, at)
    return [(SECOND, "sha256")], [(SECOND, "corrupt|not a safetensors|truncated")]


def missing_shard(out: Path) -> tuple[Expected, Expected]:
    (out / SECOND).unlink()
    return [(SECOND, "is missing")], [(INDEX, f"{SECOND}.*missing")]


def nan_scale(out: Path) -> tuple[Expected, Expected]:
    start, _ = span(out / FIRST, f"{EXPERTS}.up_proj.scale")
    overwrite(out / FIRST, start + 4 * (2 * 36 + 5), np.float32("nan").tobytes())
    return [(FIRST, "sha256")], [(f"{FIRST}: {EXPERTS}.up_proj.scale", r"nan at \[2, 5, 0\]")]


def infinite_norm(out: Path) -> tuple[Expected, Expected]:
    start, _ = span(out / SECOND, NORM)
    overwrite(out / SECOND, start + 4 * 7, np.float32("-inf").tobytes())
    return [(SECOND, "sha256")], [(f"{SECOND}: {NORM}", r"-inf at \[7\]")]


def swapped_tensors(out: Path) -> tuple[Expected, Expected]:
    (a, b), (c, d) = (span(out / FIRST, f"model.layers.0.self_attn.{name}_proj.codes") for name in ("k", "v"))
    raw = bytearray((out / FIRST).read_bytes())
    raw[a:b], raw[c:d] = raw[c:d], raw[a:b]
    (out / FIRST).write_bytes(raw)
    return [(FIRST, "sha256")], []


def truncated_shard(out: Path) -> tuple[Expected, Expected]:
    (out / REST).write_bytes((out / REST).read_bytes()[:-9])
    return [(REST, "sha256")], [(REST, "truncated")]


def longer_shard(out: Path) -> tuple[Expected, Expected]:
    (out / REST).write_bytes((out / REST).read_bytes() + b"more")
    return [(REST, "sha256")], [(REST, "behind its last tensor")]


def other_bits(out: Path) -> tuple[Expected, Expected]:
    change_json(out / "config.json", lambda c: modules(c)[Q].update(bits=4))
    return [("config.json", "sha256")], [(f"{FIRST}: {Q}.codes", "uint8.*where config.json says"), ("moebit.json", "average_bits")]


def other_experts_bits(out: Path) -> tuple[Expected, Expected]:
    """As many bytes: two experts have exchanged their widths."""

    def exchange(document: Any) -> None:
        bits = modules(document)[EXPERTS]["projections"]["up_proj"]["bits"]
        bits[4], bits[2] = bits[2], bits[4]

    change_json(out / "config.json", exchange)
    return [("config.json", "sha256")], [(f"{FIRST}: {EXPERTS}.up_proj.bits", "expert 2 has 2 bits where config.json says 8")]


def other_group_size(out: Path) -> tuple[Expected, Expected]:
    change_json(out / "config.json", lambda c: modules(c)[Q].update(group_size=32))
    return [("config.json", "sha256")], [(f"{FIRST}: {Q}.scale", r"\[64, 1\] where config.json says float32 \[64, 2\]")]


def impossible_group_size(out: Path) -> tuple[Expected, Expected]:
    change_json(out / "config.json", lambda c: modules(c)[Q].update(group_size=48))
    return [("config.json", "sha256")], [("config.json", f"{Q}.*48 does not divide 64")]


def impossible_bits(out: Path) -> tuple[Expected, Expected]:
    change_json(out / "config.json", lambda c: modules(c)[Q].update(bits=7))
    return [("config.json", "sha256")], [("config.json", f"{Q}.*7 bits")]


def no_longer_asymmetric(out: Path) -> tuple[Expected, Expected]:
    change_json(out / "config.json", lambda c: modules(c)[Q].update(symmetric=True))
    return [("config.json", "sha256")], [(f"{FIRST}: {Q}.zero_point", "symmetric")]


def other_scale_type(out: Path) -> tuple[Expected, Expected]:
    change_json(out / "config.json", lambda c: modules(c)[Q].update(scale_dtype="float16"))
    return [("config.json", "sha256")], [(f"{FIRST}: {Q}.scale", "float32.*says float16")]


def forgotten_module(out: Path) -> tuple[Expected, Expected]:
    change_json(out / "config.json", lambda c: modules(c).pop(Q))
    return [("config.json", "sha256")], [(f"{FIRST}: {Q}.codes", "nothing of this packed tensor")]


def other_model(out: Path) -> tuple[Expected, Expected]:
    change_json(out / "config.json", lambda c: c.update(vocab_size=300))
    return [("config.json", "sha256")], [(f"{REST}: model.embed_tokens.weight", r"shape \[257, 64\].*\[300, 64\]")]


def other_implementation(out: Path) -> tuple[Expected, Expected]:
    change_json(out / "config.json", lambda c: c.update(experts_implementation="eager"))
    return [("config.json", "sha256")], [("config.json", "experts_implementation is 'eager'")]


def index_of_nothing(out: Path) -> tuple[Expected, Expected]:
    change_json(out / INDEX, lambda i: i["weight_map"].update({"model.layers.0.ghost": FIRST}))
    return [(INDEX, "sha256")], [(INDEX, f"'model.layers.0.ghost', which is not in {FIRST}")]


def index_without(out: Path) -> tuple[Expected, Expected]:
    change_json(out / INDEX, lambda i: i["weight_map"].pop(NORM))
    return [(INDEX, "sha256")], [(f"{SECOND}: {NORM}", "no file has this tensor")]


def index_elsewhere(out: Path) -> tuple[Expected, Expected]:
    change_json(out / INDEX, lambda i: i["weight_map"].update({NORM: FIRST}))
    return [(INDEX, "sha256")], [(f"{SECOND}: {NORM}", f"{FIRST} has this tensor"), (INDEX, f"{NORM}.*not in {FIRST}")]


def other_total(out: Path) -> tuple[Expected, Expected]:
    change_json(out / INDEX, lambda i: i["metadata"].update(total_size=1))
    return [(INDEX, "sha256")], [(INDEX, "1 bytes")]


def extra_shard(out: Path) -> tuple[Expected, Expected]:
    save_file({"more": torch.zeros(3)}, out / "model-00004-of-00004.safetensors")
    return [("model-00004-of-00004.safetensors", "names no tensor")], [("model-00004-of-00004.safetensors", "names no tensor")]


def missing_tensor(out: Path) -> tuple[Expected, Expected]:
    """Gone from the shard and from the index: only the model knows."""
    tensors = load_file(out / SECOND)
    size = tensors.pop(NORM).nbytes
    save_file(tensors, out / SECOND, {"format": "pt"})
    change_json(out / INDEX, lambda i: (i["weight_map"].pop(NORM), i["metadata"].update(total_size=i["metadata"]["total_size"] - size)))
    return [(SECOND, "sha256"), (INDEX, "sha256")], [("config.json", f"missing, first '{NORM}'")]


def dirty_padding(out: Path) -> tuple[Expected, Expected]:
    """36 values of 3 bits: the last 12 of a row's 15 x 8 bits stand for nothing."""
    start, _ = span(out / FIRST, f"{EXPERTS}.down_proj.codes")
    flip(out / FIRST, start + 14, 0x80)
    return [(FIRST, "sha256")], [(f"{FIRST}: {EXPERTS}.down_proj.codes", "padding of matrix 0")]


def edited_recipe(out: Path) -> tuple[Expected, Expected]:
    text = (out / "recipe.yaml").read_text()
    (out / "recipe.yaml").write_text(text.replace("bits: 3", "bits: 4"))
    return [("recipe.yaml", "sha256")], [("recipe.yaml", "edited"), ("moebit.json", "recipe")]


def missing_tokenizer(out: Path) -> tuple[Expected, Expected]:
    (out / "tokenizer.json").unlink()
    return [("tokenizer.json", "is missing")], []


def edited_generation(out: Path) -> tuple[Expected, Expected]:
    change_json(out / "generation_config.json", lambda g: g.update(temperature=1.5))
    return [("generation_config.json", "sha256")], []


def added_template(out: Path) -> tuple[Expected, Expected]:
    (out / "chat_template.jinja").write_text("{{ messages }}")
    return [("chat_template.jinja", "was not there")], []


def edited_manifest(out: Path) -> tuple[Expected, Expected]:
    text = (out / "moebit.json").read_text()
    (out / "moebit.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    return [("moebit.json", "changed after")], []


def edited_plan(out: Path) -> tuple[Expected, Expected]:
    change_json(out / "moebit.json", lambda m: m["plan"].update(average_bits=2.0, quantized_linears=3))
    return [("moebit.json", "changed after")], [
        ("moebit.json", r"plan\.average_bits is 2\.0"),
        ("moebit.json", r"quantized_linears is 3, .* 8"),
    ]


def other_format(out: Path) -> tuple[Expected, Expected]:
    change_json(out / "moebit.json", lambda m: m.update(format="dense"))
    return [("moebit.json", "changed after")], [("moebit.json", "'dense', by config.json it is 'native'")]


def no_checksums(out: Path) -> tuple[Expected, Expected]:
    change_json(out / "moebit.json", lambda m: (m.pop("files"), m.pop("sha256")))
    return [("moebit.json", "no checksums of the files"), ("moebit.json", "no checksum of itself")], []


def no_manifest(out: Path) -> tuple[Expected, Expected]:
    (out / "moebit.json").unlink()
    return [("moebit.json", "is missing")], []


def another_runs_shard(out: Path) -> tuple[Expected, Expected]:
    """The same names, types and shapes, other values."""
    tensors = {
        name: t.roll(1, 0) if t.dtype == torch.uint8 and name.endswith(".codes") else t for name, t in load_file(out / FIRST).items()
    }
    save_file(tensors, out / FIRST, {"format": "pt"})
    return [(FIRST, "sha256")], []


def exchanged_shards(out: Path) -> tuple[Expected, Expected]:
    first, second = (out / FIRST).read_bytes(), (out / SECOND).read_bytes()
    (out / FIRST).write_bytes(second)
    (out / SECOND).write_bytes(first)
    return [(FIRST, f"what {SECOND} should hold"), (SECOND, f"what {FIRST} should hold")], [(INDEX, "not in")]


DAMAGES = [
    flipped_codes, flipped_header, flipped_offset, missing_shard, nan_scale, infinite_norm, swapped_tensors, truncated_shard, longer_shard,
    other_bits, other_experts_bits, other_group_size, impossible_group_size, impossible_bits, no_longer_asymmetric, other_scale_type,
    forgotten_module, other_model, other_implementation, index_of_nothing, index_without, index_elsewhere, other_total, extra_shard,
    missing_tensor, dirty_padding, edited_recipe, missing_tokenizer, edited_generation, added_template, edited_manifest, edited_plan,
    other_format, no_checksums, no_manifest, another_runs_shard, exchanged_shards,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_found_and_named(damage: Callable[[Path], tuple[Expected, Expected]], out: Path) -> None:
    by_checksum, by_meaning = damage(out)
    result = moebit.verify(out)
    assert result["state"] == "damaged"
    for where, what in by_checksum + [item for item in by_meaning if damage is not missing_shard]:
        assert found(result, where, what), (where, what, result["findings"])
    assert all(finding["remedy"] for finding in result["findings"])
    touched = {where.split(":")[0] for where, _ in by_checksum + by_meaning}
    related = {"config.json", "moebit.json", INDEX}  # who is said to disagree with the damaged file
    assert {finding["where"].split(":")[0] for finding in result["findings"]} <= touched | related
    if by_meaning:
        reseal(out)
        again = moebit.verify(out)
        for where, what in by_meaning:
            assert found(again, where, what), (where, what, again["findings"])
        assert not found(again, "", "sha256 is another|changed after")


@pytest.mark.parametrize("fixture", ["whole", "dense"])
def test_what_was_written_is_fine(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    directory = request.getfixturevalue(fixture)
    seen: list[str] = []
    result = moebit.verify(directory, progress=lambda what, done, total: seen.append(what))
    assert result["findings"] == []
    assert result["state"] == "fine"
    assert result["format"] == {"whole": "native", "dense": "dense"}[fixture]
    assert result["files"] == len(list(directory.iterdir()))
    assert result["tensors"] == len(json.loads((directory / INDEX).read_text())["weight_map"])
    assert {"checksums", "values"} <= set(seen)
    copied = shutil.copytree(directory, tmp_path / "copied")
    reseal(copied)
    assert moebit.verify(copied)["findings"] == [], "the seal is the one of docs/format.md"
    (copied / "notes.md").write_text("mine")
    (copied / "report.html").write_text("made later")
    assert moebit.verify(copied)["state"] == "fine"


@pytest.mark.parametrize("format", ["native", "dense"])
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=() if name in ("gpt_oss", "deepseek_v3") else pytest.mark.slow) for name, a in ARCHITECTURES.items()],
    ids=str,
)
def test_every_architecture_is_fine(architecture: Architecture, format: str, outputs: Outputs) -> None:
    """Tied heads, transposed and interleaved experts, correction biases, tensors that the model does not use: no false alarm."""
    mixed = format == "native"
    assert moebit.verify(outputs.rtn(architecture, symmetric=not mixed, mixed=mixed, format=format))["findings"] == []


def test_every_file_has_its_checksum(whole: Path) -> None:
    files = json.loads((whole / "moebit.json").read_text())["files"]
    assert {"tokenizer.json", "generation_config.json", "README.md", "recipe.yaml", "config.json", INDEX, FIRST, SECOND, REST} <= set(files)
    assert set(files) == {file.name for file in whole.iterdir()} - {"moebit.json", "report.json", "report.html"}
    assert files == {name: hashlib.sha256((whole / name).read_bytes()).hexdigest() for name in files}


@pytest.mark.parametrize("where", [0.0, 0.37, 1.0])
def test_a_flipped_bit_anywhere(where: float, out: Path) -> None:
    """In every file, at its beginning, inside and at its end."""
    for file in sorted(out.iterdir()):
        before = file.read_bytes()
        flip(file, int(where * (len(before) - 1)), 2)
        if not file.name.startswith("report."):
            result = moebit.verify(out)
            assert found(result, file.name, ""), (file.name, result["findings"])
        file.write_bytes(before)


def test_an_empty_file(out: Path) -> None:
    for file in sorted(out.iterdir()):
        before = file.read_bytes()
        file.write_bytes(b"")
        result = moebit.verify(out)
        assert result["state"] == "damaged"
        assert found(result, file.name, "empty|not a JSON"), (file.name, result["findings"])
        file.write_bytes(before)
    assert moebit.verify(out)["state"] == "fine"


def test_dense_damage(dense: Path, tmp_path: Path) -> None:
    out = shutil.copytree(dense, tmp_path / "out")
    name = next(name for name in read_header(out / SECOND) if name.endswith("q_proj.weight"))
    overwrite(out / SECOND, span(out / SECOND, name)[0], np.float32("inf").tobytes())
    change_json(out / "config.json", lambda c: c.update(hidden_size=128))
    reseal(out)
    result = moebit.verify(out)
    assert found(result, f"{SECOND}: {name}", r"inf at \[0, 0\]")
    assert found(result, "config.json", "do not belong together|shape")


def test_finite_goes_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency, "PIECE_BYTES", 100)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn):
        w = torch.ones(6, 7, 9)
        save_file({"w": w.to(dtype)}, tmp_path / "x.safetensors")
        assert consistency.finite(read_header(tmp_path / "x.safetensors")["w"]) is None
        w[4, 5, 6] = float("nan")
        save_file({"w": w.to(dtype)}, tmp_path / "x.safetensors")
        with observed("moebit.read") as read:
            finding = consistency.finite(read_header(tmp_path / "x.safetensors")["w"])
        assert max(size for *_, size in read) <= 100
        assert finding is not None
        assert finding.what == "holds nan at [4, 5, 6]"
    save_file({"s": torch.tensor(float("inf")), "i": torch.arange(3)}, tmp_path / "y.safetensors")
    header = read_header(tmp_path / "y.safetensors")
    scalar = consistency.finite(header["s"])
    assert scalar is not None
    assert scalar.what == "holds inf at []"
    assert consistency.finite(header["i"]) is None


# --- unfinished


class Stop(Exception):
    pass


@pytest.fixture
def partial(model: Path, tmp_path: Path) -> Path:
    """One of two layers is done."""

    def stop(what: str, done: int, total: int) -> None:
        if what == "layers" and done == 1:
            raise Stop

    with pytest.raises(Stop):
        moebit.quantize(model, tmp_path / "run", recipe=small_recipe("rtn"), progress=stop)
    return tmp_path / "run.partial"


def test_unfinished_says_what_is_durable(partial: Path) -> None:
    for path in (partial, partial.with_name("run")):
        result = moebit.verify(path)
        assert result["state"] == "unfinished"
        assert result["output"] == str(partial)
        assert result["durable"] == {"layers": 1, "of": 2, "rest": False}
        assert result["tensors"] > 0


def test_unfinished_and_damaged(partial: Path) -> None:
    flip(partial / FIRST, -1)
    result = moebit.verify(partial)
    assert result["state"] == "damaged"
    assert found(result, FIRST, "not what the journal says")
    (partial / FIRST).unlink()
    assert found(moebit.verify(partial), FIRST, "is missing")
    (partial / FIRST).write_bytes(b"")
    (partial / "journal.jsonl").unlink()
    assert found(moebit.verify(partial), "journal.jsonl", "missing")


def test_no_output_of_ours(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no such directory"):
        moebit.verify(tmp_path / "nothing")
    with pytest.raises(BadInputError, match="no output of `moebit quantize`"):
        moebit.verify(model)


def test_command(out: Path, partial: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["moebit", "verify", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    from rich.console import Console

    monkeypatch.setattr(terminal, "out", Console(width=240))
    assert run(out) == 0
    assert "fine" in capsys.readouterr().out
    assert run(partial) == 3
    assert "1 of 2 layers" in capsys.readouterr().out
    nan_scale(out)
    assert run(out, "--json", tmp_path / "findings.json") == 2
    shown = capsys.readouterr().out
    assert "damaged" in shown
    assert f"{EXPERTS}.up_proj.scale" in shown
    assert "copy this file again" in shown
    assert {finding["where"] for finding in json.loads((tmp_path / "findings.json").read_text())["findings"]} >= {FIRST}
    assert run(out, "--json", "-") == 2
    assert json.loads(capsys.readouterr().out)["state"] == "damaged"
    assert run(tmp_path / "nothing") == 2


# --- compressed-tensors


@pytest.fixture(scope="module")
def packed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    moebit.quantize(model, out, recipe=small_recipe("rtn"), format="compressed-tensors")
    return out


def test_compressed_tensors_are_fine(packed: Path) -> None:
    result = moebit.verify(packed)
    assert result["findings"] == []
    assert result["format"] == "compressed-tensors"


@pytest.mark.parametrize("damage", ["scale shape", "missing scale", "missing codes", "other bits", "no groups", "NaN scale"])
def test_damaged_compressed_tensors(damage: str, packed: Path, tmp_path: Path) -> None:
    """Found by what the tensors say, checksums apart."""
    out = shutil.copytree(packed, tmp_path / "out")
    stored = load_file(out / FIRST)
    name = next(key for key in sorted(stored) if key.endswith("experts.0.w1.weight_scale"))
    expected = name.removesuffix("weight_scale")
    if damage == "scale shape":
        stored[name] = stored[name].repeat(1, 2)
    elif damage == "missing scale":
        del stored[name]
    elif damage == "missing codes":
        del stored[expected + "weight_packed"]
    elif damage == "NaN scale":
        stored[name][0, 0] = torch.nan
    elif damage == "other bits":
        change_json(out / "config.json", lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=8))
    else:
        change_json(out / "config.json", lambda c: c["quantization_config"].pop("config_groups"))
        expected = "config.json"
    save_file(stored, out / FIRST, {"format": "pt"})
    assert [item for item in moebit.verify(out)["findings"] if expected in item["where"]]
