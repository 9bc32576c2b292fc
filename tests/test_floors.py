"""The house rules that the source can show: which room may import which, who prints, what is never loaded, and how long things get.

`violations` reads a source tree without importing it. It is tested on made-up trees first, then run on the real one. The floors and the
column "what it does not know" are those of CONTRIBUTING.md: the table is read, and the imports are held against it.
"""

from __future__ import annotations

import ast
import itertools
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
SRC = PROJECT / "src"

# A room is a package or module directly under src/moebit; ROOT is moebit/__init__.py. A room imports only rooms with a lower number, so
# that there is no circle. A room that is not here is a violation: give it a floor, and a line in CONTRIBUTING's table.
ROOT = "__init__"
FLOORS = {
    "errors": 0,
    "words": 0,
    "device": 1,
    "memory": 1,
    "ranks": 1,
    "tensor": 1,
    "recipe": 2,
    "storage": 3,
    "model": 4,
    "streaming": 5,
    "calibration": 6,
    "methods": 6,
    "formats": 7,
    "plan": 8,
    "runtime": 8,
    "evaluate": 8,
    "report": 9,
    "profiling": 9,
    "registration": 9,
    "quantize": 10,
    ROOT: 11,
    "cli": 12,
    "__main__": 13,
}
# A room that may import only these modules of another one.
ONLY = {("methods", "model"): {"moebit.model.experts"}}
OPENS = "moebit.formats.opening"  # the one module that may ask which kind of weights it has
HOOKS = "moebit.model.capture"  # the one module that registers hooks
PRINTS = "cli"
SCREEN = {"rich", "tqdm"}
PICKLE = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}


def violations(src: Path) -> list[str]:
    """What breaks the rules in the package `src`/moebit, as "path:line: what", in the order of the files."""
    found = []
    for path in sorted((src / "moebit").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        module = module_name(path, src)
        imports = list(imported(tree, module, path.name == "__init__.py", src))
        broken = itertools.chain(
            broken_floors(imports, room_of(module)), broken_habits(tree, imports, room_of(module)), broken_homes(tree, module)
        )
        found += [f"{path.relative_to(src).as_posix()}:{line}: {what}" for line, what in sorted(set(broken))]
    return found


def module_name(path: Path, src: Path) -> str:
    """src/moebit/tensor/__init__.py → "moebit.tensor"."""
    parts = path.relative_to(src).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """ "moebit.tensor.grid" → "tensor", "moebit" → ROOT."""
    return [*module.split("."), ROOT][1]


def is_module(name: str, src: Path) -> bool:
    path = src.joinpath(*name.split("."))
    return any(path.glob("*.py")) or path.with_suffix(".py").is_file()


def imported(tree: ast.Module, module: str, is_package: bool, src: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import of `module`, wherever in the file it stands.

    `from a import b` gives "a.b"; of moebit it gives "a.b" only if that is a module, otherwise "a". Calls of
    import_module and __import__ count where the name is written out.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield node.lineno, name if base.split(".")[0] != "moebit" or is_module(name, src) else base
        elif isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            level = next((len(name) - len(name.lstrip(".")) for name in names), 0)
            above = package[: len(package) - level + 1] if level else []
            yield from ((node.lineno, ".".join(filter(None, [*above, name.lstrip(".")]))) for name in names)


def dotted(node: ast.expr) -> str:
    """`a.b.c` as written; "" for anything but names and attributes of names."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def broken_floors(imports: list[tuple[int, str]], room: str) -> Iterator[tuple[int, str]]:
    if room not in FLOORS:
        yield 1, f"room {room} has no floor: add it to FLOORS"
        return
    for line, name in imports:
        if name.split(".")[0] != "moebit":
            continue
        target = room_of(name)
        if target not in FLOORS:
            yield line, f"imports {name}, a room without a floor: add it to FLOORS"
        elif target != room and FLOORS[target] >= FLOORS[room]:
            yield line, f"{room} (floor {FLOORS[room]}) imports {name} (floor {FLOORS[target]})"
        elif not any(f"{name}.".startswith(f"{one}.") for one in ONLY.get((room, target), {name})):
            yield line, f"{room} imports {name}, but of {target} it knows {', '.join(sorted(ONLY[room, target]))} only"


def broken_homes(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """What has one home: asking which kind of weights there is, and registering hooks."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function, arguments = dotted(call.func), [*call.args, *itertools.repeat(None, 2)]
        kinds = [
            dotted(node).rpartition(".")[2] for node in ast.walk(arguments[1] or ast.Pass()) if isinstance(node, ast.Name | ast.Attribute)
        ]
        if module != OPENS and function == "isinstance" and any(kind.endswith("Weights") for kind in kinds):
            yield call.lineno, f"isinstance of weights: only {OPENS} asks for their kind"
        if module != OPENS and function in ("getattr", "hasattr") and dotted(arguments[0] or ast.Pass()).endswith("weights"):
            yield call.lineno, f"{function} of weights: only {OPENS} asks for their kind"
        if module != HOOKS and isinstance(call.func, ast.Attribute) and re.match(r"register_(forward|full|module)", call.func.attr):
            yield call.lineno, f"{call.func.attr}: only {HOOKS} registers hooks"


def broken_habits(tree: ast.Module, imports: list[tuple[int, str]], room: str) -> Iterator[tuple[int, str]]:
    for line, name in imports:
        if name.split(".")[0] in SCREEN and room != PRINTS:
            yield line, f"imports {name}: only {PRINTS} writes to the screen"
        if name.split(".")[0] in PICKLE:
            yield line, f"imports {name}: nothing is pickled"
    names = real_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "print" and room != PRINTS:
            yield node.lineno, f"print: only {PRINTS} writes to the screen"
        if isinstance(node, ast.Name | ast.Attribute):
            first, _, rest = dotted(node).partition(".")
            name = f"{names.get(first, first)}.{rest}".rstrip(".")
            if name in ("sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__") and room != PRINTS:
                yield node.lineno, f"{name}: only {PRINTS} writes to the screen"
            if name in ("torch.load", "torch.serialization.load"):
                yield node.lineno, f"{name}: weights are read from safetensors"
        for line, flag in flags_set(node):
            if flag in ("trust_remote_code", "allow_pickle"):
                yield line, f"{flag}=True: code of a checkpoint is never run"


def real_names(tree: ast.Module) -> dict[str, str]:
    """What a name in the file stands for, after `import a as name` and `from a import b as name`."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def flags_set(node: ast.AST) -> Iterator[tuple[int, str]]:
    """The names that `node` gives the value True: as keyword, dictionary entry, default or assignment."""
    pairs: list[tuple[object, ast.expr | None]] = []
    if isinstance(node, ast.keyword):
        pairs = [(node.arg, node.value)]
    elif isinstance(node, ast.Dict):
        pairs = [(key.value if isinstance(key, ast.Constant) else None, value) for key, value in zip(node.keys, node.values, strict=True)]
    elif isinstance(node, ast.arguments):
        positional = [*node.posonlyargs, *node.args]
        defaults = [*itertools.repeat(None, len(positional) - len(node.defaults)), *node.defaults, *node.kw_defaults]
        pairs = [(arg.arg, default) for arg, default in zip([*positional, *node.kwonlyargs], defaults, strict=True)]
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        pairs = [(last_name(target), node.value) for target in targets]
    for name, value in pairs:
        if isinstance(name, str) and isinstance(value, ast.Constant) and value.value is True:
            yield value.lineno, name


def last_name(target: ast.expr) -> object:
    """`a`, `x.a` and `x["a"]` → "a"."""
    if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
        return target.slice.value
    return target.attr if isinstance(target, ast.Attribute) else dotted(target)


def test_moebit_keeps_the_rules() -> None:
    assert (SRC / "moebit" / "__init__.py").is_file()
    assert violations(SRC) == []


# A tree that breaks nothing; each case below puts one file into it.
LAWFUL = {
    "__init__.py": "from moebit.quantize.run import quantize\n",
    "errors.py": "class MoebitError(Exception): ...\n",
    "recipe.py": "from . import errors\n",
    "tensor/__init__.py": "from moebit.tensor.grid import UniformGrid\n",
    "tensor/grid.py": "from ..errors import MoebitError\nimport torch\nclass UniformGrid: ...\n",
    "model/__init__.py": "",
    "model/stream.py": "from moebit import errors, recipe, tensor\nfrom . import structure\n",
    "model/experts.py": "",
    "model/capture.py": "x.register_forward_hook(f)\n",
    "model/structure.py": "import moebit.tensor.grid\n",
    "methods/__init__.py": "from moebit.model.experts import Slots\nfrom moebit import tensor\n",
    "calibration/__init__.py": "import moebit.model\n",
    "formats/__init__.py": "import moebit.methods, moebit.model\n",
    "formats/opening.py": "isinstance(x, (int, NativeWeights)), getattr(x.weights, 'y')\n",
    "runtime/__init__.py": "",
    "evaluate/__init__.py": "",
    "report/__init__.py": "",
    "quantize/run.py": "import sys\nfrom moebit import formats\nfrom moebit.recipe import errors\ndef quantize(): sys.exit\n",
    "cli.py": "import sys\nimport moebit\nfrom rich.console import Console\nprint(moebit.quantize, file=sys.stderr)\nConsole().print()\n",
    "__main__.py": "from moebit.cli import main\n",
}


def build(src: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = src / "moebit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return src


def test_a_lawful_tree_has_no_violations(tmp_path: Path) -> None:
    assert violations(build(tmp_path, LAWFUL)) == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        # floors: absolute and relative, packages and modules, at the top and inside functions
        ("tensor/bad.py", "import moebit.model", "1: tensor (floor 1) imports moebit.model (floor 4)"),
        ("tensor/bad.py", "import os\nfrom moebit.model.stream import Stream", "2: tensor (floor 1) imports moebit.model.stream (floor 4)"),
        ("tensor/bad.py", "from moebit import model", "1: tensor (floor 1) imports moebit.model (floor 4)"),
        ("tensor/bad.py", "from .. import model", "1: tensor (floor 1) imports moebit.model (floor 4)"),
        ("tensor/bad.py", "from ..model import stream", "1: tensor (floor 1) imports moebit.model.stream (floor 4)"),
        ("tensor/__init__.py", "from ..model.stream import x", "1: tensor (floor 1) imports moebit.model.stream (floor 4)"),
        ("tensor/deep/bad.py", "from ...model import *", "1: tensor (floor 1) imports moebit.model (floor 4)"),
        ("model/bad.py", "def f():\n    from moebit.methods import awq", "2: model (floor 4) imports moebit.methods (floor 6)"),
        ("model/bad.py", "if TYPE_CHECKING:\n    import moebit.report", "2: model (floor 4) imports moebit.report (floor 9)"),
        ("methods/bad.py", "import torch, moebit.formats as f", "1: methods (floor 6) imports moebit.formats (floor 7)"),
        ("calibration/bad.py", "import_module('moebit.evaluate')", "1: calibration (floor 6) imports moebit.evaluate (floor 8)"),
        ("calibration/bad.py", "importlib.import_module('..evaluate', x)", "1: calibration (floor 6) imports moebit.evaluate (floor 8)"),
        ("report/bad.py", "from moebit.quantize.run import quantize", "1: report (floor 9) imports moebit.quantize.run (floor 10)"),
        ("quantize/run.py", "from .. import cli", "1: quantize (floor 10) imports moebit.cli (floor 12)"),
        ("quantize/run.py", "import moebit", "1: quantize (floor 10) imports moebit (floor 11)"),
        ("quantize/run.py", "from moebit import inspect", "1: quantize (floor 10) imports moebit (floor 11)"),
        ("__init__.py", "from .cli import main", "1: __init__ (floor 11) imports moebit.cli (floor 12)"),
        ("tensor/bad.py", "from moebit.recipe import Recipe", "1: tensor (floor 1) imports moebit.recipe (floor 2)"),
        ("errors.py", "from .tensor import grid", "1: errors (floor 0) imports moebit.tensor.grid (floor 1)"),
        ("recipe.py", "import moebit.model", "1: recipe (floor 2) imports moebit.model (floor 4)"),
        ("utils.py", "", "1: room utils has no floor: add it to FLOORS"),
        ("model/bad.py", "from moebit.utils import a, b", "1: imports moebit.utils, a room without a floor: add it to FLOORS"),
        # no circle, also between rooms of one floor, and only the named part of a room
        ("methods/bad.py", "from moebit.calibration import statistics", "1: methods (floor 6) imports moebit.calibration (floor 6)"),
        ("runtime/bad.py", "import moebit.evaluate", "1: runtime (floor 8) imports moebit.evaluate (floor 8)"),
        (
            "methods/bad.py",
            "import moebit.model.stream",
            "1: methods imports moebit.model.stream, but of model it knows moebit.model.experts only",
        ),
        ("methods/bad.py", "from moebit import model", "1: methods imports moebit.model, but of model it knows moebit.model.experts only"),
        # what has one home
        ("report/bad.py", "isinstance(x, a.HubWeights)", "1: isinstance of weights: only moebit.formats.opening asks for their kind"),
        ("report/bad.py", "isinstance(x, int | HubWeights)", "1: isinstance of weights: only moebit.formats.opening asks for their kind"),
        ("report/bad.py", "getattr(self.weights, 'x', 0)", "1: getattr of weights: only moebit.formats.opening asks for their kind"),
        ("report/bad.py", "x.register_forward_pre_hook(f)", "1: register_forward_pre_hook: only moebit.model.capture registers hooks"),
        (
            "report/bad.py",
            "x().register_full_backward_hook(f)",
            "1: register_full_backward_hook: only moebit.model.capture registers hooks",
        ),
        # the screen belongs to cli
        ("quantize/run.py", "def f():\n    print('done')", "2: print: only cli writes to the screen"),
        ("report/bad.py", "show = print", "1: print: only cli writes to the screen"),
        ("report/bad.py", "from rich.console import Console", "1: imports rich.console.Console: only cli writes to the screen"),
        ("report/bad.py", "import rich", "1: imports rich: only cli writes to the screen"),
        ("report/bad.py", "import tqdm.auto", "1: imports tqdm.auto: only cli writes to the screen"),
        ("report/bad.py", "import sys as s\ns.stdout.write('')", "2: sys.stdout: only cli writes to the screen"),
        ("report/bad.py", "from sys import stderr\nstderr.write('')", "2: sys.stderr: only cli writes to the screen"),
        # nothing is unpickled, no code of a checkpoint is run
        ("model/bad.py", "import pickle", "1: imports pickle: nothing is pickled"),
        ("cli.py", "def f():\n    from pickle import loads", "2: imports pickle.loads: nothing is pickled"),
        ("model/bad.py", "import torch\ntorch.load('x', weights_only=True)", "2: torch.load: weights are read from safetensors"),
        ("model/bad.py", "import torch as t\nread = t.load", "2: torch.load: weights are read from safetensors"),
        ("model/bad.py", "from torch import load as read\nread('x')", "2: torch.load: weights are read from safetensors"),
        ("model/bad.py", "f(\n  trust_remote_code=True)", "2: trust_remote_code=True: code of a checkpoint is never run"),
        ("model/bad.py", "f(**{'trust_remote_code': True})", "1: trust_remote_code=True: code of a checkpoint is never run"),
        ("model/bad.py", "x['trust_remote_code'] = True", "1: trust_remote_code=True: code of a checkpoint is never run"),
        ("model/bad.py", "def f(a, trust_remote_code=True, *, b): ...", "1: trust_remote_code=True: code of a checkpoint is never run"),
        ("model/bad.py", "class C:\n  trust_remote_code: bool = True", "2: trust_remote_code=True: code of a checkpoint is never run"),
        ("model/bad.py", "numpy.load('x', allow_pickle=True)", "1: allow_pickle=True: code of a checkpoint is never run"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, file: str, text: str, expected: str) -> None:
    src = build(tmp_path, LAWFUL | {file: text + "\n"})
    assert violations(src) == [f"moebit/{file}:{expected}"]


@pytest.mark.parametrize(
    "text",
    [
        "f(trust_remote_code=False)",
        "import numpy\nnumpy.load('x', allow_pickle=False)",
        "import sys\nsys.exit",
        "from safetensors import torch\ntorch.load_file('x')",
        "from safetensors import torch\ntorch.load(b'')",
        "self.print()",
        "'import moebit.cli; print(1)'",
        "from importlib import resources\nresources.files('moebit') / 'recipes'",
        "def f(a, /, b=True, *, c, trust_remote_code=False): ...",
    ],
)
def test_what_only_looks_like_a_violation_is_not(tmp_path: Path, text: str) -> None:
    assert violations(build(tmp_path, LAWFUL | {"model/fine.py": text + "\n"})) == []


def test_violations_are_listed_in_order(tmp_path: Path) -> None:
    src = build(tmp_path, LAWFUL | {"quantize/run.py": "import moebit.cli\n", "model/bad.py": "print()\nimport pickle\n"})
    assert [line.split(" ")[0] for line in violations(src)] == [
        "moebit/model/bad.py:1:",
        "moebit/model/bad.py:2:",
        "moebit/quantize/run.py:1:",
    ]


def table(contributing: str) -> dict[str, tuple[int, set[str]]]:
    """The rooms of CONTRIBUTING's table: its floor, and the rooms that it names in the column "what it does not know".

    Raises:
        ValueError: a row without a room, or one that names something else in that column.
    """
    rooms: dict[str, tuple[int, set[str]]] = {}
    for line in contributing.split("| floor |")[1].splitlines()[2:]:
        if not line.startswith("|"):
            break
        floor, room, _, unknown = (cell.strip() for cell in line.strip("|").split("|"))
        names = [name.removesuffix("/").removesuffix(".py") for name in re.findall(r"`([^`]+)`", room)]
        hidden = set(re.findall(r"`([^`]+)`", unknown))
        if not names or not hidden <= set(FLOORS):
            raise ValueError(f"no row about a room: {line}")
        rooms |= {name: (int(floor), hidden) for name in names}
    return rooms


def known(room: str) -> set[str]:
    """The rooms that a room of moebit imports."""
    found = set[str]()
    for path in sorted((SRC / "moebit").rglob("*.py")):
        module = module_name(path, SRC)
        if room_of(module) == room:
            imports = imported(ast.parse(path.read_text(encoding="utf-8")), module, path.name == "__init__.py", SRC)
            found |= {room_of(name) for _, name in imports if name.split(".")[0] == "moebit"}
    return found - {room}


def test_contributings_table_is_the_house() -> None:
    """Every room has its line, on its floor, and knows nothing of the rooms that the line says it does not know."""
    rooms = table((PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert {room: floor for room, (floor, _) in rooms.items()} == {room: floor for room, floor in FLOORS.items() if room != "__main__"}
    assert sum(len(hidden) for _, hidden in rooms.values()) >= 40
    assert {room: known(room) & hidden for room, (_, hidden) in rooms.items() if known(room) & hidden} == {}


LONGEST_FILE, LONGEST_FUNCTION, MEDIAN_FUNCTION = 400, 60, 8
REASON = "long because"  # what the first lines of a longer file say
# Kernels: one loop nest each, which is compiled whole or must not be cut for its speed. Of verbs the signature and docstring do not count.
KERNELS = {"kernels.py", "triton_kernels.py", "ggml_moments.py"}
LOOPS = {"solve_gptq"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> list[Function]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def lines(function: Function, body_alone: bool) -> int:
    first = function.body[min(len(function.body) - 1, ast.get_docstring(function) is not None)].lineno if body_alone else function.lineno
    return (function.end_lineno or first) - first + 1


def verbs() -> set[str]:
    """The names that `import moebit` offers."""
    tree = ast.parse((SRC / "moebit" / "__init__.py").read_text(encoding="utf-8"))
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier()
    }


def test_files_and_functions_are_short() -> None:
    """Files have at most 400 lines or say why not, functions at most 60, half of them at most 8."""
    files = sorted((SRC / "moebit").rglob("*.py"))
    texts = {path: path.read_text(encoding="utf-8").splitlines() for path in files}
    assert [str(path) for path, text in texts.items() if len(text) > LONGEST_FILE and REASON not in " ".join(text[:20])] == []
    found = [(path, function) for path in files for function in functions(path)]
    long = [
        f"{path.relative_to(SRC)}:{function.lineno} {function.name}"
        for path, function in found
        if lines(function, function.name in verbs()) > LONGEST_FUNCTION and path.name not in KERNELS and function.name not in LOOPS
    ]
    assert long == []
    assert statistics.median(lines(function, False) for _, function in found) <= MEDIAN_FUNCTION
