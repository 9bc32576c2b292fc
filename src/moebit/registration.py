"""The one import side effect: transformers learns moebit's quantizer and its experts implementation.

Importing moebit must not import transformers and torch, which takes seconds. So if transformers is there already, moebit registers at
once; otherwise it waits for the module of transformers in which quantizers are registered. For that, a finder on `sys.meta_path` lets
Python's own finders look for this one module and is told when the module has run. All other imports pass it by.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader  # it takes as long to import as the rest of moebit

REGISTRY = "transformers.quantizers.auto"  # whatever loads a model imports this module first


def register_with_transformers() -> None:
    """Register now if transformers' registry is loaded, else as soon as it is."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


def _register() -> None:
    import moebit.runtime.quantizer  # noqa: F401 - it registers what it defines


class _RegistryFinder:
    """Finds the registry as the finders behind it do, with a loader that reports when the module has run."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find and finder is not self else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ReportingLoader(spec.loader, self)
                return spec
        return None


class _ReportingLoader:
    """The module's own loader, given back to the module before moebit registers."""

    def __init__(self, loader: Loader, finder: _RegistryFinder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self._finder]
        _register()

    def __getattr__(self, name: str) -> Any:  # `importlib.util.find_spec` hands this loader to whoever asks for the source
        return getattr(self._loader, name)
