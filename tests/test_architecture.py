"""The architecture: imports point one way, files stay small, public names and tables explain themselves."""

import ast
import inspect
import re
import sys
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

import nvcoll
from nvcoll import settings

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nvcoll"

# From top to bottom; a module may import those below it, and its neighbours as long as no circle comes about.
LAYERS = (
    {"__main__", "MPI"},
    {"cli"},
    {"__init__"},
    {"emulation", "session"},
    {"comm"},
    {"splitting"},
    {"allocation"},
    {"arguments", "device_calls", "device_requests", "hosts", "lifecycle", "lower_case", "requests"},
    {"device_failures", "failures"},
    {"world", "world_cuda"},
    {"parts"},
    {"kernels", "planning", "planning_cuda"},
    {"jit", "jit_cuda"},
    {"algorithms", "device", "backends", "ops", "buffers", "codecache"},
    {"_plan", "_selection", "_topology", "_bootstrap"},
    {"settings"},
    {"errors"},
)
LEAVES = {"errors", "settings"}  # anybody may import them, and they import only each other
STRANGERS = {"algorithms": {"backends"}, "backends": {"algorithms"}}  # jit joins them
COMPILERS = {"jit", "jit_cuda", "device"}  # where Numba and llvmlite may be named
HEAVY = ("numba", "llvmlite", "mpi4py", "ml_dtypes", "torch", "cuda", "nvshmem", "scipy")
MAX_LINES = 400

PYTHON = sorted(PACKAGE.rglob("*.py"))
CYTHON = sorted([*(ROOT / "src").glob("*.pyx"), *(ROOT / "src").glob("*.pxi")])
ALGORITHMS = sorted(path for path in (PACKAGE / "algorithms").glob("*.py") if not path.name.startswith("_"))


def relative(path):
    return path.relative_to(ROOT).as_posix()


def by_name(paths):
    return pytest.mark.parametrize("path", [pytest.param(path, id=relative(path)) for path in paths])


def room(path):
    """The name under nvcoll that a file belongs to: "comm", "algorithms", "_plan"."""
    if path.is_relative_to(PACKAGE):
        return path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    owner = path if path.suffix == ".pyx" else including(path)
    return f"_{owner.stem}"


def including(part):
    """The .pyx file that includes a .pxi file."""
    [owner] = [path for path in CYTHON if re.search(rf'^include "{part.name}"', path.read_text(), re.MULTILINE)]
    return owner


@cache
def imports(path):
    """Full names of the modules a file imports, inside functions too."""
    text = path.read_text()
    if path.suffix in {".pyx", ".pxi"}:
        pattern = r"^\s*(?:from\s+([\w.]+)\s+c?import|c?import\s+([\w.]+))"
        return {a or b for a, b in re.findall(pattern, text, re.MULTILINE)}
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = absolute(path, node)
            found |= {f"{base}.{alias.name}" if base == "nvcoll" else base for alias in node.names}
    return found


def absolute(path, node):
    """The module a `from ... import` names, relative ones made absolute."""
    if not node.level:
        return node.module
    package = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def rooms_imported(path):
    """Rooms of nvcoll that a file imports; "__init__" stands for public names of the package itself."""
    known = set().union(*LAYERS)
    names = {name.split(".")[1] if "." in name else "__init__" for name in imports(path) if is_ours(name)}
    return {name if name in known or (PACKAGE / f"{name}.py").exists() else "__init__" for name in names}


def is_ours(name):
    return name == "nvcoll" or name.startswith("nvcoll.")


def level(name):
    """Height of a room; unknown rooms fail with what to do."""
    for height, names in enumerate(reversed(LAYERS)):
        if name in names:
            return height
    raise AssertionError(
        f"nvcoll/{name} has no layer: give it one in DESIGN's order, in LAYERS of {relative(Path(__file__))}"
    )


@by_name(PYTHON + CYTHON)
def test_imports_point_down(path):
    here = room(path)
    for other in rooms_imported(path) - {here}:
        assert other in LEAVES or level(other) <= level(here), (
            f"{relative(path)} imports nvcoll.{other}, which is above it"
        )
        assert other not in STRANGERS.get(here, ()), f"{relative(path)} imports nvcoll.{other}; only jit joins the two"
        assert here not in LEAVES or other in LEAVES, f"{relative(path)} is a leaf and imports nvcoll.{other}"


def test_neighbours_import_in_no_circle():
    graph = {}
    for path in PYTHON + CYTHON:
        graph.setdefault(room(path), set()).update(rooms_imported(path) - {room(path)})
    while done := {name for name, others in graph.items() if not others & graph.keys()}:
        graph = {name: others for name, others in graph.items() if name not in done}
    assert not graph, f"rooms import each other in a circle: {graph}"


@by_name(PYTHON)
def test_only_jit_and_device_know_numba(path):
    found = {name.partition(".")[0] for name in imports(path)} & {"numba", "llvmlite"}
    assert not found or room(path) in COMPILERS, f"{relative(path)} imports {found}"


@by_name(PYTHON)
def test_only_settings_and_the_launcher_read_the_environment(path):
    reads = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    found = {node.attr for node in reads if node.attr in {"environ", "getenv"}}
    assert not found or room(path) in {"settings", "cli"}, (
        f"{relative(path)} reads {found}: add a row to settings.TABLE"
    )


def test_examples_use_the_public_names_only():
    for path in (ROOT / "examples").glob("*.py"):
        assert not {name for name in imports(path) if name.startswith("nvcoll._")}, relative(path)


def test_import_touches_no_compiler_driver_or_mpi(run_command):
    code = "import sys, nvcoll; print(*sorted(sys.modules))"
    status, output = run_command([sys.executable, "-W", "error", "-c", code])
    assert status == 0, output
    loaded = {name for name in output.split() for heavy in HEAVY if name == heavy or name.startswith(f"{heavy}.")}
    assert not loaded, f"import nvcoll loads {sorted(loaded)}; import them where they are used"


@by_name(PYTHON + CYTHON + sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "examples").glob("*.py")))
def test_files_stay_small(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{relative(path)} has {lines} lines, {MAX_LINES} at most: split it by meaning"


@by_name(PYTHON + CYTHON)
def test_nothing_is_left_to_do(path):
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text())


def public_callables():
    """(name, function) of all that users call: exported functions, and public methods of exported classes."""
    for name in nvcoll.__all__:
        value = getattr(nvcoll, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            ours = [base for base in value.__mro__ if base.__module__.startswith("nvcoll.")]
            for method, member in (pair for base in ours for pair in vars(base).items()):
                function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
                # Buffer wraps methods of NumPy's under their own names; those are documented there.
                own = inspect.isfunction(function) and function.__code__.co_name == method
                if own and not method.startswith("_"):
                    yield f"{name}.{method}", function


@pytest.mark.parametrize(("name", "function"), [pytest.param(*pair, id=pair[0]) for pair in public_callables()])
def test_public_callables_have_numpy_docstrings(name, function):
    doc = inspect.getdoc(function) or ""
    assert doc, f"{name} has no docstring"
    signature = inspect.signature(function)
    if [parameter for parameter in signature.parameters if parameter not in {"self", "cls"}]:
        assert re.search(r"^Parameters\n-+$", doc, re.MULTILINE), f"{name}: no Parameters section"
    if signature.return_annotation not in {None, "None", NoReturn, inspect.Signature.empty}:
        assert re.search(r"^(Returns|Yields)\n-+$", doc, re.MULTILINE), f"{name}: no Returns section"


def documentation():
    """Text of README and of all pages."""
    pages = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
    return {path: path.read_text() for path in [ROOT / "README.md", *pages]}


def test_documentation_names_only_variables_that_exist():
    known = {variable.name for variable in settings.TABLE}
    for path, text in documentation().items():
        unknown = set(re.findall(r"\bNVCOLL_[A-Z_]*[A-Z]\b", text)) - known
        assert not unknown, f"{relative(path)} names {sorted(unknown)}, which settings.TABLE lacks"


@by_name(ALGORITHMS)
def test_algorithm_files_tell_limits_cost_picture_and_source(path):
    tree = ast.parse(path.read_text())
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert {"supports", "cost"} <= names, f"{relative(path)} lacks {({'supports', 'cost'}) - names}"
    doc = ast.get_docstring(tree) or ""
    assert re.search(r"^( {2,}\S.*\n?){3,}", doc, re.MULTILINE), f"{relative(path)}: draw its steps in the docstring"
    assert re.search(r"\bsource\s*=|^Source", path.read_text(), re.MULTILINE), f"{relative(path)} names no source"
