"""GGUF files written, read and run: the bytes, the shards, damage, and the logits of llama.cpp against transformers'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from moebit.errors import BadInputError
from moebit.evaluate.llama import open_llama, token_difference
from moebit.formats.gguf.converter import Converter, GgufData, stored_tensors
from moebit.formats.gguf.read import dequantized, read_gguf, restore
from moebit.formats.gguf.rows import find_rows
from moebit.formats.gguf.write import write_gguf
from tests.support.gguf import CASES, PRE, TEXTS, llama_logits, loaded, token_windows, transformers_logits, with_file_weights, write_plain

Get = Callable[[str], Path]


def test_float32_logits_are_transformers(converter: Converter, library: Path, checkpoint: Get, tmp_path: Path) -> None:
    write_plain(converter, checkpoint("olmoe"), tmp_path / "x.gguf")
    wanted = transformers_logits(loaded(checkpoint("olmoe")), token_windows())
    found = llama_logits(tmp_path / "x.gguf", token_windows(), library)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_rows_of_q8_0_go_where_the_maps_say(converter: Converter, library: Path, checkpoint: Get, tmp_path: Path) -> None:
    """Packed rows through the maps are the converter's own Q8_0 file, whose query and key rows mixtral's converter permutes."""
    directory, gguf = checkpoint("mixtral"), converter.gguf
    rows = find_rows(converter, directory)
    packed = {}
    for name, found in rows.maps.items():
        if not name.startswith("blk.") or len(found.shape) < 2 or "ffn_gate_inp" in name:
            continue
        lines = {source: _q8_0(gguf, stored_tensors(directory)[source].load()) for source in found.sources}
        packed[name] = GgufData("Q8_0", found.shape, lambda found=found, lines=lines: found.gather(lines).numpy())
    assert len(packed) == 14
    write_gguf(gguf, tmp_path / "ours.gguf", converter.prepare(directory, pre=PRE, file_type="MOSTLY_Q8_0"), packed)
    write_gguf(gguf, tmp_path / "theirs.gguf", converter.prepare(directory, pre=PRE, file_type="MOSTLY_Q8_0"), {})
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    model, missing = with_file_weights(converter, directory, tmp_path / "ours.gguf", rows, _directory(tmp_path / "twin"))
    assert missing == {}
    logits = llama_logits(tmp_path / "ours.gguf", token_windows(), library)
    wanted = transformers_logits(model, token_windows())
    # llama.cpp rounds the inputs of Q8_0 products to 8 bits, too, which also sends some tokens to other experts.
    assert float((logits - wanted).norm() / wanted.norm()) < 0.05


def _q8_0(gguf: Any, weights: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.quantize(weights.float().numpy(), gguf.GGMLQuantizationType.Q8_0))


def _directory(path: Path) -> Path:
    path.mkdir()
    return path


def test_shards_hold_the_same(converter: Converter, library: Path, checkpoint: Get, tmp_path: Path) -> None:
    directory, gguf = checkpoint("olmoe"), converter.gguf
    whole = write_gguf(gguf, tmp_path / "whole.gguf", converter.prepare(directory, pre=PRE), {})
    parts = write_gguf(gguf, tmp_path / "parts.gguf", converter.prepare(directory, pre=PRE), {}, shard_bytes=6 * 2**20)
    assert [file.name for file in whole] == ["whole.gguf"]
    assert [file.name for file in parts] == [f"parts-{i:05d}-of-{len(parts):05d}.gguf" for i in range(1, len(parts) + 1)]
    assert len(parts) > 2
    one, several = read_gguf(gguf, whole[0]), read_gguf(gguf, parts[0])
    assert list(one.tensors) == list(several.tensors)
    for name, tensor in one.tensors.items():
        assert np.array_equal(tensor.read(), several.tensors[name].read())
    assert torch.equal(llama_logits(parts[0], token_windows(1), library), llama_logits(whole[0], token_windows(1), library))
    with pytest.raises(BadInputError, match="give the first one"):
        read_gguf(gguf, parts[1])
    parts[1].unlink()
    with pytest.raises(BadInputError, match=r"shard parts-00002-of-.* is missing"):
        read_gguf(gguf, parts[0])


def test_the_same_arguments_give_the_same_bytes(converter: Converter, checkpoint: Get, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write_gguf(converter.gguf, tmp_path / name, converter.prepare(checkpoint("olmoe"), pre=PRE), {})
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_file_type_is_llama_cpps(converter: Converter, checkpoint: Get, tmp_path: Path) -> None:
    prepared = converter.prepare(checkpoint("olmoe"), pre=PRE, file_type="MOSTLY_Q8_0")
    write_gguf(converter.gguf, tmp_path / "x.gguf", prepared, {})
    found = read_gguf(converter.gguf, tmp_path / "x.gguf")
    assert found.metadata["general.file_type"] == 7
    assert found.metadata["general.quantization_version"] == 2
    assert found.architecture == "olmoe"
    assert found.size_bytes == (tmp_path / "x.gguf").stat().st_size
    assert 8.5 < found.bits_per_weight < 8.6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"type": "Q9_Z"}, "has no type Q9_Z"),
        ({"shape": (8, 256, 128)}, "converter writes"),
        ({"load": lambda: np.zeros(3, dtype=np.float32)}, "12 bytes for F32"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    converter: Converter, checkpoint: Get, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    prepared = converter.prepare(checkpoint("olmoe"), pre=PRE)
    name = "blk.0.ffn_up_exps.weight"
    with pytest.raises(BadInputError, match=said):
        write_gguf(converter.gguf, tmp_path / "x.gguf", prepared, {name: replace(prepared.tensors[name], **change)})  # type: ignore[arg-type]


def test_rows_that_blocks_do_not_divide_are_refused(converter: Converter, checkpoint: Get, tmp_path: Path) -> None:
    prepared = converter.prepare(checkpoint("deepseek_v3"), pre=PRE)
    name = "blk.0.attn_kv_a_norm.weight"
    with pytest.raises(BadInputError, match="rows of 32 weights cannot be Q4_K, whose blocks have 256"):
        write_gguf(converter.gguf, tmp_path / "x.gguf", prepared, {name: replace(prepared.tensors[name], type="Q4_K")})


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_file_gives_the_checkpoint_back(converter: Converter, checkpoint: Get, tmp_path: Path, name: str) -> None:
    directory, gguf = checkpoint(name), converter.gguf
    rows = write_plain(converter, directory, tmp_path / "x.gguf")
    stored = stored_tensors(directory)
    restored = restore(gguf, read_gguf(gguf, tmp_path / "x.gguf"), rows, {key: tensor.spec for key, tensor in stored.items()})
    assert set(restored.tensors) | set(restored.missing) == set(stored)
    assert {key.rsplit(".", 2)[1] for key in restored.missing} <= {"kv_b_proj", "experts"}  # experts: gpt_oss's interleaved biases
    for key, tensor in restored.tensors.items():
        assert torch.equal(tensor.load(), stored[key].load().float()), key


def test_another_models_file_is_refused(converter: Converter, checkpoint: Get, tmp_path: Path) -> None:
    write_plain(converter, checkpoint("gpt_oss"), tmp_path / "x.gguf")
    specs = {key: tensor.spec for key, tensor in stored_tensors(checkpoint("mixtral")).items()}
    with pytest.raises(BadInputError, match="another model"):
        restore(converter.gguf, read_gguf(converter.gguf, tmp_path / "x.gguf"), find_rows(converter, checkpoint("mixtral")), specs)


def test_damage_is_one_sentence(converter: Converter, library: Path, checkpoint: Get, tmp_path: Path) -> None:
    write_gguf(converter.gguf, tmp_path / "x.gguf", converter.prepare(checkpoint("olmoe"), pre=PRE), {})
    raw = (tmp_path / "x.gguf").read_bytes()
    counts = raw[:8] + b"\xff" * 8 + raw[16:]
    keys = raw[:24] + b"\xff" * 64 + raw[88:]
    for content in (b"", b"PK" + raw[2:], raw[:100], raw[:3000], raw[:-1000], counts, keys):
        (tmp_path / "broken.gguf").write_bytes(content)
        with pytest.raises(BadInputError) as caught:
            read_gguf(converter.gguf, tmp_path / "broken.gguf")
        assert "\n" not in str(caught.value)
        with (
            pytest.raises(BadInputError, match=r"llama\.cpp (cannot load|gave up on) this file"),
            open_llama(tmp_path / "broken.gguf", 8, library=library),
        ):
            pass
    with pytest.raises(BadInputError, match="cannot be read"):
        read_gguf(converter.gguf, tmp_path / "nowhere.gguf")


def test_every_row_can_be_read_by_itself(converter: Converter, checkpoint: Get, tmp_path: Path) -> None:
    write_gguf(converter.gguf, tmp_path / "x.gguf", converter.prepare(checkpoint("olmoe"), pre=PRE, file_type="MOSTLY_Q8_0"), {})
    tensor = read_gguf(converter.gguf, tmp_path / "x.gguf").tensors["blk.1.ffn_down_exps.weight"]
    whole = dequantized(converter.gguf, tensor)
    assert torch.equal(dequantized(converter.gguf, tensor, 300, 302), whole[300:302])
    weights = [stored_tensors(checkpoint("olmoe"))[f"model.layers.1.mlp.experts.{e}.down_proj.weight"].load() for e in range(8)]
    assert float((whole - torch.cat(weights).float()).abs().max()) < 2e-3


def test_tokens_are_compared(converter: Converter, library: Path, checkpoint: Get, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("olmoe"))
    for pre, same in ((PRE, True), ("qwen2", False)):  # qwen2 splits numbers into digits
        write_gguf(converter.gguf, tmp_path / "x.gguf", converter.prepare(checkpoint("olmoe"), pre=pre), {})
        with open_llama(tmp_path / "x.gguf", 8, library=library) as llama:
            found = token_difference(llama, tokenizer, [*TEXTS, "one  12345 six"])
        assert (found is None) == same
    assert found is not None
    assert "llama.cpp splits" in str(found)


def test_windows_that_do_not_fit_are_refused(converter: Converter, library: Path, checkpoint: Get, tmp_path: Path) -> None:
    write_gguf(converter.gguf, tmp_path / "x.gguf", converter.prepare(checkpoint("olmoe"), pre=PRE), {})
    with open_llama(tmp_path / "x.gguf", 8, library=library) as llama:
        with pytest.raises(BadInputError, match="9 tokens; this context holds 1 to 8"):
            llama.logits(list(range(9)))
        with pytest.raises(BadInputError, match="token 320 is not one of"):
            llama.logits([320])
        assert torch.equal(llama.logits([1, 2, 3]), llama.logits([1, 2, 3]))  # nothing of the window before is left


def test_llama_cpp_may_end_its_process(converter: Converter, library: Path, checkpoint: Get, tmp_path: Path) -> None:
    """A sigmoid router without the key that says so makes llama.cpp abort for this architecture."""
    prepared = converter.prepare(checkpoint("minimax_m2"), pre=PRE)
    del prepared.metadata["minimax-m2.expert_gating_func"]
    write_gguf(converter.gguf, tmp_path / "x.gguf", prepared, {})
    with pytest.raises(BadInputError, match="ended its process"), open_llama(tmp_path / "x.gguf", 8, library=library):
        pass


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].fails])
def test_architectures(converter: Converter, library: Path, checkpoint: Get, tmp_path: Path, name: str) -> None:
    """Logits of an F32 file in llama.cpp are transformers'; `make gguf-architectures` says more."""
    write_plain(converter, checkpoint(name), tmp_path / "x.gguf")
    wanted = transformers_logits(loaded(checkpoint(name)), token_windows())
    assert float((llama_logits(tmp_path / "x.gguf", token_windows(), library) - wanted).abs().max()) < 2e-4
