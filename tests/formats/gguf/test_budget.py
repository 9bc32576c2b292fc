"""`--size` with types by layer and projection: the file has the size that was asked for, and the types that were chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moebit
from moebit.errors import BadInputError
from moebit.formats.gguf.converter import Converter
from moebit.formats.gguf.read import read_gguf
from moebit.plan.plan import Plan
from tests.support.gguf import PRE, llama_logits, token_windows

RECIPE: dict[str, Any] = {"weights": {"type": "q4_k"}, "solver": {"method": "rtn"}, "format": "gguf"}
GRID: dict[str, Any] = {"weights": {"bits": 4, "group_size": 64}, "solver": {"method": "rtn"}}


@pytest.mark.slow
def test_types_by_tensor_meet_a_size(converter: Converter, library: Path, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = checkpoint("olmoe")
    file = tmp_path / "t.txt"
    file.write_text("the quick brown fox and the other thing one two three four five " * 60)
    options: dict[str, Any] = {"recipe": RECIPE, "text": {"t": file}, "engine": "llama.cpp", "gguf_pre": PRE}
    profile = moebit.profile(path, tmp_path / "p", text={"t": file}, recipe=GRID, samples=4, length=24)
    options |= {"profile": profile.path}
    plan = moebit.quantize(path, tmp_path / "x", size="2MB", dry_run=True, **options)
    assert isinstance(plan, Plan)
    assert plan.spent is not None
    for share in (0.1, 0.5, 0.9):
        size = int(plan.spent["smallest_bytes"] * (1 - share) + plan.spent["largest_bytes"] * share)
        out = tmp_path / f"o{share}"
        result = moebit.quantize(path, out, size=size, **options)
        assert isinstance(result, moebit.Result)
        made = out / f"{out.name}.gguf"
        assert 0.995 * size <= made.stat().st_size <= size
        assert result.plan.gguf is not None
        stored = read_gguf(converter.gguf, made).tensors
        assert {name: stored[name].type.lower() for name in result.plan.gguf.types} == dict(result.plan.gguf.types)
        assert len(set(result.plan.gguf.types.values())) > 1
    assert llama_logits(made, token_windows(1), library).isfinite().all()
    with pytest.raises(BadInputError, match="smallest output"):
        moebit.quantize(path, tmp_path / "x", size=100_000, dry_run=True, **options)
