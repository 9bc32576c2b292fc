"""`quantize --format gguf`: the codes in the file are the solver's, and llama.cpp computes with them what transformers does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import moebit
from moebit.errors import BadInputError
from moebit.formats.gguf.converter import Converter
from moebit.formats.gguf.read import dequantized, read_gguf
from moebit.formats.gguf.rows import find_rows
from moebit.formats.gguf.types import Mixture, fitting, more_bits
from moebit.recipe import load_recipe
from moebit.recipe.weights import GGML_TYPES
from moebit.tensor import QTensor
from moebit.tensor.grids.ggml import GRIDS
from tests.support.gguf import PRE, llama_logits, loaded, token_windows, transformers_logits, with_file_weights, write_plain
from tests.support.observer import PowerCut, listening, stopped

Get = Callable[[str], Path]
RECIPE: dict[str, Any] = {
    "version": 1,
    "weights": {"type": "q4_k", "overrides": [{"match": "re:ffn_down_exps", "type": "q6_k"}]},
    "solver": {"output_aware": True, "drift": "ridge"},
    "calibration": {"samples": 4, "seq_len": 32},
    "format": "gguf",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "calib.txt"
    file.write_text("the quick brown fox and the other thing one two three four five " * 100)
    return file


def test_recipe_and_grids_know_the_same_types() -> None:
    assert GGML_TYPES.keys() == GRIDS.keys() - {"nvfp4"}
    assert {name: (bits, group) for name, (bits, group, _) in GGML_TYPES.items()} == {
        name: (GRIDS[name].bits, GRIDS[name].group) for name in GGML_TYPES
    }


@pytest.mark.parametrize("name", [pytest.param("qwen3_moe", marks=pytest.mark.slow), "olmoe"])
def test_codes_are_the_solvers_and_llama_cpp_computes_with_them(
    converter: Converter, library: Path, checkpoint: Get, tmp_path: Path, text: Path, name: str
) -> None:
    solved: dict[str, Tensor] = {}

    def keep(module: str, start: int, quantized: Mapping[str, QTensor]) -> None:
        for projection, q in quantized.items():
            for number, value in enumerate(q.dequantize(), start):
                solved[f"{module}.{number}.{projection}" if projection else module] = value

    out = tmp_path / "out"
    with listening("moebit.put", keep):
        moebit.quantize(checkpoint(name), out, recipe=RECIPE, text=[str(text)], gguf_pre=PRE)
    file = read_gguf(converter.gguf, out / "out.gguf")
    seen = 0
    for stem, found in find_rows(converter, checkpoint(name)).maps.items():
        if any(source.removesuffix(".weight") in solved for source in found.sources):
            kind = fitting("q6_k" if "ffn_down_exps" in stem else "q4_k", found.shape[-1])
            assert file.tensors[stem].type == str(kind).upper()
            values = found.gather({source: solved[source.removesuffix(".weight")] for source in found.sources})
            assert torch.equal(dequantized(converter.gguf, file.tensors[stem]), values.flatten(0, -2))
            seen += 1
    assert seen == 7 * loaded(checkpoint(name)).config.num_hidden_layers
    # llama.cpp rounds the inputs of products to 8 bits, too, as it does for a file in Q8_0.
    write_plain(converter, checkpoint(name), tmp_path / "q8_0.gguf", "MOSTLY_Q8_0")
    error = _error(converter, library, checkpoint(name), out / "out.gguf", tmp_path / "twin")
    assert error < 1.5 * _error(converter, library, checkpoint(name), tmp_path / "q8_0.gguf", tmp_path / "q8_0")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "moebit.json", "out.gguf", "recipe.yaml", "report.html", "report.json",
    ]  # fmt: skip


def _error(converter: Converter, library: Path, directory: Path, file: Path, twin: Path) -> float:
    """How far llama.cpp's logits are from those of the file's dequantized weights in transformers."""
    twin.mkdir()
    model, missing = with_file_weights(converter, directory, file, find_rows(converter, directory), twin)
    assert missing == {}
    wanted, found = transformers_logits(model, token_windows()), llama_logits(file, token_windows(), library)
    # The median of the tokens: rounded inputs send one or the other to another expert.
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"solver": {"method": "awq", "affinity_power": 1}},
        {"smoothing": {"kind": "expert_aware"}},
        {"rotation": {"absorbed": "r1r2"}},
        {"router": {"bits": 8, "align": "kl"}},
        {"router": {"realign": "ridge"}},
        {"calibration": {"samples": 4, "seq_len": 32, "balance": 2, "coverage": "soft"}},
        {"weights": {"type": "iq4_nl", "scope": "experts", "ignore": ["*.layers.0.mlp.experts"]}},
    ],
    ids=lambda changes: ", ".join(f"{section}.{key}" for section, values in changes.items() for key in values),
)
def test_what_other_methods_change_arrives_in_the_file(
    converter: Converter, library: Path, checkpoint: Get, tmp_path: Path, text: Path, changes: dict[str, Any]
) -> None:
    recipe = {**RECIPE, "weights": {"type": "q4_k"}, "solver": {"method": "gptq"}, **changes}
    moebit.quantize(checkpoint("olmoe"), tmp_path / "x", recipe=recipe, text=[str(text)], gguf_pre=PRE)
    # As far apart as those of a file in Q8_0: llama.cpp rounds the inputs of products.
    assert _error(converter, library, checkpoint("olmoe"), tmp_path / "x" / "x.gguf", tmp_path / "twin") < 0.05
    assert moebit.verify(tmp_path / "x")["state"] == "fine"


@pytest.mark.parametrize("where", [pytest.param("layer", marks=pytest.mark.slow), "file"])
def test_interrupted_and_resumed_gives_the_same_bytes(
    converter: Converter, checkpoint: Get, tmp_path: Path, text: Path, where: str
) -> None:
    def run(out: Path, **more: Any) -> None:
        moebit.quantize(checkpoint("olmoe"), out, recipe=RECIPE, text=[str(text)], gguf_pre=PRE, **more)

    run(tmp_path / "a" / "x")
    cut = stopped("moebit.gguf", PowerCut()) if where == "file" else stopped("moebit.layer", PowerCut(), nth=2)
    with cut, pytest.raises(PowerCut):
        run(tmp_path / "b" / "x")
    run(tmp_path / "b" / "x", resume=True)
    for name in ("x.gguf", "moebit.json", "recipe.yaml", "README.md"):
        assert (tmp_path / "a" / "x" / name).read_bytes() == (tmp_path / "b" / "x" / name).read_bytes()
    assert not (tmp_path / "b" / "x.partial").exists()


def test_a_finished_output_survives_the_end_of_its_tidying_up(converter: Converter, checkpoint: Get, tmp_path: Path, text: Path) -> None:
    """The process ends when OUT has its name and some of the shards are gone: OUT is whole, and --resume tidies up the rest."""

    def run(out: Path, **more: Any) -> None:
        moebit.quantize(checkpoint("olmoe"), out, recipe=RECIPE, text=[str(text)], gguf_pre=PRE, **more)

    def some(path: str) -> None:
        next(Path(path).glob("model-*")).unlink()
        raise PowerCut

    run(tmp_path / "a" / "x")
    with listening("moebit.tidy", some), pytest.raises(PowerCut):
        run(tmp_path / "b" / "x")
    with pytest.raises(BadInputError, match="x exists; choose another -o"):
        run(tmp_path / "b" / "x", resume=True)
    written = [{file.name: file.read_bytes() for file in (tmp_path / k / "x").iterdir() if "report" not in file.name} for k in "ab"]
    assert written[0] == written[1]
    assert moebit.verify(tmp_path / "b" / "x")["findings"] == []


def test_shards_hold_the_same_and_llama_cpp_loads_them(converter: Converter, library: Path, checkpoint: Get, tmp_path: Path) -> None:
    rtn = {"version": 1, "weights": {"type": "q4_0"}, "solver": {"method": "rtn"}, "format": "gguf"}
    directory, limit = checkpoint("olmoe"), 2**18
    moebit.quantize(directory, tmp_path / "whole", recipe=rtn, gguf_pre=PRE)
    moebit.quantize(directory, tmp_path / "x", recipe=rtn, gguf_pre=PRE, shard_size="256KiB")
    files = sorted((tmp_path / "x").glob("*.gguf"))
    assert [file.name for file in files] == [f"x-{n:05d}-of-{len(files):05d}.gguf" for n in range(1, len(files) + 1)]
    shards = [read_gguf(converter.gguf, file) for file in (tmp_path / "whole" / "whole.gguf", files[0])]
    assert shards[1].files == tuple(files)
    for name, tensor in shards[0].tensors.items():
        assert (tensor.read() == shards[1].tensors[name].read()).all()
    held = [[one.nbytes for one in shards[1].tensors.values() if one.file == file] for file in files]
    assert len(files) > 2
    assert all(sum(sizes) <= limit or len(sizes) == 1 for sizes in held)
    assert torch.equal(llama_logits(files[0], token_windows(), library), llama_logits(shards[0].files[0], token_windows(), library))
    assert moebit.verify(tmp_path / "x")["findings"] == []
    assert moebit.inspect(tmp_path / "x")["size_bytes"] == sum(file.stat().st_size for file in files)
    # Killed while the shards are written, and taken up again.
    with stopped("moebit.tensor", PowerCut(), nth=9), pytest.raises(PowerCut):
        moebit.quantize(directory, tmp_path / "b" / "x", recipe=rtn, gguf_pre=PRE, shard_size="256KiB")
    moebit.quantize(directory, tmp_path / "b" / "x", recipe=rtn, gguf_pre=PRE, shard_size="256KiB", resume=True)
    assert [(tmp_path / "b" / "x" / file.name).read_bytes() for file in files] == [file.read_bytes() for file in files]
    files[-1].unlink()
    assert moebit.verify(tmp_path / "x")["state"] == "damaged"


def test_what_cannot_be_written_is_refused_before_the_work(converter: Converter, checkpoint: Get, tmp_path: Path) -> None:
    directory, out = checkpoint("olmoe"), tmp_path / "x"
    rtn = {"version": 1, "weights": {"type": "q4_0"}, "solver": {"method": "rtn"}, "format": "gguf"}
    with pytest.raises(BadInputError, match="does not recognise this tokenizer; say which pre-tokenizer it has with --gguf-pre NAME"):
        moebit.quantize(directory, out, recipe=rtn, dry_run=True)
    with pytest.raises(BadInputError, match="knows no such pre-tokenizer"):
        moebit.quantize(directory, out, recipe=rtn, gguf_pre="nonsense", dry_run=True)
    with pytest.raises(BadInputError, match=r"there is no conversion/base\.py"):
        moebit.quantize(directory, out, recipe=rtn, llama_cpp=tmp_path, dry_run=True)
    with pytest.raises(BadInputError, match="--llama-cpp, --gguf-pre and --shard-size: the recipe's format is native"):
        moebit.quantize(directory, out, recipe="rtn-w4", gguf_pre=PRE, dry_run=True)
    with pytest.raises(BadInputError, match="--shard-size 5: the unit is missing"):
        moebit.quantize(directory, out, recipe=rtn, gguf_pre=PRE, shard_size="5", dry_run=True)
    wrong = {**rtn, "weights": {"type": "q4_0", "overrides": [{"match": "blk.9*", "type": "q8_0"}]}}
    with pytest.raises(BadInputError, match=r"weights.overrides: 'blk.9\*' matches no quantized tensor"):
        moebit.quantize(directory, out, recipe=wrong, gguf_pre=PRE, dry_run=True)
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "native"}, "weights.type: q4_k is a block type of ggml; set format: gguf"),
        ({"weights": {"type": "int"}}, "format: gguf holds ggml's block types"),
        ({"weights": {"type": "nvfp4"}}, "in a tensor of its own, which is not written yet"),
        ({"weights": {"type": "q9_k"}}, "choose one of int, fp8, fp8-block, q4_0"),
        ({"weights": {"type": "q4_k", "overrides": [{"match": "re:(", "type": "q8_0"}]}}, "is no regular expression"),
        ({"activations": {"bits": 8}}, "format gguf has no place to say so"),
        ({"solver": {"scales": "dynamic", "act_order": False}}, "blocks of q4_k are fixed before the solve"),
    ],
)
def test_recipes_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInputError, match=said):
        load_recipe({**RECIPE, "weights": {"type": "q4_k"}, **changes})


@pytest.mark.parametrize(
    ("kind", "width", "found"),
    [("q4_k", 512, "q4_k"), ("q4_k", 1408, "q5_0"), ("q2_k", 96, "q4_0"), ("iq4_xs", 96, "iq4_nl"), ("q8_0", 40, None), ("q6_k", 40, None)],
)
def test_rows_that_blocks_do_not_divide_get_llama_cpps_other_type(kind: str, width: int, found: str | None) -> None:
    assert fitting(kind, width) == found


def _types(name: str, base: str, experts: int, gqa: int) -> Iterator[tuple[str, ...]]:
    mixture = Mixture(name, base, 16, experts, gqa, tuple(range(16)), False)
    for block in range(16):
        parts = ("attn_v", "attn_k", "attn_output", "ffn_down_exps", "ffn_up_exps")
        yield tuple(mixture.type_of(f"blk.{block}.{part}.weight") for part in parts)


def test_mixtures_are_llama_quantizes() -> None:
    """Read off llama-quant.cpp for 16 layers; the many-expert and the 8-expert branch."""
    more = [number for number in range(16) if more_bits(number, 16)]
    assert more == [0, 1, 4, 7, 10, 13, 14, 15]
    for block, found in enumerate(_types("q4_k_m", "q4_k", 64, 8)):
        high = "q6_k" if block in more else "q4_k"
        assert found == (high, "q4_k", "q4_k", high, "q4_k")
    for block, found in enumerate(_types("q3_k_m", "q3_k", 64, 8)):
        assert found == ("q5_k" if block < 2 else "q4_k", "q3_k", "q4_k", "q5_k" if block < 1 else "q4_k", "q3_k")
    assert set(_types("q2_k", "q2_k", 64, 1)) == {("q3_k", "q2_k", "q3_k", "q3_k", "q2_k")}
    assert set(_types("q2_k", "q2_k", 8, 4)) == {("q8_0", "q8_0", "q5_k", "q3_k", "q2_k")}
    assert set(_types("iq4_xs", "iq4_xs", 64, 4)) == {("q5_k", "iq4_xs", "iq4_xs", "iq4_xs", "iq4_xs")}


@pytest.mark.parametrize("name", ["gguf-q4_k_m", "gguf-q3_k_m", "gguf-q2_k", "gguf-iq4_xs"])
def test_presets_are_planned(converter: Converter, checkpoint: Get, tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name)
    plan: Any = moebit.inspect(checkpoint("olmoe"), recipe, llama_cpp=converter.root)["plan"]
    with pytest.raises(BadInputError, match=r"there is no conversion/base\.py"):
        moebit.inspect(checkpoint("olmoe"), recipe, llama_cpp=tmp_path)
    types = plan["gguf"]["types"]
    assert types["output.weight"] == "q6_k"
    assert types["token_embd.weight"] == types["blk.0.ffn_up_exps.weight"] == recipe.weights.type
    assert plan["engines"]["llama.cpp"]["runs"]


def test_an_output_is_inspected_judged_and_verified(
    converter: Converter, library: Path, checkpoint: Get, tmp_path: Path, text: Path
) -> None:
    directory, out = checkpoint("olmoe"), tmp_path / "x"
    rtn = {"version": 1, "weights": {"type": "q8_0"}, "solver": {"method": "rtn"}, "format": "gguf"}
    moebit.quantize(directory, out, recipe=rtn, gguf_pre=PRE)
    file, size = out / "x.gguf", (out / "x.gguf").stat().st_size
    found = moebit.inspect(file)
    assert found["size_bytes"] == size
    assert found["gguf"]["architecture"] == "olmoe"
    assert set(found["gguf"]["types"]) == {"Q8_0", "F32"}
    with pytest.raises(BadInputError, match="is already quantized"):
        moebit.inspect(file, "gguf-q4_k_m")
    for model in (out, file):
        result = moebit.evaluate(model, against=directory, text=[f"t={text}"], window=32, max_tokens=128)
        assert result["size_bytes"] == size
        assert result["remarks"] == []
        assert 0 < result["texts"]["t"]["kl"] < 0.01
        assert "routing_exact" not in result["texts"]["t"]
    reference = transformers_logits(loaded(directory), _windows(directory, text)).log_softmax(-1)[:, :-1]
    mine = llama_logits(file, _windows(directory, text), library).log_softmax(-1)[:, :-1]
    kl = float((reference.exp() * (reference - mine)).sum(-1).mean())
    assert result["texts"]["t"]["kl"] == pytest.approx(kl, rel=1e-3)
    (tmp_path / "e.json").write_text(json.dumps(result))
    moebit.report(out, evaluation=tmp_path / "e.json")
    assert "Distance from the original" in (out / "report.html").read_text()
    (compared,) = moebit.compare(directory, [out], tmp_path / "c.html", text=[f"t={text}"], window=32, max_tokens=128)["models"]
    assert compared["refused"] is None
    assert compared["size_bytes"] == size
    assert compared["texts"]["t"]["kl"] == pytest.approx(kl, rel=1e-3)
    with pytest.raises(BadInputError, match="give --against MODEL"):
        moebit.evaluate(file, text=[str(text)])
    assert moebit.verify(out)["state"] == "fine"
    assert moebit.verify(out)["tensors"] == len(found["gguf"]["tensors"])
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(bytes(content))
    damaged = moebit.verify(out)
    assert damaged["state"] == "damaged"
    assert [finding["where"] for finding in damaged["findings"]] == ["x.gguf"]


def _windows(directory: Path, text: Path) -> Tensor:
    tokens = AutoTokenizer.from_pretrained(directory).encode(text.read_text(), add_special_tokens=False)
    return torch.tensor(tokens[:128]).view(4, 32)
