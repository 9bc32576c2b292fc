"""Which device the work is done on: checked once, and then the place where new tensors are made."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from moebit.errors import BadInputError


def checked_device(name: str) -> torch.device:
    """The device that a user asks for: `cpu`, `cuda:N`, or `cuda`: the first one, and under torchrun each rank's own.

    Raises:
        BadInputError: no such name, or no such device on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise BadInputError(f"--device {name}: give cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BadInputError(f"--device {name}: this torch sees no CUDA device; use --device cpu")
    number = device.index if ":" in name else int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise BadInputError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices, numbered from 0")
    return torch.device("cuda", number)


def made_on(device: torch.device) -> AbstractContextManager[object]:
    """Tensors that are made inside this context lie on the device, where nothing else is said.

    What reads a file says so: it reads into the host's memory, and its reader moves the tensor (`storage/edits.py`).
    """
    return nullcontext() if device.type == "cpu" else device


def here(tensor: Tensor) -> Tensor:
    """Return the tensor where new tensors are made: random numbers are drawn on the host, so that they are the same for every device."""
    return tensor.to(torch.get_default_device())
