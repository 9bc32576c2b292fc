"""Fixtures that every room of tests may use."""

from __future__ import annotations

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side: one thread each, set before torch and numba look
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():  # Triton's kernels are interpreted, which it decides when it is first imported, maybe by transformers
    os.environ["TRITON_INTERPRET"] = "1"

from moebit.model.opening import open_hub_checkpoint
from moebit.model.structure import find_structure
from moebit.storage.hub import HubWeights
from tests.support.models import ARCHITECTURES, Architecture, Checkpoints
from tests.support.opened import Opened
from tests.support.outputs import Outputs

SLOW = Path(__file__).with_name("slow_tests.txt")  # tests, by their names, that are left to `make test-all` because others like them stay
WHOLE = 4000  # so many tests are collected only where all are


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the listed tests as slow, and put the longest first: while it runs alone, nothing else is left to do."""
    listed = set(SLOW.read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)
    gone = listed - {item.nodeid for item in items}
    if gone and len(items) > WHOLE:
        raise pytest.UsageError(f"{SLOW.name} names tests that are not there: {', '.join(sorted(gone))}")
    items.sort(key=lambda item: "test_every_command_and_python_block_runs" not in item.nodeid)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """The tiny checkpoints of tests/support/models.py, each built once for the whole session."""
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory, checkpoints: Checkpoints) -> Outputs:
    """The same, quantized (tests/support/outputs.py)."""
    return Outputs(tmp_path_factory.mktemp("outputs"), checkpoints)


_opened: dict[str, Opened] = {}


# Others that are tried every time have what is special about these.
ALIKE = {"qwen3_moe", "olmoe", "deepseek_v2", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe", "nemotron_h"}
EVERY = [pytest.param(a, marks=pytest.mark.slow) if a.name in ALIKE else a for a in ARCHITECTURES.values()]


@pytest.fixture(params=EVERY, ids=str)
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
