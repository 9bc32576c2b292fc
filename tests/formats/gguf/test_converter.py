"""llama.cpp's converter: found, asked without running a checkpoint's code, and beside another `gguf` in the same process."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moebit.errors import BadInputError
from moebit.formats.gguf.converter import Converter, find_converter
from tests.support.gguf import PRE

Get = Callable[[str], Path]


def test_metadata_and_tensors_come_from_the_converter(converter: Converter, checkpoint: Get) -> None:
    prepared = converter.prepare(checkpoint("olmoe"), pre=PRE)
    assert prepared.architecture == "olmoe"
    assert prepared.metadata["olmoe.expert_count"].value == 8
    assert prepared.metadata["tokenizer.ggml.pre"].value == PRE
    assert prepared.metadata["general.name"].value == "Olmoe"  # from the directory's name, not from a temporary one
    assert prepared.tensors["blk.1.ffn_gate_exps.weight"].shape == (8, 256, 256)
    assert prepared.tensors["blk.1.ffn_norm.weight"].type == "F32"


def test_a_type_is_the_converters_own(converter: Converter, checkpoint: Get) -> None:
    prepared = converter.prepare(checkpoint("olmoe"), pre=PRE, file_type="MOSTLY_Q8_0")
    assert prepared.tensors["blk.1.ffn_gate_exps.weight"].type == "Q8_0"
    assert prepared.tensors["blk.1.ffn_gate_inp.weight"].type == "F32"
    assert prepared.tensors["blk.1.ffn_gate_exps.weight"].load().shape == (8, 256, 256 // 32 * 34)


def test_an_unknown_tokenizer_says_what_to_do(converter: Converter, checkpoint: Get) -> None:
    with pytest.raises(BadInputError, match="--gguf-pre NAME"):
        converter.prepare(checkpoint("olmoe"))
    with pytest.raises(BadInputError, match=r"knows no such pre-tokenizer; it knows .*gpt-2"):
        converter.check_pre_tokenizer("gpt2")
    converter.check_pre_tokenizer(PRE)


def test_an_unknown_architecture_is_refused(converter: Converter, checkpoint: Get, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint("olmoe"), tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["NobodysForCausalLM"]}))
    with pytest.raises(BadInputError, match=r"NobodysForCausalLM.*--llama-cpp DIR"):
        converter.prepare(copy, pre=PRE)


def test_no_code_of_the_checkpoint_runs(converter: Converter, checkpoint: Get, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint("qwen2_moe"), tmp_path / "copy")
    ran = tmp_path / "ran"
    (copy / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil: ...\n")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((copy / name).read_text())
        content["auto_map"] = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None], "AutoModelForCausalLM": "evil.Evil"}
        (copy / name).write_text(json.dumps(content))
    converter.prepare(copy, pre=PRE)
    assert not ran.exists()


def test_another_gguf_stays_what_it_was(converter: Converter, checkpoint: Get) -> None:
    gguf = pytest.importorskip("gguf")
    converter.prepare(checkpoint("olmoe"), pre=PRE)
    assert sys.modules["gguf"] is gguf
    assert converter.gguf is not gguf
    assert "conversion" not in sys.modules


def test_a_directory_without_a_converter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"there is no conversion/base\.py"):
        find_converter(tmp_path)
