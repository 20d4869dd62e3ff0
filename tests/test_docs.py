"""The documentation names only what exists: paths, modules, public names, commands, links."""

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import backtrail
from backtrail import cli
from tests.import_directions import MAY_IMPORT
from tests.pages import PAGES, ROOT, code_blocks, prose, text_of

# Folders whose files the pages name, and where those paths start.
FOLDERS = ("src", "tests", "bench", "docs", "examples")
SETS = ("GROUND", "TASK", "STEP", "SWEEP", "RESULT", "METHODS")


def anchor(heading: str) -> str:
    """Make the anchor of a heading, as GitHub and MyST do: lower case, and - for spaces."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """Make the anchors of all headings of a page."""
    return {anchor(title) for title in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)}


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Yield the local links of a page, each as path and anchor."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in target:
            path, _, place = target.partition("#")
            yield path, place


def resolves(name: str) -> bool:
    """Whether a dotted name such as `backtrail.plot.curve` exists."""
    parts = name.split(".")
    found: object = backtrail
    for end, part in enumerate(parts[1:], 2):
        module = ".".join(parts[:end])
        if hasattr(found, part):
            found = getattr(found, part)
        elif importlib.util.find_spec(module) is not None:
            found = importlib.import_module(module)
        else:
            return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    """Every path in the repository that a page names is there."""
    pattern = rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w/.*-]*)"
    named = {path.rstrip(".") for path in re.findall(pattern, text_of(page))}
    ignored = ("docs/_build",)  # made by `make docs`
    missing = [path for path in named if not path.startswith(ignored) and not any(ROOT.glob(path))]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_are_run_exist(page: Path) -> None:
    """Every `python -m bench.x` is a module or a package that can be run."""
    for module in re.findall(r"python -m (bench[\w.]*)", text_of(page)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page: Path) -> None:
    """Every `backtrail.name` is an attribute or a module."""
    named = set(re.findall(r"(?<![\w/.-])backtrail(?:\.[A-Za-z_]\w*)+", text_of(page)))
    assert [name for name in sorted(named) if not resolves(name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    """Every local link leads to a file, and to a heading in it."""
    broken = []
    for path, place in links(page):
        target = page.parent / path if path else page
        made = path.startswith("auto_examples/")  # by sphinx-gallery, from examples/
        source = ROOT / "examples" / f"{target.stem}.py"
        if made and (source.is_file() or target.stem == "index"):
            continue
        if not target.exists() or (place and place not in anchors(target)):
            broken.append(f"{path}#{place}")
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_parse(page: Path) -> None:
    """Every Python block is valid syntax; tests/test_snippets.py runs the first of each page."""
    for block in code_blocks(page, "python"):
        ast.parse(block)


def test_every_page_is_in_the_contents() -> None:
    """Every page of the documentation stands in a table of contents, and no other does."""
    trees = code_blocks(ROOT / "docs" / "index.md", r"\{toctree\}")
    entries = {
        line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")
    }
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert entries - {"auto_examples/index"} == pages


def test_every_public_name_is_documented() -> None:
    """Every public name stands on the page of public names."""
    page = text_of(ROOT / "docs" / "api.md")
    named = set(re.findall(r"backtrail\.(\w+)", page))
    assert set(backtrail.__all__) - named == {"__version__"}


@pytest.mark.parametrize("verb", cli.VERBS, ids=lambda verb: verb.__name__)
def test_commands_are_documented(verb: object) -> None:
    """Every command has a section with exactly its options."""
    assert inspect.isfunction(verb)
    sections = re.split(r"^## backtrail ", text_of(ROOT / "docs" / "cli.md"), flags=re.MULTILINE)
    (section,) = [text for text in sections if text.split("\n", 1)[0] == verb.__name__]
    documented = set(re.findall(r"^\| `(?:--)?([\w-]+)", section, re.MULTILINE))
    options = {name.replace("_", "-").lower() for name in inspect.signature(verb).parameters}
    assert {name.lower() for name in documented} == options


def test_the_map_says_what_may_import_what() -> None:
    """The table of CONTRIBUTING.md allows the imports of tests/import_directions.py."""
    page = text_of(ROOT / "CONTRIBUTING.md")
    sets: dict[str, set[str]] = {}
    for name in SETS:
        (line,) = re.findall(rf"^\* {name}: (.*)$", page, re.MULTILINE)
        sets[name] = expanded(line, sets)
    found = {}
    for label, cell in re.findall(r"^\| `([\w/.]+)` \|.*\| ?(.*)\|$", page, re.MULTILINE):
        path = ROOT / "src" / "backtrail" / label
        assert path.is_dir() if label.endswith("/") else path.is_file(), label
        found[label.strip("/").removesuffix(".py")] = expanded(cell, sets)
    for label, imports in found.items():
        folder = label.split("/")[0]
        assert imports | {folder} == MAY_IMPORT[folder], label
    # `view` has no files yet, and `__init__` is no folder.
    assert {label for label in found if "/" not in label} == set(MAY_IMPORT) - {"view", "__init__"}


def expanded(cell: str, sets: dict[str, set[str]]) -> set[str]:
    """Read a list of folders and sets, such as "STEP, `run`"."""
    names = {name.strip(" `") for name in cell.split(",")} - {""}
    folders = names - set(sets)
    for name in names & set(sets):
        folders |= sets[name]
    return folders
