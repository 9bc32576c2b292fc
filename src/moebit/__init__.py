"""moebit quantizes Mixture-of-Experts language models after training.

Importing it registers the `moebit` quantizer and experts implementation with transformers, so that native outputs load with
`from_pretrained`: the one import side effect.
"""

from importlib.metadata import version

import moebit.runtime as _runtime  # noqa: F401 - the registration
from moebit.errors import BadInputError, InterruptedWorkError, MoebitError
from moebit.evaluate import evaluate
from moebit.formats.verify import verify
from moebit.pipeline import Result, inspect, quantize
from moebit.recipe import Recipe, load_recipe, presets
from moebit.report import compare, report
from moebit.runtime.generate import Generated, Generation, generate

__version__ = version("moebit")
__all__ = [
    "BadInputError",
    "Generated",
    "Generation",
    "InterruptedWorkError",
    "MoebitError",
    "Recipe",
    "Result",
    "compare",
    "evaluate",
    "generate",
    "inspect",
    "load_recipe",
    "presets",
    "quantize",
    "report",
    "verify",
]
