"""The two ways in which work stops that are not a bug: the input is bad, or the work was interrupted."""

from __future__ import annotations


class MoebitError(Exception):
    """Base of everything moebit raises on purpose."""


class BadInputError(MoebitError):
    """The input cannot be used as asked (exit code 2). The message names the thing and the remedy."""


class InterruptedWorkError(MoebitError):
    """The work stopped before its end and can be resumed (exit code 3)."""
