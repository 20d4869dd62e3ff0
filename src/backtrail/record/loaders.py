"""Which samples are in each batch; loader, data set and collate function are left alone.

A loader's batch sampler is wrapped, and the row numbers that it yields are kept until their batch
arrives. With `Task(ids=...)` the ids are read from the batch itself instead.
"""

import copy
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from torch.utils.data import DataLoader, IterableDataset

from backtrail.errors import UnreadableData, UnwatchableLoader
from backtrail.task.task import Batch, Rows, Task


@final
@dataclass(frozen=True, slots=True)
class IdStream:
    """Any iterable of batches that carry the ids of their samples; used with `Task(ids=...)`."""

    batches: Any
    task: Task

    def __len__(self) -> int:
        """Number of batches, where the iterable knows it."""
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], Batch]]:
        """Yield the sample ids and the content of every batch, in order."""
        for batch in self.batches:
            ids = self.task.ids_of(batch)
            yield ids, batch


@final
class TrackedLoader:
    """A shallow copy of a loader that also yields the row numbers of every batch."""

    def __init__(self, loader: "DataLoader[Any]") -> None:
        self._sampler = _RememberingSampler(loader.batch_sampler)
        # The copy shares generators, workers and data set with the original, so it draws the same
        # batches. `DataLoader.__setattr__` forbids replacing a sampler: write past it.
        self._loader = copy.copy(loader)
        self._loader.__dict__["batch_sampler"] = self._sampler

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], Batch]]:
        """Yield the row numbers and the content of every batch, in order."""
        for batch in self._loader:
            samples = self._sampler.pending.popleft()
            yield samples, batch


class _RememberingSampler:
    """A batch sampler that remembers what it yielded.

    Workers prefetch, so the sampler runs ahead of the batches that arrive: the row numbers wait in
    a queue.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.pending: deque[tuple[int, ...]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        # An epoch that was left early (`break`) leaves row numbers whose batches never arrived.
        self.pending.clear()
        for rows in self._sampler:
            samples = tuple(int(row) for row in rows)
            self.pending.append(samples)
            yield rows

    def __len__(self) -> int:
        return len(self._sampler)


def check_loader(loader: object, task: Task) -> None:
    """Check that every batch of a loader can be read again by row number.

    Raises:
        UnwatchableLoader: it cannot; the message names the setting to change.
    """
    if not isinstance(loader, DataLoader):
        raise UnwatchableLoader(
            f"it is a {type(loader).__name__}", "pass a torch.utils.data.DataLoader to watch()"
        )
    if loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
        raise UnwatchableLoader(
            "it has no batch sampler (an iterable data set, or batch_size=None)",
            "use a map-style data set with a batch_size or a batch_sampler, or Task(ids=...)",
        )
    # Older versions of torch have no such setting and always keep the order.
    if not getattr(loader, "in_order", True):
        raise UnwatchableLoader(
            "with in_order=False, batches may arrive in another order than they were sampled in",
            "pass in_order=True",
        )
    # Another data set of the same length is accepted here (a wrapper with transforms, say); the
    # recorder's self-check compares the rows themselves.
    if loader.dataset is not task.data:
        loader_rows = len(loader.dataset)  # type: ignore[arg-type]
        task_rows = len(task.data)
        if loader_rows != task_rows:
            raise UnwatchableLoader(
                f"it reads another data set ({loader_rows} rows) than the task ({task_rows} rows)",
                "pass the loader's data set to the task; validation loaders need no watch()",
            )
    # Compared with `!=`: every access to a bound method makes a new object.
    if loader.collate_fn != task.collate:
        raise UnwatchableLoader(
            "its collate_fn is not the task's",
            "pass collate=loader.collate_fn to the task",
        )


def check_data(task: Task) -> None:
    """Check that the task's data set can be read by row number, unless batches carry ids.

    Raises:
        UnreadableData: it cannot; the message names its type.
    """
    if task.ids is not None:
        return
    if isinstance(task.data, IterableDataset) or not isinstance(task.data, Rows):
        raise UnreadableData(type(task.data).__name__)
