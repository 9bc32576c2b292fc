"""moebit quantizes Mixture-of-Experts language models after training.

Importing it registers the `moebit` quantizer and experts implementation with transformers, so that native outputs load with
`from_pretrained`: the one import side effect.
"""

from importlib.metadata import version

import moebit.runtime as _runtime  # noqa: F401 - the registration
from moebit.calibration.sampling import sample
from moebit.errors import BadInputError, InterruptedWorkError, MoebitError
from moebit.evaluate import evaluate
from moebit.formats.verify import verify
from moebit.profiling.adapt import Adaptation, adapt
from moebit.profiling.allocate import Allocation, allocate
from moebit.profiling.profile import profile
from moebit.profiling.usage import drift
from moebit.quantize.inspect import inspect
from moebit.quantize.main import quantize
from moebit.quantize.report import Result
from moebit.recipe import Recipe, load_recipe, presets
from moebit.report import compare, report
from moebit.report.heatmaps import heatmaps
from moebit.runtime.generate import Generated, Generation, generate

__version__ = version("moebit")
__all__ = [
    "Adaptation",
    "Allocation",
    "BadInputError",
    "Generated",
    "Generation",
    "InterruptedWorkError",
    "MoebitError",
    "Recipe",
    "Result",
    "adapt",
    "allocate",
    "compare",
    "drift",
    "evaluate",
    "generate",
    "heatmaps",
    "inspect",
    "load_recipe",
    "presets",
    "profile",
    "quantize",
    "report",
    "sample",
    "verify",
]
