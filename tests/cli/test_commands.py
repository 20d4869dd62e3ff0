"""Every command on a real run: what it prints in every form, and what it suggests next."""

import json
import shlex
import shutil
from io import StringIO
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

import backtrail
from backtrail import cli
from backtrail.cli.reference import task_at
from tests.cli.attributed_run import AttributedRun

Captured = pytest.CaptureFixture[str]


def run(capsys: Captured, *arguments: str) -> tuple[str, str]:
    """Run a command that must succeed; return what it printed to stdout and stderr."""
    capsys.readouterr()
    assert cli.main(arguments) == 0
    return capsys.readouterr()


def next_words(text: str) -> list[str]:
    """Return the words of the command that the last line suggests."""
    last = text.strip().splitlines()[-1]
    assert last.startswith("next: backtrail ")
    return shlex.split(last)[2:]


def test_info_tells_what_a_run_holds(attributed: AttributedRun, capsys: Captured) -> None:
    """The numbers are those of the training, without a task."""
    out, err = run(capsys, "info", attributed.run, "--form", "json")
    told = json.loads(out)
    assert (told["steps"], told["epochs"], told["training_samples"], told["states_kept"]) == (
        9,
        3,
        12,
        4,
    )
    assert (told["optimizer"], told["learning_rate"], told["samples_per_step"]) == (
        "SGD",
        [0.3, 0.3],
        [4, 4],
    )
    assert told["finished"] is True
    assert told["mebibytes_on_disk"] > 0
    assert next_words(err)[:2] == ["verify", attributed.run]


def test_info_tells_of_captured_rows(
    attributed: AttributedRun, capsys: Captured, tmp_path: Path
) -> None:
    """The size of captured rows is given where there are some."""
    copy = Path(shutil.copytree(attributed.run, tmp_path / "run"))
    assert "mebibytes_of_captured_rows" not in json.loads(
        run(capsys, "info", str(copy), "--form", "json")[0]
    )
    (copy / "rows").mkdir()
    (copy / "rows" / "00000000.safetensors").write_bytes(bytes(2**20))
    told = json.loads(run(capsys, "info", str(copy), "--form", "json")[0])
    assert told["mebibytes_of_captured_rows"] == 1
    assert told["mebibytes_on_disk"] > 1


def test_info_as_table_and_csv(attributed: AttributedRun, capsys: Captured) -> None:
    """The table has readable names and values, and CSV has a header."""
    table, _ = run(capsys, "info", attributed.run)
    assert "learning rate      0.3\n" in table
    assert "finished           yes\n" in table
    out, _ = run(capsys, "info", attributed.run, "--form", "csv")
    assert dict(pl.read_csv(StringIO(out)).iter_rows())["steps"] == "9"


def test_verify_replays(attributed: AttributedRun, capsys: Captured) -> None:
    """A run replays with a task, or with a function that makes it."""
    for name in ("task", "task_maker"):
        out, _ = run(capsys, "verify", attributed.run, "--task", attributed.at(name))
        assert out.startswith("passed: 9 steps replayed")
    assert next_words(out)[0] == "attribute"


def test_attribute_answers_as_the_library_does(attributed: AttributedRun) -> None:
    """The influence on disk is that of DIT for the same task and queries."""
    recorded = backtrail.open_run(attributed.run, task_at(attributed.at("task")))
    queries = backtrail.Loss(recorded.task.data, samples=[0, 3])
    expected = backtrail.DIT().attribute(recorded, queries, observed_at="epochs")
    found = backtrail.open_influence(attributed.influence)
    assert found.observed_at == (3, 6, 9)
    assert (found.values() == expected.values()).all()


def test_attribute_at_given_states(attributed: AttributedRun, capsys: Captured) -> None:
    """States may be numbers, and the suggested command opens the result."""
    out_folder = str(attributed.folder / "two states")
    out, _ = run(
        capsys,
        "attribute",
        attributed.run,
        *attributed.references,
        "--out",
        out_folder,
        "--observed-at",
        "2",
        "5",
    )
    assert backtrail.open_influence(out_folder).observed_at == (2, 5)
    assert "positive = helpful" in out
    assert next_words(out) == ["top", out_folder]


@pytest.mark.parametrize(
    ("method", "made"),
    [
        ("tracin", backtrail.TracIn()),
        ("gradient-dot", backtrail.GradientDot()),
        ("dve", backtrail.DataValueEmbedding()),
    ],
    ids=["tracin", "dot", "dve"],
)
def test_attribute_by_another_method(
    method: str,
    made: backtrail.TracIn | backtrail.GradientDot | backtrail.DataValueEmbedding,
    attributed: AttributedRun,
    capsys: Captured,
    tmp_path: Path,
) -> None:
    """The influence on disk is that of the method, and the output names it."""
    out, _ = run(
        capsys,
        "attribute",
        attributed.run,
        *attributed.references,
        "--out",
        str(tmp_path / "out"),
        "--method",
        method,
    )
    recorded = backtrail.open_run(attributed.run, task_at(attributed.at("task")))
    expected = made.attribute(recorded, backtrail.Loss(recorded.task.data, samples=[0, 3]))
    assert out.startswith(f"Influence by {type(made).__name__}")
    assert (backtrail.open_influence(tmp_path / "out").values() == expected.values()).all()


@pytest.mark.parametrize("query", ["1", "loss[3]"])
def test_top_lists_what_the_library_lists(
    attributed: AttributedRun, capsys: Captured, query: str
) -> None:
    """Query, order and window are those of `Influence.top`."""
    flags = ("--k", "4", "--query", query, "--order", "helpful", "--window", "3", "9")
    expected = backtrail.open_influence(attributed.influence).top(
        4, query=1, order="helpful", window=(3, 9)
    )
    out, err = run(capsys, "top", attributed.influence, *flags, "--form", "csv")
    assert pl.read_csv(StringIO(out)).rows() == expected.rows()
    assert next_words(err) == [
        "curve",
        attributed.influence,
        "--sample",
        str(expected["sample"][0]),
        "--query",
        query,
    ]
    out, _ = run(capsys, "top", attributed.influence, *flags, "--form", "json")
    assert [row["sample"] for row in json.loads(out)] == expected["sample"].to_list()


def test_top_for_people_says_what_a_number_means(
    attributed: AttributedRun, capsys: Captured
) -> None:
    """Query, window and sign stand above the table."""
    out, err = run(capsys, "top", attributed.influence)
    lines = out.splitlines()
    assert lines[0] == "loss[0], states 0 to 9"
    assert "positive = helpful" in lines[1]
    assert lines[3].split() == ["rank", "sample", "influence"]
    assert len(lines) == 3 + 11 + 2
    assert err == ""


def test_curve_follows_one_sample(attributed: AttributedRun, capsys: Captured) -> None:
    """The points are those of `Influence.curve`."""
    out, _ = run(capsys, "curve", attributed.influence, "--sample", "5", "--form", "csv")
    assert (
        pl.read_csv(StringIO(out)).rows()
        == backtrail.open_influence(attributed.influence).curve(sample=5).rows()
    )


def test_patterns_counts_every_sample_once(attributed: AttributedRun, capsys: Captured) -> None:
    """The four patterns are in order, and their shares add up to one."""
    out, err = run(capsys, "patterns", attributed.influence, "--form", "json")
    rows = json.loads(out)
    assert [row["pattern"] for row in rows] == ["early", "late", "stable", "fluctuating"]
    assert sum(row["samples"] for row in rows) == 12
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert next_words(err)[0] == "trust"


def test_regimes_tells_what_the_library_finds(attributed: AttributedRun, capsys: Captured) -> None:
    """The table is that of `backtrail.regimes`, without a task."""
    recorded = backtrail.open_run(attributed.run, task_at(attributed.at("task")))
    expected = backtrail.regimes(recorded, backtrail.open_influence(attributed.influence))
    out, err = run(capsys, "regimes", attributed.run, attributed.influence, "--form", "csv")
    assert pl.read_csv(StringIO(out)).rows() == expected.table().rows()
    assert next_words(err) == ["top", attributed.influence]
    out, _ = run(capsys, "regimes", attributed.run, attributed.influence, "--query", "1")
    assert out.startswith(
        backtrail.regimes(recorded, backtrail.open_influence(attributed.influence), query=1).summary
    )


def test_coreset_keeps_what_the_library_keeps(
    attributed: AttributedRun, capsys: Captured, tmp_path: Path
) -> None:
    """The file and the machine-readable forms have all rows, the table the first ten."""
    recorded = backtrail.open_run(attributed.run, task_at(attributed.at("task")))
    words = "coreset", attributed.run, "--task", attributed.at("task"), "--fraction"
    expected = backtrail.select_coreset(recorded, 0.95, method="loss")
    out, err = run(
        capsys,
        *words,
        "0.95",
        "--method",
        "loss",
        "--form",
        "csv",
        "--out",
        str(tmp_path / "kept.csv"),
    )
    assert pl.read_csv(StringIO(out)).equals(expected)
    assert pl.read_csv(tmp_path / "kept.csv").equals(expected)
    assert next_words(err) == ["info", attributed.run]
    out, _ = run(capsys, *words, "0.95")
    assert out.startswith("11 samples kept, by dve; the first 10\n\nsample")
    assert len(out.splitlines()) == 2 + 11 + 2
    assert next_words(out)[:2] == ["coreset", attributed.run]
    out, _ = run(capsys, *words, "0.5", "--method", "dit", "--form", "json")
    assert pl.read_json(StringIO(out)).equals(backtrail.select_coreset(recorded, 0.5, method="dit"))


def test_trust_states_three_checks(attributed: AttributedRun, capsys: Captured) -> None:
    """The statement has a line for each check, and the exit code is 0."""
    out, _ = run(
        capsys,
        "trust",
        attributed.run,
        attributed.influence,
        *attributed.references,
        "--removals",
        "12",
    )
    assert [line.split()[:2] for line in out.splitlines()[:3]] == [
        ["replay", "passed:"],
        ["derivative", "passed:"],
        ["removal", "passed:"],
    ]


def test_trust_fails_with_code_one(
    attributed: AttributedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed check is printed, and the exit code is 1."""
    monkeypatch.setattr("backtrail.apply.trust.GOOD", 1.1)
    assert (
        cli.main(
            [
                "trust",
                attributed.run,
                attributed.influence,
                *attributed.references,
                "--removals",
                "3",
            ]
        )
        == 1
    )


def test_clean_lists_what_the_library_lists(
    attributed: AttributedRun, capsys: Captured, tmp_path: Path
) -> None:
    """The ranking is that of `backtrail.find_mislabeled`, on screen and in the file."""
    recorded = backtrail.open_run(attributed.run, task_at(attributed.at("task")))
    expected = backtrail.find_mislabeled(recorded)
    path = tmp_path / "review.csv"
    task = ("--task", attributed.at("task"))
    out, err = run(capsys, "clean", attributed.run, *task, "--out", str(path), "--form", "json")
    assert [row["sample"] for row in json.loads(out)] == expected["sample"].to_list()
    assert pl.read_csv(path)["sample"].to_list() == expected["sample"].to_list()
    assert next_words(err)[0] == "attribute"
    out, _ = run(capsys, "clean", attributed.run, *task, "--method", "loss")
    assert out.startswith("the 12 most suspicious of 12 samples, by loss\n")
    assert next_words(out) == [
        "clean",
        attributed.run,
        *task,
        "--method",
        "loss",
        "--out",
        "review.csv",
    ]


def test_clean_asks_about_a_data_set_of_the_file(
    attributed: AttributedRun, capsys: Captured
) -> None:
    """Validation rows are given by reference, as the task is."""
    recorded = backtrail.open_run(attributed.run, task_at(attributed.at("task")))
    expected = backtrail.find_mislabeled(recorded, method="dit", validation=recorded.task.data)
    flags = (
        "--task",
        attributed.at("task"),
        "--method",
        "dit",
        "--validation",
        attributed.at("data"),
        "--form",
        "csv",
    )
    out, _ = run(capsys, "clean", attributed.run, *flags)
    assert pl.read_csv(StringIO(out))["sample"].to_list() == expected["sample"].to_list()


def test_next_commands_work(attributed: AttributedRun, capsys: Captured) -> None:
    """Every suggested command runs, from a run to a curve."""
    out, _ = run(capsys, "info", attributed.run)
    out, _ = run(
        capsys, *(word.replace("FILE.py:task", attributed.at("task")) for word in next_words(out))
    )
    for verb in ("attribute", "top", "curve", "patterns"):
        words = next_words(out)
        assert words[0] == verb
        out, _ = run(capsys, *words)
    assert next_words(out)[0] == "trust"


def test_evaluate_puts_influences_side_by_side(
    attributed: AttributedRun, capsys: Captured, tmp_path: Path
) -> None:
    """Every influence and measure has a row, and the bank stores the re-runs."""
    sides = attributed.influence, attributed.influence
    out, err = run(
        capsys,
        "evaluate",
        attributed.run,
        *sides,
        *attributed.references,
        "--bank",
        str(tmp_path),
        "--form",
        "csv",
    )
    table = pl.read_csv(StringIO(out))
    assert set(table["measure"]) == {"Pearson", "Spearman", "slope", "LDS, 5%"}
    assert set(table["method"]) == {attributed.influence}
    assert (
        len(list(tmp_path.iterdir())) == 1
    )  # 5 % of twelve are one, and each was left out already
    assert next_words(err)[0] == "trust"


def test_forget_writes_what_the_library_returns(
    attributed: AttributedRun, capsys: Captured, tmp_path: Path
) -> None:
    """The file is the state_dict of `backtrail.forget`."""
    file = tmp_path / "new" / "model.safetensors"
    flags = (
        "--task",
        attributed.at("task"),
        "--samples",
        "3",
        "5",
        "--replay",
        "4",
        "--out",
        str(file),
    )
    out, _ = run(capsys, "forget", attributed.run, *flags)
    recorded = backtrail.open_run(attributed.run, task_at(attributed.at("task")))
    expected = backtrail.forget(recorded, [3, 5], replay=4)
    found = load_file(file)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert out.startswith("2 samples forgotten, 4 tensors written")
    assert next_words(out)[-2:] == ["--test", attributed.at("test")]


def test_forget_is_judged_by_a_test_set(
    attributed: AttributedRun, capsys: Captured, tmp_path: Path
) -> None:
    """The three measures are printed, and a replay of all steps is suggested."""
    flags = (
        "--task",
        attributed.at("task"),
        "--samples",
        "3",
        "5",
        "--out",
        str(tmp_path / "model.safetensors"),
    )
    out, _ = run(capsys, "forget", attributed.run, *flags, "--test", attributed.at("data"))
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["parameters", "predictions", "membership"]
    out, _ = run(capsys, *next_words(out))
    assert "parameters   0.000" in out
