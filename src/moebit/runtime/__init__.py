"""Native outputs in transformers: packed weights, and the ways in which they are multiplied.

The names below are imported when they are first used: transformers' import registers the quantizer, which must not load the rest.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moebit.formats.names import EXPERTS_IMPLEMENTATION
    from moebit.runtime.packed import PackedLinear, PackedMatrices, multiplied, use
    from moebit.runtime.paths import PATHS, Path
    from moebit.runtime.quantizer import MoebitConfig, MoebitQuantizer

__all__ = [
    "EXPERTS_IMPLEMENTATION",
    "PATHS",
    "MoebitConfig",
    "MoebitQuantizer",
    "PackedLinear",
    "PackedMatrices",
    "Path",
    "multiplied",
    "use",
]

_HOMES = {
    "formats.names": ("EXPERTS_IMPLEMENTATION",),
    "runtime.packed": ("PackedLinear", "PackedMatrices", "multiplied", "use"),
    "runtime.paths": ("PATHS", "Path"),
    "runtime.quantizer": ("MoebitConfig", "MoebitQuantizer"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'moebit.runtime' has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f"moebit.{_HOME_OF[name]}"), name)
    return value
