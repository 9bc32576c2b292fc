"""moebit quantizes Mixture-of-Experts language models after training.

Importing it registers the `moebit` quantizer and experts implementation with transformers, so that native outputs load with
`from_pretrained`: the one import side effect. Everything else is imported when it is first used, because torch and transformers take
seconds to load.
"""

import importlib
from typing import TYPE_CHECKING, Any

# These packages have the names of functions below. A submodule import sets its package's name here when the package is loaded for the
# first time, which would hide the function; so the (light) packages are loaded now and their names are taken away again.
import moebit.evaluate
import moebit.quantize
import moebit.report
from moebit.registration import register_with_transformers

if TYPE_CHECKING:
    from moebit.calibration.sampling import sample
    from moebit.errors import BadInputError, InterruptedWorkError, MoebitError
    from moebit.evaluate.streaming import evaluate
    from moebit.formats.verify import verify
    from moebit.plan.typical import recipes_for
    from moebit.profiling.adapt import Adaptation, adapt
    from moebit.profiling.allocate import Allocation, allocate
    from moebit.profiling.imatrix import ImatrixResult, imatrix
    from moebit.profiling.profile import profile
    from moebit.profiling.usage import drift
    from moebit.quantize.frontier import Frontier, frontier
    from moebit.quantize.inspect import inspect
    from moebit.quantize.main import quantize
    from moebit.quantize.prune import Pruned, prune
    from moebit.quantize.report import Result
    from moebit.recipe import Recipe, load_recipe, presets
    from moebit.report.compare import compare
    from moebit.report.heatmaps import heatmaps
    from moebit.report.page import report
    from moebit.runtime.generate import Generated, Generation, generate
else:
    del evaluate, moebit, quantize, report

__all__ = [
    "Adaptation",
    "Allocation",
    "BadInputError",
    "Frontier",
    "Generated",
    "Generation",
    "ImatrixResult",
    "InterruptedWorkError",
    "MoebitError",
    "Pruned",
    "Recipe",
    "Result",
    "adapt",
    "allocate",
    "compare",
    "drift",
    "evaluate",
    "frontier",
    "generate",
    "heatmaps",
    "imatrix",
    "inspect",
    "load_recipe",
    "presets",
    "profile",
    "prune",
    "quantize",
    "recipes_for",
    "report",
    "sample",
    "verify",
]

_HOMES = {
    "calibration.sampling": ("sample",),
    "errors": ("BadInputError", "InterruptedWorkError", "MoebitError"),
    "evaluate.streaming": ("evaluate",),
    "formats.verify": ("verify",),
    "plan.typical": ("recipes_for",),
    "profiling.adapt": ("Adaptation", "adapt"),
    "profiling.allocate": ("Allocation", "allocate"),
    "profiling.imatrix": ("ImatrixResult", "imatrix"),
    "profiling.profile": ("profile",),
    "profiling.usage": ("drift",),
    "quantize.frontier": ("Frontier", "frontier"),
    "quantize.inspect": ("inspect",),
    "quantize.main": ("quantize",),
    "quantize.prune": ("Pruned", "prune"),
    "quantize.report": ("Result",),
    "recipe": ("Recipe", "load_recipe", "presets"),
    "report.compare": ("compare",),
    "report.heatmaps": ("heatmaps",),
    "report.page": ("report",),
    "runtime.generate": ("Generated", "Generation", "generate"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("moebit")
    elif name in _HOME_OF:
        value = getattr(importlib.import_module(f"moebit.{_HOME_OF[name]}"), name)
    else:
        raise AttributeError(f"module 'moebit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


register_with_transformers()
