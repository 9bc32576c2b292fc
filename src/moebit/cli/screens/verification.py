"""Whether an output is whole."""

from __future__ import annotations

from typing import Any

from moebit.cli.terminal import bold, row, say, show, styled, text_table
from moebit.words import size

SHOWN_FINDINGS = 30


def show_verification(result: dict[str, Any]) -> None:
    findings = result["findings"]
    state = styled(result["state"], "red" if findings else "green")
    say(bold(result["output"]), ": ", state, f", {result['files']} files, {result['tensors']} tensors, {size(result['bytes'])}")
    if "durable" in result:
        durable = result["durable"]
        of = f" of {durable['of']}" if durable["of"] is not None else ""
        rest = ", and the rest of the model" if durable["rest"] else ""
        say(f"durable so far: {durable['layers']}{of} layers{rest}; the same `moebit quantize` with --resume goes on from there")
    if findings:
        listed = text_table("where", "what", "remedy")
        for finding in findings[:SHOWN_FINDINGS]:
            row(listed, *(finding[key] for key in ("where", "what", "remedy")))
        show(listed)
    if len(findings) > SHOWN_FINDINGS:
        say(f"and {len(findings) - SHOWN_FINDINGS} more (--json has them all)")
