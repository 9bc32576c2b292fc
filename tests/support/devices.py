"""Where Triton's kernels are tested: on a CUDA device, or without one in Triton's interpreter (tests/conftest.py switches it on)."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

INSTALLED = importlib.util.find_spec("triton") is not None
CUDA = torch.cuda.is_available()
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
_WHY = "Triton compiles here instead of interpreting" if INSTALLED else "Triton is not installed"

interpreter = pytest.mark.skipif(not INTERPRETED, reason=_WHY)
cuda = pytest.mark.skipif(not (CUDA and INSTALLED and not INTERPRETED), reason="no CUDA device, or no Triton that compiles for it")
on_devices = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreter, id="interpreter"), pytest.param("cuda", marks=cuda, id="cuda")]
)
