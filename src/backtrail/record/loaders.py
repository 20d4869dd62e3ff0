"""Which samples made each batch: the batch sampler is overheard; loader, data set and collate stay untouched.

Where the task says how, the batch itself is asked instead.
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
    """Any iterable of batches that tell the ids of their samples."""

    batches: Any
    task: Task

    def __len__(self) -> int:
        """Number of batches, where the iterable knows it."""
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], Batch]]:
        """Ids and content of every batch, in order."""
        for batch in self.batches:
            yield self.task.ids_of(batch), batch


@final
class TrackedLoader:
    """A loader's double that shares everything with it and notes the row numbers of every batch it hands out."""

    def __init__(self, loader: "DataLoader[Any]") -> None:
        self._noted = _Noting(loader.batch_sampler)
        # A shallow copy draws from the same generators in the same order; DataLoader forbids
        # replacing its sampler.
        self._double = copy.copy(loader)
        self._double.__dict__["batch_sampler"] = self._noted

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._double)

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], Batch]]:
        """Row numbers and content of every batch, in order."""
        for batch in self._double:
            yield self._noted.waiting.popleft(), batch


class _Noting:
    """A batch sampler that remembers what it gave; workers fetch ahead, so the notes form a queue."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.waiting: deque[tuple[int, ...]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        self.waiting.clear()
        for rows in self._sampler:
            self.waiting.append(tuple(int(row) for row in rows))
            yield rows

    def __len__(self) -> int:
        return len(self._sampler)


def check_loader(loader: object, task: Task) -> None:
    """Refuse loaders whose batches could not be read again.

    Raises:
        UnwatchableLoader: says what differs and what to do.
    """
    if not isinstance(loader, DataLoader):
        raise UnwatchableLoader(
            f"it is a {type(loader).__name__}", "give watch() a torch.utils.data.DataLoader"
        )
    if loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
        raise UnwatchableLoader(
            "it has no batch sampler (an iterable data set, or batch_size=None)",
            "use a map-style data set with a batch_size or a batch_sampler, or Task(ids=...)",
        )
    if not getattr(loader, "in_order", True):
        raise UnwatchableLoader(
            "in_order=False lets batches overtake each other", "create it with in_order=True"
        )
    if loader.dataset is not task.data and len(loader.dataset) != len(task.data):  # type: ignore[arg-type]
        there, ours = len(loader.dataset), len(task.data)  # type: ignore[arg-type]
        raise UnwatchableLoader(
            f"it reads another data set ({there} rows) than the task ({ours} rows)",
            "give the task the loader's data set; validation loaders need no watch()",
        )
    if loader.collate_fn != task.collate:  # a bound method is a new object each time it is named
        raise UnwatchableLoader(
            "its collate_fn is not the task's",
            "create the task with Task(..., collate=loader.collate_fn)",
        )


def check_data(task: Task) -> None:
    """Refuse data sets that have no rows to read again.

    Raises:
        UnreadableData: names its type.
    """
    if task.ids is None and (
        isinstance(task.data, IterableDataset) or not isinstance(task.data, Rows)
    ):
        raise UnreadableData(type(task.data).__name__)
