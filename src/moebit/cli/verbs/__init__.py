"""The verbs, each with its options, in the order in which the help lists them."""

from __future__ import annotations

from typing import Any

from moebit.cli.root import app
from moebit.cli.verbs import evaluate, frontier, generate, imatrix, inspect, profiling, prune, quantize, recipes, report, sample, verify

VERBS = (
    (inspect.inspect, inspect.EXAMPLES),
    (quantize.quantize, quantize.EXAMPLES),
    (evaluate.evaluate, evaluate.EXAMPLES),
    (generate.generate, generate.EXAMPLES),
    (recipes.recipes, recipes.EXAMPLES),
    (sample.sample, sample.EXAMPLES),
    (verify.verify, verify.EXAMPLES),
    (profiling.profile, profiling.PROFILE_EXAMPLES),
    (profiling.allocate, profiling.ALLOCATE_EXAMPLES),
    (profiling.adapt, profiling.ADAPT_EXAMPLES),
    (profiling.drift, profiling.DRIFT_EXAMPLES),
    (frontier.frontier, frontier.EXAMPLES),
    (imatrix.imatrix, imatrix.EXAMPLES),
    (prune.prune, prune.EXAMPLES),
    (report.report, report.EXAMPLES),
    (evaluate.compare, evaluate.COMPARE_EXAMPLES),
)


def register_verbs() -> None:
    for verb, examples in VERBS:
        command: Any = app.command(epilog="Examples:\n\n  " + "\n\n  ".join(examples))
        command(verb)
