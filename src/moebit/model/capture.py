"""What goes into modules and comes out of them: the one place where hooks are registered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        name: of the module, as the observer named it.
        output: what it returned; None where the call is seen before it runs.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None

    @property
    def tensors(self) -> list[Tensor]:
        """The arguments that are tensors, in the order in which they were given."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]

    @property
    def rows(self) -> Tensor:
        """[rows, channels] the first tensor that was given, as a matrix."""
        x = self.tensors[0]
        return x.reshape(-1, x.shape[-1])


@contextmanager
def observed(
    modules: Mapping[str, nn.Module], note: Callable[[Call], None], *, outputs: bool = False, first: bool = False
) -> Iterator[None]:
    """Call `note` whenever one of the modules is called inside this context.

    Args:
        modules: by the name that `Call.name` will have.
        outputs: call it behind the module, with its output, instead of before it.
        first: call it before whatever else stands in front of the module, so that it sees the input as the model gave it.
    """
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(_register(name, module, note, outputs, first).remove)
        yield


def _register(name: str, module: nn.Module, note: Callable[[Call], None], outputs: bool, first: bool) -> RemovableHandle:
    def before(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(Call(name, owner, args, kwargs))

    def behind(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        note(Call(name, owner, args, kwargs, output))

    if outputs:
        return module.register_forward_hook(behind, with_kwargs=True, prepend=first)
    return module.register_forward_pre_hook(before, with_kwargs=True, prepend=first)


def put_in_front(module: nn.Module, step: Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]) -> RemovableHandle:
    """Run `step(module, arguments)` before every call of a module from now on, until the handle that is returned is removed.

    What the step returns takes the arguments' place; None leaves them as they are.
    """
    return module.register_forward_pre_hook(step)
