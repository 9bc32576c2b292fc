"""The one place where tests look into a run: moebit raises audit events (docs/events.md), and this listens to them.

Nothing in moebit is replaced. An audit hook cannot be taken away again, so that there is one for the whole test process, which hands
events on to whoever listens at the moment.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_listeners: list[Callable[[str, tuple[Any, ...]], None]] = []


def _tell(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith("moebit."):
        for listener in list(_listeners):
            listener(event, arguments)


sys.addaudithook(_tell)


class PowerCut(Exception):
    """What a test raises in the middle of a run."""


@contextmanager
def listening(event: str, listener: Callable[..., None]) -> Iterator[None]:
    """Calls the listener with the arguments of every event of this name. What it raises, the run gets where the event is."""

    def call(name: str, arguments: tuple[Any, ...]) -> None:
        if name == event:
            listener(*arguments)

    _listeners.append(call)
    try:
        yield
    finally:
        _listeners.remove(call)


@contextmanager
def observed(event: str, kept: Callable[..., Any] = lambda *arguments: arguments) -> Iterator[list[Any]]:
    """What `kept` makes of the arguments of every event of this name, in order; tensors that change later have to be copied by it."""
    found: list[Any] = []
    with listening(event, lambda *arguments: found.append(kept(*arguments))):
        yield found


@contextmanager
def stopped(event: str, error: BaseException, when: Callable[..., bool] = lambda *arguments: True, nth: int = 1) -> Iterator[None]:
    """Raises `error` at the nth event of this name whose arguments satisfy `when`, and at all that follow."""
    count = 0

    def stop(*arguments: Any) -> None:
        nonlocal count
        count += bool(when(*arguments))
        if count >= nth and when(*arguments):
            raise error

    with listening(event, stop):
        yield
