"""Which presets an engine runs, of a usual model."""

from __future__ import annotations

import pytest

from moebit.errors import BadInputError
from moebit.plan.typical import recipes_for


def test_recipes_by_engine() -> None:
    vllm, plain, llama = recipes_for("vllm"), recipes_for("transformers"), recipes_for("llama.cpp")
    assert {vllm[name] for name in ("gptq-w4", "nvfp4", "fp8", "fp8-block", "gptq-w8")} == {"compressed-tensors"}
    assert not vllm.keys() & {"moequant-w3", "eaquant-w4a4", "moqa-3bit", "gguf-q4_k_m", "mlx-w4"}
    assert plain["eaquant-w4a4"] == "native"
    assert "nvfp4" not in plain
    assert set(llama) == {"gguf-q4_k_m", "gguf-q3_k_m", "gguf-q2_k", "gguf-iq4_xs"}
    assert recipes_for("mlx")["mlx-w4"] == "mlx"
    with pytest.raises(BadInputError, match="--engine nothing: choose one of"):
        recipes_for("nothing")
