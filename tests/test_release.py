"""What is written about a release agrees with the release."""

import re
import subprocess
import tomllib
from pathlib import Path

import backtrail

ROOT = Path(__file__).resolve().parents[1]
FORMER = "wh" + "ence"  # in two parts, so that this file does not count


def test_version_is_everywhere_the_same() -> None:
    """In the package, as the newest of the changelog with its date, and in the citation."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})$", changelog, re.M)
    newest, date = versions[0]
    assert newest == backtrail.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {newest}\n" in citation
    assert f"\ndate-released: {date}\n" in citation


def test_constraint_is_a_supported_torch() -> None:
    """The version that is tested by default lies in the range that the project admits."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (lowest,) = [name for name in project["dependencies"] if name.startswith("torch>=")]
    (pinned,) = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert _numbers(pinned.removeprefix("torch==")) >= _numbers(lowest.removeprefix("torch>="))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_former_name_is_in_the_changelog_alone() -> None:
    """Who looks for it finds what it is called now."""
    command = ["git", "grep", "--untracked", "-il", FORMER]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert found.split() == ["CHANGELOG.md"]
