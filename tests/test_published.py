"""The models that people have, made small: every recipe family, native and compressed-tensors, every auto class, as logits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.published import PUBLISHED, RECIPES, ROUNDED, TOLERANCE, Published, trials

PLAIN = ("rtn-w4", "gptq-w4")  # that no model may refuse


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("published", PUBLISHED.values(), ids=lambda each: each.name)
def test_published(published: Published, tmp_path: Path) -> None:
    found = trials(published, tmp_path / "work")
    for name, tried in found.items():
        assert tried.refused or tried.difference is not None
        if tried.difference is not None:
            assert tried.difference <= (ROUNDED if name.startswith("eaquant") else TOLERANCE), (name, tried)
    assert not [name for name in PLAIN if found[name].refused], found


def test_there_are_enough() -> None:
    assert len(PUBLISHED) >= 26
    assert len({each.model_type for each in PUBLISHED.values()}) >= 26
    assert set(PLAIN) <= set(RECIPES)
