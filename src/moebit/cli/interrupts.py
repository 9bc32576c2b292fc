"""Ctrl-C ends the work, also when it comes where Python cannot pass it on (in a finalizer, in a callback of a library)."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """Remembers a Ctrl-C inside its context, for `check` to raise again.

    Python prints an exception that is raised in a finalizer or in some callbacks, and goes on; that of a Ctrl-C is lost there.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Between two pieces of work.

        Raises:
            KeyboardInterrupt: it was asked for, and the work went on all the same.
        """
        if self.asked:
            raise KeyboardInterrupt
