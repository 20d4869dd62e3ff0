"""Queries of the whole model: entries of a parameter, or any function."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from backtrail.errors import BadQuery
from backtrail.queries.query import Mode, Part, Query
from backtrail.task.task import Batch, Task


@final
@dataclass(frozen=True)
class Parameter(Query):
    """Chosen entries of one parameter.

    >>> Parameter("0.weight", [(0, 3), (1, 2)]).names
    ('0.weight[0, 3]', '0.weight[1, 2]')
    """

    name: str
    entries: Sequence[tuple[int, ...]]
    unit: str = "parameter"
    mode: Mode = "eval"

    @property
    def names(self) -> tuple[str, ...]:
        """Name and index."""
        return tuple(f"{self.name}[{', '.join(map(str, entry))}]" for entry in self.entries)

    def parts(self, task: Task, like: Tensor, *, together: bool) -> Iterator[Part]:
        """All entries at once.

        Raises:
            BadQuery: the model has no such parameter.
        """
        del like, together
        known = list(task.parameters())
        if self.name not in known:
            raise BadQuery(f"parameter {self.name!r}", f"the model has {known}")
        count = len(self.entries)

        def read(model: nn.Module, batch: Batch) -> Tensor:
            del batch
            owner, _, leaf = self.name.rpartition(".")
            tensor = getattr(model.get_submodule(owner), leaf)
            return torch.stack([tensor[entry] for entry in self.entries])

        yield Part(tuple(range(count)), torch.eye(count), read)


@final
@dataclass(frozen=True)
class Custom(Query):
    """Any differentiable function of the model: a scalar, or a tensor `[query]`.

    >>> Custom(lambda model: model.weight.norm(), labels=["size of the weights"]).names
    ('size of the weights',)
    """

    function: Callable[[nn.Module], Tensor]
    labels: Sequence[str] = ("custom",)
    unit: str = "custom"
    mode: Mode = "eval"

    @property
    def names(self) -> tuple[str, ...]:
        """The given labels."""
        return tuple(self.labels)

    def parts(self, task: Task, like: Tensor, *, together: bool) -> Iterator[Part]:
        """All at once."""
        del task, like, together
        count = len(self.labels)

        def read(model: nn.Module, batch: Batch) -> Tensor:
            del batch
            numbers = self.function(model).reshape(-1)
            if len(numbers) != count:
                raise BadQuery(f"{count} labels", f"the function returns {len(numbers)} numbers")
            return numbers

        yield Part(tuple(range(count)), torch.eye(count), read)
