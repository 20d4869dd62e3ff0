"""Influence is written shard by shard: interruption, resuming and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from backtrail import errors
from backtrail.influence.influence import open_influence
from backtrail.influence.writer import InfluenceWriter, from_arrays
from tests.influence.made import SAMPLES, STEPS, description, losses, made, numbers, slots


def begun(path: Path | None, *done: int) -> InfluenceWriter:
    """Begin the influence of these tests; write some shards and mark them as done."""
    writer = InfluenceWriter.begin(path, description(), sample=slots(), dtype="float64")
    for shard in done:
        write(writer, shard)
        writer.mark_done(shard)
    return writer


def write(writer: InfluenceWriter, shard: int) -> None:
    """Write one shard without marking it."""
    start, stop = writer.shards[shard]
    writer.write(start, numbers()[:, :, start:stop], losses()[start:stop])


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_marks_are_remembered(tmp_path: Path, place: str) -> None:
    """Shards cover all steps, and those marked as done are known."""
    writer = begun(None if place == "memory" else tmp_path / "influence", 2, 0)
    assert writer.shards == [(0, 4), (4, 8), (8, 11)]
    assert writer.done == {0, 2}
    with pytest.raises(errors.UnfinishedInfluence, match="2 of 3 shards are done"):
        writer.finish()


@pytest.mark.parametrize("shard", [1, 2, 3, 11, 1000])
def test_the_shard_length_does_not_change_the_numbers(shard: int) -> None:
    """The sums do not depend on the shard length, up to rounding."""
    influence = from_arrays(description(shard=shard), numbers(), sample=slots())
    assert len(influence.description.shards) == -(-STEPS // shard)
    np.testing.assert_array_equal(influence.values(), numbers())
    np.testing.assert_allclose(influence.total(), made().total(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("cut", [0, 20, None])
@pytest.mark.parametrize("shard", [1, 2])
def test_resuming_after_a_kill_gives_the_same_bits(
    tmp_path: Path, shard: int, cut: int | None
) -> None:
    """A shard that is truncated, or written but not marked, is written again."""
    path = tmp_path / "influence"
    write(begun(path, 0), shard)
    if cut is not None:
        file = path / "influence" / "c" / "0" / "0" / str(shard) / "0"
        file.write_bytes(file.read_bytes()[:cut])
        (path / "loss" / "c" / str(shard) / "0").write_bytes(b"")
    writer = InfluenceWriter.resume(path, description())
    assert writer.done == {0}
    begun(path, 1, 2)
    influence = writer.finish()
    np.testing.assert_array_equal(influence.values(), numbers())
    np.testing.assert_array_equal(influence.loss, losses())


def test_a_kill_while_marking_leaves_no_mark(tmp_path: Path) -> None:
    """The temporary file of a mark does not count as a mark."""
    path = tmp_path / "influence"
    writer = begun(path, 0)
    (path / "done" / "000001.4711").write_text("{")
    assert writer.done == {0}


def test_a_kill_while_creating_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    """What an earlier attempt left next to the folder is removed."""
    scratch = tmp_path / ".influence.new"
    scratch.mkdir()
    (scratch / "zarr.json").write_text("{")
    begun(tmp_path / "influence", 0, 1, 2).finish()
    assert [file.name for file in tmp_path.iterdir()] == ["influence"]


def test_an_unfinished_folder_says_how_far_it_is(tmp_path: Path) -> None:
    """The message says how many shards are done, and how to resume."""
    begun(tmp_path / "influence", 0)
    with pytest.raises(errors.UnfinishedInfluence) as caught:
        open_influence(tmp_path / "influence")
    assert "1 of 3 shards are done" in str(caught.value)
    assert "attribute again with the same arguments to resume" in str(caught.value)


def test_resuming_with_other_arguments_lists_them(tmp_path: Path) -> None:
    """Fields and settings that differ are named with both values, and others are not."""
    path = tmp_path / "influence"
    begun(path, 0)
    other = description(method="TracIn", settings={"seed": 4, "curvature": "Hessian"})
    with pytest.raises(errors.DifferentInfluence) as caught:
        InfluenceWriter.resume(path, other)
    assert "method: 'made' in the folder, 'TracIn' now" in str(caught.value)
    assert "settings['seed']: 3 in the folder, 4 now" in str(caught.value)
    assert "curvature" not in str(caught.value)
    assert "unit" not in str(caught.value)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    """A folder that is not empty is refused, and an empty one is used."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(errors.FolderTaken, match="exists and is not empty"):
        begun(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    begun(tmp_path / "empty", 0, 1, 2).finish()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"queries": ("a", "a", "b")}, "no two alike: ('a', 'a', 'b')"),
        ({"queries": ()}, "queries need names"),
        ({"observed_at": (0, 7, 3, 10)}, "must ascend within 0 ... 11: (0, 7, 3, 10)"),
        ({"observed_at": (0, 3, 7, 12)}, "must ascend within 0 ... 11"),
        ({"observed_at": ()}, "observed_at must ascend"),
        ({"shard": 0}, "shard is 0, not at least 1"),
        ({"steps": 10}, "sample has shape (11, 4), steps and slots say (10, 4)"),
        ({"samples": 6}, "-1 (padding) ... 5: -1 ... 6"),
    ],
)
def test_a_description_must_fit(changes: dict[str, object], words: str) -> None:
    """A description that contradicts itself is refused, with what is wrong."""
    with pytest.raises(errors.IllFormedInfluence) as caught:
        InfluenceWriter.create(None, description(**changes), sample=slots(), dtype="float64")
    assert words in str(caught.value)


@pytest.mark.parametrize(("start", "size"), [(1, 4), (0, 3), (8, 4), (12, 4)])
def test_only_whole_shards_are_written(start: int, size: int) -> None:
    """A block that is not exactly a shard is refused, with both shapes."""
    block = np.zeros((3, 4, size, 4))
    with pytest.raises(errors.IllFormedInfluence) as caught:
        begun(None).write(start, block, block[0, 0])
    assert f"not {block.shape}" in str(caught.value)
    assert f"from step {start}" in str(caught.value)


def test_unknown_losses_are_nan() -> None:
    """Without losses all are NaN."""
    influence = from_arrays(description(), numbers(), sample=slots())
    assert np.isnan(influence.loss).all()
    assert influence.loss.shape == (STEPS, 4)


def test_stretches_without_influence_are_whole(tmp_path: Path) -> None:
    """Shards after the last observed state, which hold only zeros, can be opened."""
    about = description(observed_at=(3,))
    path = tmp_path / "influence"
    from_arrays(about, numbers()[:, [1]], sample=slots(), path=path)
    np.testing.assert_array_equal(open_influence(path).values(), numbers()[:, [1]])


@pytest.mark.parametrize("name", ["influence/c/0/0/1/0", "sample/c/0/0", "loss/c/2/0"])
@pytest.mark.parametrize("harm", ["missing", "short"])
def test_a_missing_or_short_file_is_named(tmp_path: Path, name: str, harm: str) -> None:
    """A missing or truncated file is named when the folder is opened."""
    path = tmp_path / "influence"
    made(path)
    if harm == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes((path / name).read_bytes()[:-5])
    with pytest.raises(errors.DamagedInfluence, match=name) as caught:
        open_influence(path)
    assert "Delete it and attribute again" in str(caught.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["influence/c/0/0/1/0", "sample/c/1/0"])
def test_a_changed_byte_is_noticed(tmp_path: Path, name: str) -> None:
    """A changed byte is found by its checksum when it is read."""
    path = tmp_path / "influence"
    made(path)
    data = bytearray((path / name).read_bytes())
    data[8] ^= 1
    (path / name).write_bytes(data)
    influence = open_influence(path)
    with pytest.raises(errors.DamagedInfluence, match=name.partition("/")[0]):
        influence.total()


def test_a_damaged_description_is_noticed(tmp_path: Path) -> None:
    """Metadata that is truncated, or lacks a field, is named."""
    path = tmp_path / "influence"
    made(path)
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text.replace('"unit"', '"units"'))
    with pytest.raises(errors.DamagedInfluence, match="unit"):
        open_influence(path)
    (path / "zarr.json").write_text(text[:100])
    with pytest.raises(errors.DamagedInfluence, match=r"zarr\.json cannot be read"):
        open_influence(path)


def test_what_is_no_influence_is_refused(tmp_path: Path) -> None:
    """A missing folder, an empty one and another format are refused, each with its reason."""
    with pytest.raises(errors.NotAnInfluence, match="no such folder"):
        open_influence(tmp_path / "nowhere")
    with pytest.raises(errors.NotAnInfluence, match=r"no zarr\.json there"):
        open_influence(tmp_path)
    path = tmp_path / "influence"
    made(path)
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(errors.WrongFormat, match=r"has format 2; .* reads format 1\. .* again"):
        open_influence(path)
    (path / "zarr.json").write_text(text.replace('"backtrail influence"', '"trail influence"'))
    with pytest.raises(
        errors.NotAnInfluence, match="'trail influence 1', not 'backtrail influence 1'"
    ):
        open_influence(path)


def test_many_samples_few_visits(tmp_path: Path) -> None:
    """A training set much larger than the batches is summed like others."""
    about = description(samples=1_000_000)
    influence = from_arrays(about, numbers(), sample=slots(), path=tmp_path / "influence")
    total = influence.total(query=0)
    assert total.shape == (1, 4, 1_000_000)
    np.testing.assert_array_equal(total[:, :, :SAMPLES], made().total(query=0))
