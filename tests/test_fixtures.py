"""Folders of earlier versions are opened with the right numbers, or refused by their format."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backtrail
from backtrail import errors
from tests.fixtures import write

FOLDERS = sorted(
    path for path in write.FOLDER.iterdir() if path.is_dir() and path.name[0].isdigit()
)
# Versions whose folders this one refuses: it must say which format they have and what to do. Empty:
# all of them are read.
REFUSED: set[str] = set()

readable = pytest.mark.parametrize(
    "folder", [path for path in FOLDERS if path.name not in REFUSED], ids=lambda path: path.name
)


def expected_of(folder: Path) -> Any:
    """The numbers that the version read which wrote the folder."""
    return json.loads((folder / "expected.json").read_text(encoding="utf-8"))


def opened(folder: Path) -> backtrail.Run:
    """The finished run."""
    return backtrail.open_run(folder / "run", write.task())


def assert_log(run: backtrail.Run, expected: Any, steps: int) -> None:
    """The step log has the samples, and the norms of gradients, of the first steps."""
    assert run.steps == steps
    assert [list(step.samples) for step in run.log] == expected["samples"][:steps]
    assert [step.norm for step in run.log] == expected["norms"][:steps]


@readable
def test_a_run_has_its_states_and_steps(folder: Path) -> None:
    """All numbers to the bit, and a replay with the stored batch meets them."""
    run = opened(folder)
    expected = expected_of(folder)
    assert run.manifest.finished
    assert_log(run, expected, expected["steps"])
    assert [record.stored for step in run.log for record in step.fed].count(True) == 1
    assert list(run.kept) == expected["stored"]
    for state, params in expected["params"].items():
        found = run.state(int(state)).params
        assert {name: tensor.tolist() for name, tensor in found.items()} == params
    moments = run.state(run.steps).moments
    momentum = {name: tensors["momentum_buffer"].tolist() for name, tensors in moments.items()}
    assert momentum == expected["momentum"]
    assert run.verify().difference <= 1e-9


@readable
def test_a_run_that_was_interrupted_has_its_complete_steps(folder: Path) -> None:
    """Its log is a journal, and begins as that of the finished run, with the same stored batch."""
    run = backtrail.open_run(folder / "interrupted", write.task())
    assert not run.manifest.finished
    assert_log(run, expected_of(folder), write.LAST + 1)
    assert run.verify().difference <= 1e-9


@readable
def test_an_influence_has_its_numbers(folder: Path) -> None:
    """As they were stored, and as the run gives them today."""
    run = opened(folder)
    influence = backtrail.open_influence(folder / "influence")
    expected = np.array(expected_of(folder)["influence"])
    assert np.array_equal(influence.total(), expected)
    anew = backtrail.DIT().attribute(run, write.queries())
    np.testing.assert_allclose(anew.total(), expected, rtol=1e-9, atol=1e-15)


@readable
def test_embeddings_have_their_numbers(folder: Path, tmp_path: Path) -> None:
    """As they were stored, as what was captured gives them today, and as a replay does.

    A query meets a stored embedding only if both are projected alike: the projection is drawn from
    its seed again.
    """
    run = opened(folder)
    expected = np.array(expected_of(folder)["embeddings"])
    stored = backtrail.open_embeddings(folder / "embeddings", run)
    found = stored.attribute(write.queries()).total()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)
    for source in (run, without_captured(run, tmp_path / "run")):
        anew = write.embedding().embed(source)
        np.testing.assert_allclose(anew.values(), stored.values(), rtol=1e-9, atol=1e-13)


def without_captured(run: backtrail.Run, path: Path) -> backtrail.Run:
    """The same run without what was captured, so that an embedding has to replay it."""
    shutil.copytree(run.path, path)
    manifest = json.loads((path / "manifest.json").read_text())
    captured = [name for name in manifest["files"] if name.startswith("rows/")]
    assert captured
    for name in captured:
        del manifest["files"][name]
        (path / name).unlink()
    (path / "manifest.json").write_text(json.dumps(manifest))
    return backtrail.open_run(path, write.task())


def test_folders_of_this_version_are_read_and_small() -> None:
    """The newest fixture is that of this version, and no fixture takes 100 kB."""
    assert FOLDERS[-1].name == backtrail.__version__
    assert FOLDERS[-1].name not in REFUSED
    for folder in FOLDERS:
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 100_000


def test_versions_that_cannot_be_read_say_so() -> None:
    """By the number of their format."""
    for version in sorted(REFUSED):
        with pytest.raises(errors.WrongFormat, match=r"has format \d+; .* reads format \d+\. Use"):
            opened(write.FOLDER / version)


Opener = Callable[[Path, backtrail.Run], object]
OPENERS: dict[str, tuple[str, Opener]] = {
    "run": ("manifest.json", lambda path, run: backtrail.open_run(path, run.task)),
    "influence": ("zarr.json", lambda path, _: backtrail.open_influence(path)),
    "embeddings": ("zarr.json", backtrail.open_embeddings),
}


@pytest.mark.parametrize("name", OPENERS)
def test_a_later_format_is_refused(name: str, tmp_path: Path) -> None:
    """With both numbers and what to do."""
    path = shutil.copytree(FOLDERS[-1] / name, tmp_path / name)
    file, open_folder = OPENERS[name]
    content = json.loads((path / file).read_text())
    fields = content["attributes"] if file == "zarr.json" else content
    key = "format_version" if file == "zarr.json" else "format"
    current = fields[key]
    fields[key] = 99
    (path / file).write_text(json.dumps(content))
    message = rf"has format 99; .* reads format {current}\. Use the version that wrote it, or \w+"
    with pytest.raises(errors.WrongFormat, match=message):
        open_folder(path, opened(FOLDERS[-1]))


@pytest.mark.parametrize(
    ("name", "array"), [("influence", "influence"), ("embeddings", "embedding")]
)
def test_a_folder_cannot_bring_a_codec_that_runs_code(
    name: str, array: str, tmp_path: Path
) -> None:
    """Arrays of zarr format 2 can be pickles; the copy of the metadata may claim that format."""
    path = shutil.copytree(FOLDERS[-1] / name, tmp_path / name)
    content = json.loads((path / "zarr.json").read_text())
    arrays = content["consolidated_metadata"]["metadata"]
    arrays[array] = {
        "zarr_format": 2,
        "shape": arrays[array]["shape"],
        "chunks": arrays[array]["shape"],
        "dtype": "|O",
        "compressor": None,
        "fill_value": "",
        "order": "C",
        "filters": [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 4}],
        "dimension_separator": ".",
    }
    (path / "zarr.json").write_text(json.dumps(content))
    _, open_folder = OPENERS[name]
    damaged = (errors.DamagedInfluence, errors.DamagedEmbeddings)
    with pytest.raises(damaged, match=f"'{array}' has zarr format 2, not 3"):
        open_folder(path, opened(FOLDERS[-1]))
