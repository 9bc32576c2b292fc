"""A limit on the time that a chat template, a program that comes with a checkpoint, may take."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

TEMPLATE_SECONDS = 5.0  # for one conversation; a template takes milliseconds


class TooSlowError(Exception):
    """The time is over."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Python code that runs inside, a template compiled to Python included, ends after so many seconds.

    Every line that it runs looks at the clock, so it works in every thread and without signals; a single call into a library written in
    another language is not interrupted.

    Raises:
        TooSlowError: the time is over.
    """
    end, before = time.monotonic() + seconds, sys.gettrace()

    def look(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise TooSlowError(f"not done after {seconds:.0f} s")
        return look

    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)
