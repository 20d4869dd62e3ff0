"""Rules of the repository: imports, printing, names and words."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.import_directions import MAY_IMPORT

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "backtrail"
MODULES = sorted(PACKAGE.rglob("*.py"))
PYTHON_FILES = [*MODULES, *sorted((ROOT / "tests").rglob("*.py"))]
BENCHMARKS = sorted((ROOT / "bench").rglob("*.py"))

# Inside `methods`, a method may use those before it. The rest of `methods` is shared and uses none.
METHOD_MAY_IMPORT = {
    "retrain": {"retrain"},
    "gradient_dot": {"gradient_dot"},
    "dit": {"dit", "retrain"},
    "path_integrated": {"path_integrated", "dit"},
    "dve": {"dve"},
    "diff_in": {"diff_in"},
}
# Names of torch that start with an underscore, and so may change with any version of it: where each
# is used, and why there is no other way. `accel` may be turned off, so it is free to use more.
PRIVATE_NAMES = {
    "_pytree": (
        "tree.py",
        "flattens nested batches and outputs; torch 2.6 has no public name for it",
    ),
    "_version": ("tree.py", "tells that a tensor was written to, without comparing its entries"),
    "_base": ("tree.py", "a view that is written to changes the tensor it shows"),
    "_weight_norm": ("task/replaced.py", "its second derivative is wrong in torch 2.13"),
    "_weight_norm_interface": ("task/replaced.py", "the same, as parametrisations call it"),
    "_functorch": ("task/dropout.py", "draws a dropout mask outside the transforms it is under"),
    "_python_dispatch": ("task/noise.py", "replaces random numbers below autograd and vmap"),
    "_forward_hooks": ("task/task.py", "removes a hook whose handle belongs to the live model"),
    "_orig_mod": ("task/torch_compile.py", "the name of a compiled module's inside in state_dict"),
    "_torchdynamo_orig_callable": (
        "task/torch_compile.py",
        "marks a forward that was compiled on its own",
    ),
    "_checkpoint_without_reentrant_generator": (
        "task/activation_checkpointing.py",
        "there is no switch to compute a checkpointed part once",
    ),
    "_checkpoint_without_reentrant_generator_impl": (
        "task/activation_checkpointing.py",
        "its name since torch 2.14",
    ),
}
VAGUE = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}
# Where things were fetched from is no business of a reader.
# In parts, so that this file does not name what it bans.
BANNED = tuple(
    f"{name}.{end}"
    for name, end in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("anaconda", "org"),
        ("npmjs", "org"),
    )
)


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
    ours = (n.split(".") for n in imported_modules(parsed(path)) if n.split(".")[0] == "backtrail")
    return {".".join(parts[1:2]) or "__init__" for parts in ours} - {"__version__"}


def parsed(path: Path) -> ast.Module:
    """Read a module as a syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    """A module imports only the layers below its own."""
    assert imported_layers(path) <= MAY_IMPORT[layer(path)]


@pytest.mark.parametrize("name", METHOD_MAY_IMPORT)
def test_methods_keep_apart(name: str) -> None:
    """A method imports only methods that it builds on, and shared modules import none."""
    folder = PACKAGE / "methods"
    imported = {
        parts[2]
        for path in sorted((folder / name).rglob("*.py"))
        for module in imported_modules(parsed(path))
        if (parts := module.split("."))[:2] == ["backtrail", "methods"]
    }
    assert imported & set(METHOD_MAY_IMPORT) <= METHOD_MAY_IMPORT[name]
    shared = {module for path in folder.glob("*.py") for module in imported_modules(parsed(path))}
    assert not any(module.startswith(f"backtrail.methods.{name}.") for module in shared)


def test_only_show_prints() -> None:
    """`print` is called in cli/show.py and nowhere else in the package."""
    printing = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Name) and node.id == "print" and path != PACKAGE / "cli" / "show.py"
    ]
    assert printing == []


def private_names(path: Path) -> set[str]:
    """Names that start with one underscore and are used in a module, but not defined in it.

    Also among strings, which `getattr` and the like take.
    """
    defined: set[str] = set()
    used: set[str] = set()
    for node in ast.walk(parsed(path)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                defined.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                defined.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store()):
                defined.add(name)
            case ast.Attribute(attr=name):
                used.add(name)
            case ast.Constant(value=str(name)) if name.isidentifier():
                used.add(name)
    for module in imported_modules(parsed(path)):
        used.update(module.split("."))
    return {name for name in used - defined if name.startswith("_") and name[1:2] != "_"} - {"_"}


def test_private_names_of_torch_are_listed() -> None:
    """Private names of torch are used in the one module listed, and all listed are used."""
    homes: dict[str, list[str]] = {}
    for path in MODULES:
        if layer(path) != "accel":
            for name in private_names(path):
                homes.setdefault(name, []).append(str(path.relative_to(PACKAGE)))
    assert homes == {name: [home] for name, (home, _) in PRIVATE_NAMES.items()}
    assert len(PRIVATE_NAMES) < 15


def test_modules_are_named_for_what_they_hold() -> None:
    """No module or folder has a name that would fit any content."""
    names = {part.removesuffix(".py") for p in PYTHON_FILES for part in p.relative_to(ROOT).parts}
    assert names & VAGUE == set()


@pytest.mark.parametrize(
    "path", [*PYTHON_FILES, *BENCHMARKS], ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_module_imports_tests(path: Path) -> None:
    """No module imports a `test_*` module or a conftest."""
    parts = {part for module in imported_modules(parsed(path)) for part in module.split(".")}
    assert {p for p in parts if p == "conftest" or p.startswith("test_")} == set()


def test_texts_speak_of_the_project_alone() -> None:
    """No file names a package registry."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = {ROOT / name for name in tracked.split("\0") if name} - {Path(__file__).resolve()}
    texts = {p: p.read_bytes().decode("utf-8", errors="ignore") for p in paths if p.is_file()}
    assert [(str(p), word) for p, text in texts.items() for word in BANNED if word in text] == []


def test_public_names_resolve() -> None:
    """Every public name exists, and type checkers see it at the same place."""
    backtrail = importlib.import_module("backtrail")
    for name in backtrail.__all__:
        assert getattr(backtrail, name) is not None, name
    told = set(imported_modules(parsed(PACKAGE / "__init__.py"))) - {"importlib.import_module"}
    homes = {f"{module}.{name}" for name, module in backtrail._HOME.items()} | {"backtrail.plot"}
    assert {name for name in told if name.startswith("backtrail")} == homes


def test_importing_backtrail_is_light() -> None:
    """`import backtrail` imports no library that is slow to import."""
    heavy = "{'torch', 'numpy', 'scipy', 'polars', 'zarr', 'matplotlib', 'jaxtyping', 'tyro'}"
    code = f"import sys, backtrail; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
