"""The two ways in which work stops that are not a bug: the input is bad, or the work was interrupted."""

from __future__ import annotations


class MoebitError(Exception):
    """Base of everything moebit raises on purpose."""


class BadInputError(MoebitError):
    """The input cannot be used as asked (exit code 2). The message names the thing and the remedy."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the machine or of a device, in the words of Python or of torch."""
    words = ("not enough memory", "out of memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words))


class InterruptedWorkError(MoebitError):
    """The work stopped before its end and can be resumed (exit code 3)."""
