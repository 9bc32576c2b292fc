"""Every architecture once, with moebit's view of its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from moebit.model.structure import Structure
from moebit.storage.checkpoint import Checkpoint
from moebit.storage.hub import HubWeights
from tests.support.models import Architecture, Reference


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
