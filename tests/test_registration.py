"""Importing moebit is light, and transformers knows the native format in whatever order the two are imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import ARCHITECTURES, Checkpoints


def python(code: str, *arguments: object) -> str:
    """Standard output of a new process."""
    run = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


HEAVY = "print([name for name in ('torch', 'transformers', 'numpy', 'numba', 'pydantic') if name in sys.modules])"


@pytest.mark.parametrize(("imports", "left"), [("moebit", []), ("moebit.cli", []), ("moebit.errors", []), ("moebit.recipe", ["pydantic"])])
def test_what_is_imported_before_any_work(imports: str, left: list[str]) -> None:
    assert python(f"import sys, {imports}\n{HEAVY}") == str(left)


SAME_NAMES = """
import importlib, sys
names = sys.argv[1:]
import moebit
for name in names:
    importlib.import_module(name)
for name in ("evaluate", "report", "quantize"):
    found = getattr(moebit, name)
    assert callable(found) and found.__name__ == name, (name, found)
from moebit import evaluate, report, quantize
assert evaluate is moebit.evaluate and callable(evaluate)
assert set(moebit.__all__) <= set(dir(moebit)) and all(hasattr(moebit, name) for name in moebit.__all__)
assert moebit.__version__ and not hasattr(moebit, "moebit")
"""


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(["moebit.evaluate", "moebit.report", "moebit.quantize"], marks=pytest.mark.slow),
        ["moebit.quantize.run", "moebit.report.page", "moebit.evaluate.streaming"],
        pytest.param(["moebit.report.compare", "moebit.quantize.documents"], marks=pytest.mark.slow),
        pytest.param([], marks=pytest.mark.slow),
    ],
)
def test_functions_stay_where_packages_have_their_names(first: list[str]) -> None:
    python(SAME_NAMES, *first)


def test_a_name_that_is_none_is_an_attribute_error() -> None:
    import moebit

    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        moebit.quantise  # noqa: B018


LOOKED_FOR = "importlib.util.find_spec('transformers.quantizers.auto').loader.get_filename()"
LOAD = """
import sys
{first}
{second}
from transformers import AutoModelForCausalLM
from moebit.runtime import PackedMatrices
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(isinstance(module, PackedMatrices) for module in model.modules()) > 0)
import transformers.quantizers.auto as auto
from importlib.machinery import SourceFileLoader
assert type(auto.__loader__) is type(auto.__spec__.loader) is SourceFileLoader, "the module has its own loader again"
assert not [finder for finder in sys.meta_path if "moebit" in type(finder).__module__], "and no finder is left behind"
"""


@pytest.fixture(scope="module")
def native(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import moebit

    out = tmp_path_factory.mktemp("native") / "out"
    settings = {"weights.group_size": 32}
    moebit.quantize(checkpoints.path(ARCHITECTURES["mixtral"]), out, recipe="rtn-w4", overrides=settings)
    return out


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("import moebit", "import transformers"),
        pytest.param("import transformers", "import moebit", marks=pytest.mark.slow),
        pytest.param("from transformers import AutoModelForCausalLM, PreTrainedModel", "import moebit", marks=pytest.mark.slow),
        pytest.param("import moebit", "import transformers.modeling_utils", marks=pytest.mark.slow),
        pytest.param("import moebit", "from transformers.quantizers.auto import AutoHfQuantizer", marks=pytest.mark.slow),
        pytest.param("import moebit", "from transformers import MixtralForCausalLM", marks=pytest.mark.slow),
        pytest.param("import moebit", "import moebit.model.structure", marks=pytest.mark.slow),
        pytest.param("import moebit.runtime.packed", "import transformers", marks=pytest.mark.slow),
        pytest.param(
            "import moebit; import importlib.util",
            LOOKED_FOR,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_native_output_loads_in_any_order_of_imports(native: Path, first: str, second: str) -> None:
    assert python(LOAD.format(first=first, second=second), native) == "True"


def test_a_configuration_is_read_with_moebit_alone_imported_before(native: Path) -> None:
    code = "import sys, moebit\nfrom transformers import AutoConfig\nprint(AutoConfig.from_pretrained(sys.argv[1])._experts_implementation)"
    assert python(code, native) == "moebit"
