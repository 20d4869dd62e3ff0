"""Errors are one line on stderr that says what to do, and exit with code 2."""

import sys
from pathlib import Path

import pytest

from backtrail import cli
from backtrail.cli import show
from backtrail.cli.reference import _load
from tests.cli.attributed_run import AttributedRun

Captured = pytest.CaptureFixture[str]


def failing(capsys: Captured, *arguments: str) -> str:
    """Run a command that must fail; return its one line."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("backtrail: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "has no 'nothing'. A Task in this file: task, task_maker."),
        ("number", "has 'number', which is a int, not a Task"),
        ("broken", "my_file.py, line 22: ZeroDivisionError: division by zero"),
    ],
)
def test_wrong_names_in_a_file(
    attributed: AttributedRun, capsys: Captured, *, name: str, said: str
) -> None:
    """A missing name, another type and a failing function are named, with the names there are."""
    assert said in failing(capsys, "verify", attributed.run, "--task", attributed.at(name))


@pytest.mark.parametrize("reference", ["my_file.py", "nowhere.py:task", ":task", "my_file.py:"])
def test_references_that_lead_nowhere(
    attributed: AttributedRun, capsys: Captured, reference: str
) -> None:
    """An incomplete reference is refused, with how to write one."""
    assert "Write FILE.py:NAME, for example my_file.py:task." in failing(
        capsys, "verify", attributed.run, "--task", reference
    )


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1\ny = x +\n", "line 2: SyntaxError"),
        ("\nimport no_such_module\n", "line 2: ModuleNotFoundError"),
        ("import math\ntask = math.sqrt()\n", "line 2: TypeError"),
    ],
)
def test_files_that_do_not_run(
    attributed: AttributedRun, capsys: Captured, tmp_path: Path, *, source: str, said: str
) -> None:
    """An error in the user's file is given with its line."""
    path = tmp_path / "mine.py"
    path.write_text(source)
    assert said in failing(capsys, "verify", attributed.run, "--task", f"{path}:task")


def test_no_queries_in_a_file(capsys: Captured, attributed: AttributedRun, tmp_path: Path) -> None:
    """A file without a query is refused."""
    path = tmp_path / "empty.py"
    path.write_text("x = 1\n")
    flags = (
        "--task",
        attributed.at("task"),
        "--queries",
        f"{path}:queries",
        "--out",
        str(tmp_path / "out"),
    )
    assert "There is no Query in this file." in failing(capsys, "attribute", attributed.run, *flags)


def test_only_data_sets_are_named_as_such(
    attributed: AttributedRun, capsys: Captured, tmp_path: Path
) -> None:
    """Only data sets are suggested as such, and nothing is written before they are found."""
    flags = (
        "--task",
        attributed.at("task"),
        "--samples",
        "3",
        "--out",
        str(tmp_path / "model.safetensors"),
    )
    said = failing(capsys, "forget", attributed.run, *flags, "--test", attributed.at("nothing"))
    assert said.endswith("my_file.py has no 'nothing'. A data set in this file: data.\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("coreset", "--out", "kept.parquet"),
            "Invalid out='kept.parquet': expected a file name that ends",
        ),
        (("forget", "--samples", "3", "--out", "model.pt"), "ends with .safetensors"),
        (
            ("forget", "--out", "model.safetensors", "--samples"),
            "expected one or more samples to forget",
        ),
    ],
)
def test_files_and_samples_that_are_none(
    attributed: AttributedRun, capsys: Captured, *, words: tuple[str, ...], said: str
) -> None:
    """File names with another ending, and no samples, are refused."""
    assert said in failing(
        capsys, words[0], attributed.run, "--task", attributed.at("task"), *words[1:]
    )


def test_errors_of_the_library_are_lines_too(
    attributed: AttributedRun, capsys: Captured, tmp_path: Path
) -> None:
    """Errors of the library are one line, without a traceback."""
    assert "holds no run" in failing(capsys, "info", str(tmp_path))
    assert "holds no influence" in failing(capsys, "top", str(tmp_path))
    assert "no sample 99" in failing(capsys, "curve", attributed.influence, "--sample", "99")
    assert "no query 'accuracy'" in failing(
        capsys, "top", attributed.influence, "--query", "accuracy"
    )
    assert "was not observed" in failing(capsys, "top", attributed.influence, "--window", "0", "4")


def test_trust_wants_the_influences_own_run(
    attributed: AttributedRun, capsys: Captured, tmp_path: Path
) -> None:
    """Influence of another run is refused, even of the same training."""
    other = tmp_path / "other"
    _load(attributed.folder / "my_file.py").train(str(other))
    said = failing(capsys, "trust", str(other), attributed.influence, *attributed.references)
    assert "Open the run that it was computed from." in said


def test_system_errors_are_lines_too(
    attributed: AttributedRun, capsys: Captured, tmp_path: Path
) -> None:
    """Errors of the operating system are one line, too."""
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out")
    assert "file" in failing(
        capsys, "attribute", attributed.run, *attributed.references, "--out", out
    )


def test_demo_without_its_extra(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing extra is named before any file is written."""
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert "pip install 'backtrail[demo]'" in failing(
        capsys, "demo", "--out", str(tmp_path / "demo")
    )
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_quietly(
    attributed: AttributedRun, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt prints nothing, and exits with code 130."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(show, "table", interrupt)
    assert cli.main(["top", attributed.influence]) == 130
    assert capsys.readouterr() == ("", "")


def test_wrong_flags_end_with_two(capsys: Captured) -> None:
    """An unknown flag is refused, and the help is named."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["top", "somewhere", "--kk", "3"])
    assert stopped.value.code == 2
    assert "--help" in capsys.readouterr().err
