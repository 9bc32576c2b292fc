"""What an importance matrix covers, and what stands in where it had nothing to look at."""

from __future__ import annotations

from typing import Any

from moebit.cli.terminal import bold, say, warning


def show_imatrix(result: Any) -> None:
    say(bold(result.path), f": {result.tensors} tensors from {result.tokens:,} tokens")
    rare = [tokens for experts in result.filled.values() for tokens in experts.values()]
    if rare:
        told = f"{len(rare)} experts of {len(result.filled)} layers got fewer than {result.enough} tokens ({rare.count(0)} got none); "
        say(warning(told + "tokens that nearly went to them stand in for the rest"))
    if result.unweighted:
        say(warning(f"in {len(result.unweighted)} of these layers all tokens count alike instead, because the router is not recognised"))
    for name, why in result.missing.items():
        say(warning(f"{name} has no importance in the file: {why}"))
