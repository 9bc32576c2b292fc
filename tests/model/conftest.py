"""Every architecture once, with moebit's view of its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from moebit.model.checkpoint import Checkpoint, HubWeights, open_hub_checkpoint
from moebit.model.structure import Structure, find_structure
from tests.models import ARCHITECTURES, Architecture, Checkpoints, Reference


@dataclass(frozen=True, repr=False)
class Opened:
    """One architecture: as transformers sees it (`reference`) and as moebit sees it."""

    architecture: Architecture
    reference: Reference
    checkpoint: Checkpoint
    weights: HubWeights
    structure: Structure

    def __repr__(self) -> str:
        return f"Opened({self.architecture})"


_opened: dict[str, Opened] = {}


@pytest.fixture(params=ARCHITECTURES.values(), ids=str)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def opened(architecture: Architecture, checkpoints: Checkpoints) -> Opened:
    """Opened once in the session: every test leaves the skeleton as it was."""
    if architecture.name not in _opened:
        checkpoint = open_hub_checkpoint(checkpoints.path(architecture))
        assert isinstance(checkpoint.weights, HubWeights)
        reference = checkpoints.reference(architecture)
        _opened[architecture.name] = Opened(architecture, reference, checkpoint, checkpoint.weights, find_structure(checkpoint.model))
    return _opened[architecture.name]
