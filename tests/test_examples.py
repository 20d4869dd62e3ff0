"""Every example runs in an empty folder and environment, and prints something."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))
# Without these some systems find no temporary folder or no libraries. One thread, since tests share
# the cores.
KEPT = ("PATH", "HOME", "TMPDIR", "SYSTEMROOT", "LD_LIBRARY_PATH")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    """It prints a result, gives no warning, and leaves no file in the working folder."""
    environment = {name: os.environ[name] for name in KEPT if name in os.environ} | {
        "OMP_NUM_THREADS": "1"
    }
    command = [sys.executable, "-W", "error", str(path)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_says_what_it_shows(path: Path) -> None:
    """It has a docstring."""
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_there_are_examples() -> None:
    """The examples are found."""
    assert {path.stem for path in EXAMPLES} >= {"quickstart", "language_model"}
