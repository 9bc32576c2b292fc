"""A device for tests that have none: tensors over CPU data that say `cuda:0`, run every operation on the CPU, and are strict.

Between an operation and its data nothing changes, so results have the CPU's bytes. What a CUDA device would refuse fails here, and so does
what it would do silently and slowly:

- an operation on tensors of both devices (numbers, tensors without dimensions, are allowed as on CUDA);
- a copy between devices that nobody asked for (`host[...] = device`, `host.copy_(device)`), and a large one that was asked for anywhere but
  where files are written;
- `Tensor.numpy`, which is how a tensor reaches a kernel that is compiled for CPUs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._device import _device_constructors

import moebit
from moebit.tensor import solver
from moebit.tensor.grids import ggml_moments, uniform

DEVICE = torch.device("cuda", 0)
FEW = 4096  # elements that may go to the host from anywhere: bounds, counts, numbers for a report
# Where tensors go to the host on purpose: to be written, to be drawn from with a generator of the host, to be read as token ids.
TO_HOST = {"storage/files.py", "profiling/sensitivity.py", "model/embeddings.py", "calibration/sampling.py", "calibration/beam.py"}
_MOVES = {"to", "cpu", "cuda", "type"}
_INTO = {"copy_", "__setitem__", "fill_"}
_PACKAGE = str(Path(moebit.__file__).parent) + "/"


class DeviceError(RuntimeError):
    """What a device would refuse, or would do at a price that nobody sees."""


class Labelled(Tensor):
    """CPU data that says it lies on a device. Operations go through `LabelledDevice`, which must be active."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class LabelledDevice(TorchFunctionMode):
    """Everything that torch is asked to do while this is active is looked at, factories included."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def is_labelled(value: object) -> bool:
    return isinstance(value, Labelled)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _is_device(value: object) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda", "meta"))


def _asked(args: Any, kwargs: dict[str, Any]) -> torch.device | None:
    """The device that a call names, as an argument or as its keyword."""
    named = [value for value in (kwargs.get("device"), *args[1:]) if value is not None and _is_device(value)]
    return torch.device(named[0]) if named else None


def _on_host(value: Any) -> Any:
    """A call's arguments with the host in the place of the device."""
    if _is_device(value):
        return torch.device("cpu") if torch.device(value).type == "cuda" else value
    if isinstance(value, tuple):
        items = [_on_host(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def _labelled(value: Any) -> Any:
    """A result, said to lie on the device."""
    if isinstance(value, Tensor):
        if isinstance(value, Labelled) or value.device.type == "meta":
            return value
        with torch._C.DisableTorchFunctionSubclass():
            parameter = isinstance(value, nn.Parameter)
            result = value.as_subclass(Labelled)
            if parameter:
                result._is_param = True  # type: ignore[attr-defined]
            return result
    if isinstance(value, tuple):
        items = [_labelled(item) for item in value]
        if type(value) is tuple:
            return tuple(items)
        return type(value)(items) if not hasattr(value, "_fields") else type(value)(*items)  # torch.return_types, or a named tuple
    if isinstance(value, list):
        return [_labelled(item) for item in value]
    return value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is torch.device:
        return func(*args, **kwargs)
    name = getattr(func, "__name__", "")
    owner = args[0] if args else None
    if name == "__get__" and isinstance(owner, Labelled):
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return DEVICE
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func == Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return False
    tensors = list(_tensors(args)) + list(_tensors(kwargs))
    ours = [t for t in tensors if isinstance(t, Labelled)]
    if name == "numpy" and ours:
        raise DeviceError("Tensor.numpy of a device tensor: a kernel for CPUs was reached")
    if name == "tolist" and ours and ours[0].nelement() > FEW:
        raise DeviceError(f"{ours[0].nelement()} elements of a device tensor go to the host as a list")
    asked = _asked(args, kwargs)
    if asked is None and func in _device_constructors():  # what is made where nobody says: on the device of the context around
        asked = torch.get_default_device()
        kwargs = {**kwargs, "device": asked}
    if name in _MOVES and isinstance(owner, Tensor):
        return _move(func, name, owner, args, kwargs, asked)
    _check(func, name, tensors, ours)
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*[_on_host(a) for a in args], **{key: _on_host(value) for key, value in kwargs.items()})
    there = asked.type == "cuda" if asked is not None else bool(ours)
    return _labelled(result) if there else result


def _check(func: Any, name: str, tensors: list[Tensor], ours: list[Labelled]) -> None:
    """No operation between devices, and no copy that nobody asked for."""
    if not ours or name == "__get__" or len(tensors) == len(ours):
        return
    with torch._C.DisableTorchFunctionSubclass():
        host = [t for t in tensors if not isinstance(t, Labelled) and t.ndim and t.device.type == "cpu"]
        if not host and not (name in _INTO and not isinstance(tensors[0], Labelled)):
            return
    what = resolve_name(func) or name
    if name in _INTO:
        raise DeviceError(f"{what} copies between the device and the host, and nobody asked for it")
    raise DeviceError(f"{what} of tensors on cuda:0 {[tuple(t.shape) for t in ours]} and on cpu {[tuple(t.shape) for t in host]}")


def _move(func: Any, name: str, owner: Tensor, args: Any, kwargs: dict[str, Any], asked: torch.device | None) -> Any:
    """`to`, `cpu` and their like: between devices always a copy, as on a real one."""
    other = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else kwargs.get("other")
    if name == "cpu":
        asked = torch.device("cpu")
    elif name == "cuda":
        asked = DEVICE
    elif isinstance(other, Tensor):
        asked = DEVICE if isinstance(other, Labelled) else torch.device("cpu")
    here, there = isinstance(owner, Labelled), isinstance(owner, Labelled) if asked is None else asked.type == "cuda"
    if here and not there and (asked is None or asked.type != "meta"):
        _check_caller(owner)
    with torch._C.DisableTorchFunctionSubclass():
        if name == "cuda":
            result = owner
        else:
            result = func(*[_on_host(a) for a in args], **{key: _on_host(value) for key, value in kwargs.items()})
        if here != there and result.device.type != "meta":
            result = result.as_subclass(Tensor).clone()
    return _labelled(result) if there else result


def _check_caller(tensor: Tensor) -> None:
    """A large copy to the host is made only where tensors are written, or where it is said why."""
    if tensor.nelement() <= FEW:
        return
    frame: Any = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    place = frame.f_code.co_filename.removeprefix(_PACKAGE) if frame is not None else ""
    if place and place not in TO_HOST:
        raise DeviceError(f"{place}:{frame.f_lineno}: {tensor.nelement()} elements of a device tensor are copied to the host")


def use_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on any device in the place of kernels that are compiled for CPUs or for CUDA."""
    monkeypatch.setattr(solver, "backend_of", lambda device: "torch")
    monkeypatch.setattr(uniform.kernels, "best_grid", uniform._best_grid)
    monkeypatch.setattr(ggml_moments, "moments", ggml_moments.moments_torch)


@contextmanager
def labelled_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside this context there is one device, `cuda:0`, and moebit takes it for a real one."""
    use_plain_torch(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with LabelledDevice():
        yield
