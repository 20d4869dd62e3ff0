"""Sphinx configuration of the documentation; `make docs` builds it."""

import os
from pathlib import Path

import backtrail

HERE = Path(__file__).resolve().parent
# The matrices of the examples are so small that several threads are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

project = "backtrail"
author = "the authors of backtrail"
copyright = author
release = version = backtrail.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "backtrail"

autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def titled_examples() -> str:
    """Copy the examples into a build folder, with the file name as title, and return the folder."""
    folder = HERE / "_build" / "examples"
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted((HERE.parent / "examples").glob("*.py"))
    for old in set(folder.glob("*.py")) - {folder / source.name for source in sources}:
        old.unlink()
    for source in sources:
        title = source.stem.replace("_", " ").capitalize()
        text = source.read_text(encoding="utf-8").replace(
            '"""', f'"""{title}\n{"=" * len(title)}\n\n', 1
        )
        copy = folder / source.name
        if not copy.is_file() or copy.read_text(encoding="utf-8") != text:
            copy.write_text(text, encoding="utf-8")
    header = (
        "Examples\n========\n\n"
        "Complete programs, with the output that they printed when these pages were built.\n"
    )
    (folder / "GALLERY_HEADER.rst").write_text(header, encoding="utf-8")
    return str(folder)


sphinx_gallery_conf = {
    "examples_dirs": titled_examples(),
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"\.py$",
    "image_scrapers": (),
    "reset_modules": (),
    "within_subsection_order": "FileNameSortKey",
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "write_computation_times": False,
}
