"""The house keeps its order: who imports whom, how long things are, which words are used."""

import ast
import importlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "whence"
MODULES = sorted(PACKAGE.rglob("*.py"))
PYTHON_FILES = [*MODULES, *sorted((ROOT / "tests").rglob("*.py"))]

GROUND = {"activations", "compiled", "errors", "extras", "tree"}
REPLAY = GROUND | {"clipping", "task", "queries", "replay"}
METHODS = REPLAY | {"run", "influence", "methods"}
EVERYTHING = METHODS | {"tasks", "language", "record", "apply", "plot", "view", "cli"}
MAY_IMPORT = {
    "errors": {"errors"},
    "activations": {"activations"},
    "checkpointing": {"checkpointing"},
    "compiled": {"compiled"},
    "extras": {"errors", "extras"},
    "tree": GROUND,
    "batchnorm": GROUND | {"batchnorm"},
    "clipping": GROUND | {"clipping"},
    "task": GROUND | {"batchnorm", "checkpointing", "clipping", "task"},
    "tasks": GROUND | {"task", "tasks"},
    "language": GROUND | {"task", "tasks", "language"},
    "queries": GROUND | {"task", "queries"},
    "replay": REPLAY,
    "run": REPLAY | {"run"},
    "record": REPLAY | {"run", "record"},
    "influence": {"errors", "extras", "influence"},
    "methods": METHODS,
    "apply": METHODS | {"apply"},
    "plot": {"errors", "extras", "influence", "plot"},
    "view": EVERYTHING - {"cli"},
    # The command line is outermost, and its demo shows how users import.
    "cli": EVERYTHING | {"__init__"},
    # The public names, imported lazily.
    "__init__": EVERYTHING - {"view", "cli"},
}
VAGUE = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}
# Where things were fetched from is no business of a reader.
# In parts, so that this file does not name what it bans.
BANNED = tuple(
    f"{name}.{end}" for name, end in (("pypi", "org"), ("pythonhosted", "org"), ("anaconda", "org"), ("npmjs", "org"))
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def layer(path: Path) -> str:
    """Name the top-level module or folder of the package that holds `path`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_layers(path: Path) -> set[str]:
    """Name the layers of the package that a module imports; the version belongs to nobody."""
    ours = (n.split(".") for n in imported_modules(parsed(path)) if n.split(".")[0] == "whence")
    return {".".join(parts[1:2]) or "__init__" for parts in ours} - {"__version__"}


def parsed(path: Path) -> ast.Module:
    """Read a module as a syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


def functions_of(path: Path) -> list[Function]:
    """List every function of a module, nested ones too."""
    return [node for node in ast.walk(parsed(path)) if isinstance(node, Function)]


def code_lines(function: Function, source: list[str]) -> int:
    """Count the lines of a function that are neither docstring, comment nor blank."""
    lines = set(range(function.lineno, (function.end_lineno or 0) + 1))
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    texts = (source[line - 1].strip() for line in lines)
    return sum(bool(text) and not text.startswith("#") for text in texts)


def function_lengths(path: Path) -> dict[str, int]:
    """Give the code lines of every function in a file, by place and name."""
    source = path.read_text(encoding="utf-8").splitlines()
    place = path.relative_to(ROOT)
    return {f"{place}:{f.lineno} {f.name}": code_lines(f, source) for f in functions_of(path)}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    """A module imports only the layers below its own."""
    assert imported_layers(path) <= MAY_IMPORT[layer(path)]


def test_functions_are_short() -> None:
    """No function has more than 40 code lines, and half of those in the package at most 10."""
    lengths = {name: n for path in PYTHON_FILES for name, n in function_lengths(path).items()}
    assert {name: n for name, n in lengths.items() if n > 40} == {}
    ours = [n for name, n in lengths.items() if name.startswith("src")]
    assert statistics.median(ours) <= 10


def test_files_are_short() -> None:
    """No file has more than 350 lines."""
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in PYTHON_FILES}
    assert {name: n for name, n in lengths.items() if n > 350} == {}


def test_only_show_prints() -> None:
    """`print` is called in cli/show.py and nowhere else in the package."""
    printing = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Name) and node.id == "print" and path != PACKAGE / "cli" / "show.py"
    ]
    assert printing == []


def test_modules_are_named_for_what_they_hold() -> None:
    """No module or folder has a name that would fit any content."""
    names = {part.removesuffix(".py") for p in PYTHON_FILES for part in p.relative_to(ROOT).parts}
    assert names & VAGUE == set()


def test_texts_speak_of_the_project_alone() -> None:
    """No text names a package registry or a place on the machine it was written on."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = {ROOT / name for name in tracked.split("\0") if name} - {Path(__file__).resolve()}
    texts = {p: p.read_bytes().decode("utf-8", errors="ignore") for p in paths if p.is_file()}
    assert [(str(p), word) for p, text in texts.items() for word in BANNED if word in text] == []


def test_public_names_resolve() -> None:
    """Every public name can be had, and the type checker is told the same homes as the reader."""
    whence = importlib.import_module("whence")
    for name in whence.__all__:
        assert getattr(whence, name) is not None, name
    told = set(imported_modules(parsed(PACKAGE / "__init__.py"))) - {"importlib.import_module"}
    homes = {f"{module}.{name}" for name, module in whence._HOME.items()} | {"whence.plot"}
    assert {name for name in told if name.startswith("whence")} == homes


def test_importing_whence_is_light() -> None:
    """`import whence` brings in no library that takes time."""
    heavy = "{'torch', 'numpy', 'scipy', 'polars', 'zarr', 'matplotlib', 'jaxtyping', 'tyro'}"
    code = f"import sys, whence; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
