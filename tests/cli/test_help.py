"""Flags are frozen, every command has help, and help is printed at once."""

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import backtrail
from backtrail import cli
from backtrail.cli import show

Captured = pytest.CaptureFixture[str]

# Changing a line here breaks somebody's script.
FLAGS = {
    "demo": ["--out"],
    "info": ["RUN", "--form"],
    "verify": ["RUN", "--task", "--tolerance"],
    "attribute": ["RUN", "--task", "--queries", "--out", "--observed-at", "--method"],
    "top": ["INFLUENCE", "--k", "--query", "--order", "--window", "--form"],
    "curve": ["INFLUENCE", "--sample", "--query", "--form"],
    "patterns": ["INFLUENCE", "--query", "--form"],
    "regimes": ["RUN", "INFLUENCE", "--query", "--form"],
    "trust": ["RUN", "INFLUENCE", "--task", "--queries", "--removals", "--seed"],
    "evaluate": ["RUN", "INFLUENCE", "--task", "--queries", "--bank", "--form"],
    "forget": ["RUN", "--task", "--samples", "--out", "--replay", "--test"],
    "clean": ["RUN", "--task", "--method", "--validation", "--out", "--form"],
    "coreset": ["RUN", "--task", "--fraction", "--method", "--out", "--form"],
}

Verb = Callable[..., object]


def helped(capsys: Captured, *arguments: str) -> str:
    """Return what a call for help prints."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def spelled(verb: Verb) -> list[str]:
    """Return the arguments of a command as they are typed, positional ones in capitals."""
    arguments = inspect.signature(verb).parameters.values()
    dashed = [(a.name.upper(), "--" + a.name.replace("_", "-")) for a in arguments]
    return [
        flag if a.kind is a.KEYWORD_ONLY else word
        for a, (word, flag) in zip(arguments, dashed, strict=True)
    ]


def test_flags_are_frozen() -> None:
    """Commands and flags are exactly these, with at most six flags each."""
    assert {verb.__name__: spelled(verb) for verb in cli.VERBS} == FLAGS
    assert all(
        len([word for word in words if word.startswith("--")]) <= 6 for words in FLAGS.values()
    )


@pytest.mark.parametrize("verb", cli.VERBS, ids=lambda verb: verb.__name__)
def test_every_command_explains_itself(verb: Verb, capsys: Captured) -> None:
    """The help has all arguments, their descriptions and an example."""
    told = helped(capsys, verb.__name__, "--help")
    assert f"Example: backtrail {verb.__name__}" in told
    assert (verb.__doc__ or "").splitlines()[0] in " ".join(told.split())
    for word in FLAGS[verb.__name__]:
        assert word in told
        name = word.strip("-").lower().replace("-", "_")
        assert f"\n    {name}: " in inspect.cleandoc(verb.__doc__ or "")


def test_descriptions_are_wrapped_once(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """The help is wrapped to the terminal's width, not as the docstring is."""
    monkeypatch.setenv("COLUMNS", "300")
    said = helped(capsys, "verify", "--help")
    assert "the name of the task in it, or of a function that returns it. (required)" in said


def test_examples_name_real_flags() -> None:
    """Every flag in an example is one of the command's."""
    for verb in cli.VERBS:
        doc = verb.__doc__ or ""
        example = doc[doc.index("Example:") :].split("\n\n")[0]
        assert {word for word in example.split() if word.startswith("--")} <= set(
            FLAGS[verb.__name__]
        )


def test_help_lists_all_commands(capsys: Captured) -> None:
    """`backtrail --help`, and `backtrail` alone, list all commands."""
    told = helped(capsys, "--help")
    assert all(f"• {name} " in told for name in FLAGS)
    assert "Example" not in told
    assert helped(capsys) == told


def test_the_version_is_printed(capsys: Captured) -> None:
    """`backtrail --version` prints the version of the package."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"backtrail {backtrail.__version__}\n"


def test_help_loads_nothing_heavy() -> None:
    """Help imports no library that is slow to import."""
    heavy = "{'torch', 'numpy', 'scipy', 'polars', 'zarr', 'matplotlib', 'sklearn'}"
    code = (
        "import sys\nfrom backtrail.cli import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit: print('HEAVY', *sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["HEAVY"]


def test_the_program_is_installed() -> None:
    """The entry point runs, and a closed pipe gives no traceback."""
    program = Path(sys.executable).with_name("backtrail")
    if not program.exists():
        pytest.skip("backtrail is not installed in this environment")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([program, "--help"], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("found", "started", "said"),
    [
        ("/bin/backtrail", ".venv/bin/backtrail", "backtrail"),
        (None, ".venv/bin/backtrail", ".venv/bin/backtrail"),
        (None, "pytest", "backtrail"),
    ],
)
def test_suggested_commands_can_be_typed(
    monkeypatch: pytest.MonkeyPatch, *, found: str | None, started: str, said: str
) -> None:
    """A program that is not on the PATH is suggested by its path."""
    monkeypatch.setattr(shutil, "which", {"backtrail": found}.get)
    monkeypatch.setattr(sys, "argv", [str(Path.cwd() / started)])
    assert show.command("top", "run/dit") == f"{said} top run/dit"
