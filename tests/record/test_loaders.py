"""The row numbers of a loader's batches, and loaders that cannot be recorded."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

import backtrail
from backtrail.errors import UnreadableData, UnrepeatableRows, UnwatchableLoader
from tests.loops import (
    ORDER,
    Loop,
    mlp,
    recorded_loop,
    refused,
    rows,
    sample_numbers,
    sequential_batches,
    stochastic_mlp,
)
from tests.processes import in_fresh_process

Watch = Callable[[Any], Any]


def test_an_epoch_may_end_early(tmp_path: Path) -> None:
    """Batches that workers fetched ahead of a loop that broke off are not recorded."""
    loop = Loop.of(stochastic_mlp())
    loader = loop.loader(num_workers=2, **ORDER)

    def train(watch: Watch) -> None:
        for _ in range(3):
            for number, batch in enumerate(watch(loader)):
                loop.backward(batch)
                loop.step()
                if number == 1:
                    break

    run = recorded_loop(loop, tmp_path / "run", train)
    assert sample_numbers(run) == [[batch] for batch in sequential_batches(22, 4)[:2]] * 3
    assert run.epochs == (2, 4, 6)


def with_replacement() -> Any:
    """Make a sampler that draws with replacement."""
    return RandomSampler(range(22), replacement=True, num_samples=30)


def weighted() -> Any:
    """Make a sampler that draws some rows more often."""
    return WeightedRandomSampler([1.0] * 11 + [3.0] * 11, 25)


@pytest.mark.parametrize("sampler", [with_replacement, weighted])
def test_sampled_rows_are_the_fed_rows(sampler: Callable[[], Any], tmp_path: Path) -> None:
    """The recorded row numbers are those of the batches that the loop got."""
    loop = Loop.of(mlp())
    seen = []

    def train(watch: Watch) -> None:
        for batch in watch(DataLoader(loop.data, batch_size=4, sampler=sampler())):
            seen.append(batch[0])
            loop.backward(batch)
            loop.step()

    run = recorded_loop(loop, tmp_path / "run", train)
    assert all(
        torch.equal(loop.data.tensors[0][list(step.samples)], fed)
        for step, fed in zip(run.log, seen, strict=True)
    )


def test_a_batch_sampler_of_ones_own_is_followed(tmp_path: Path) -> None:
    """Batches of any size, given by any iterable of row numbers, are recorded."""
    chosen = [[3, 1, 1], [0], [21, 20, 19, 18], [5, 6]]
    loop = Loop.of(mlp())
    run = recorded_loop(
        loop,
        tmp_path / "run",
        lambda watch: loop.train(watch, DataLoader(loop.data, batch_sampler=chosen)),
    )
    assert sample_numbers(run) == [[tuple(batch)] for batch in chosen] * 2
    sampler = BatchSampler(SequentialSampler(loop.data), 5, drop_last=True)
    again = Loop.of(mlp())
    run = recorded_loop(
        again,
        tmp_path / "b",
        lambda watch: again.train(watch, DataLoader(again.data, batch_sampler=sampler)),
    )
    assert sample_numbers(run) == [[batch] for batch in sequential_batches(22, 5)[:4]] * 2


def test_two_loaders_take_turns(tmp_path: Path) -> None:
    """A step's batch is the one that the loop got last, from whichever loader."""
    loop = Loop.of(mlp())

    def train(watch: Watch) -> None:
        for pair in zip(
            watch(loop.loader(**ORDER)), watch(loop.loader(batch_size=3, **ORDER)), strict=False
        ):
            loop.backward(pair[1])
            loop.step()

    run = recorded_loop(loop, tmp_path / "run", train)
    assert sample_numbers(run)[:2] == [[(0, 1, 2)], [(3, 4, 5)]]


class Stream(IterableDataset[Any]):
    """Rows without numbers."""

    def __iter__(self) -> Iterator[Any]:
        """Iterate over all rows."""
        return iter(rows())


def other_collate(items: list[Any]) -> Any:
    """Collate as a function other than the task's."""
    return torch.utils.data.default_collate(items)


LOADERS: list[tuple[Callable[[Any], Any], str, str]] = [
    (
        lambda data: DataLoader(data, collate_fn=other_collate),
        "collate_fn is not the task's",
        "collate=loader.collate_fn",
    ),
    (
        lambda _: DataLoader(rows(7)),
        "another data set (7 rows) than the task (22 rows)",
        "validation loaders",
    ),
    (lambda _: DataLoader(Stream(), batch_size=4), "no batch sampler", "map-style"),
    (lambda data: DataLoader(data, batch_size=None), "no batch sampler", "map-style"),
    (
        lambda data: DataLoader(data, in_order=False, num_workers=1),
        "in_order=False",
        "in_order=True",
    ),
]


@pytest.mark.parametrize(
    ("make", "what", "cure"), LOADERS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_loaders_that_cannot_be_followed(
    make: Callable[[Any], Any], what: str, cure: str, *, tmp_path: Path
) -> None:
    """The message says what is wrong with a loader and what to change."""
    loop = Loop.of(mlp())
    with refused(UnwatchableLoader, what, "Fix:", cure), loop.recorder(tmp_path) as recorder:
        recorder.watch(make(loop.data))


def watched_list(path: Path) -> None:
    """Watch a list instead of a loader."""
    with Loop.of(mlp()).recorder(path) as recorder:
        recorder.watch([])


def test_what_is_no_loader(tmp_path: Path) -> None:
    """What is not a loader is refused by its type."""
    with refused(UnwatchableLoader, "it is a list", "torch.utils.data.DataLoader"):
        in_fresh_process(watched_list, tmp_path)


def test_a_loader_of_other_rows_of_the_same_number(tmp_path: Path) -> None:
    """Another data set of the same length is found, as the rows are read again."""
    loop = Loop.of(mlp())
    with (
        refused(UnrepeatableRows, "another data set than the task's"),
        loop.recorder(tmp_path) as recorder,
    ):
        loop.train(recorder.watch, DataLoader(rows(seed=9), batch_size=4))


def test_a_stream(tmp_path: Path) -> None:
    """A data set without row numbers is refused as the task's data."""
    loop = Loop.of(mlp())
    task = backtrail.Task(loop.model, Stream(), cross_entropy)
    with refused(UnreadableData, "Stream", "map-style"):
        backtrail.Recorder(tmp_path, task, loop.optimizer)
