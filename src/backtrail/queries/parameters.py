"""Queries of the whole model: entries of a parameter, or any function."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from backtrail.errors import BadQuery, join_items
from backtrail.queries.query import Mode, Part, Query
from backtrail.task.task import Batch, Task


@final
@dataclass(frozen=True, repr=False)
class Parameter(Query):
    """Chosen entries of one parameter of the model.

    >>> query = Parameter("0.weight", [(0, 3), (1, 2)])
    >>> query
    Parameter('0.weight', 2 entries: (0, 3), (1, 2))
    >>> query.names
    ('0.weight[0, 3]', '0.weight[1, 2]')

    Args:
        name: Name of the parameter, as in `model.named_parameters()`.
        entries: Index of each entry, one number per axis; of a vector also the number alone.
        unit: Unit of the parameter.
        mode: Without effect, since the model is not called.

    Raises:
        BadQuery: When it is used, that the model does not have this parameter.
    """

    name: str
    entries: Sequence[tuple[int, ...] | int]
    unit: str = "parameter"
    mode: Mode = "eval"

    @property
    def names(self) -> tuple[str, ...]:
        """Like `0.weight[0, 3]`."""
        return tuple(f"{self.name}[{', '.join(map(str, _axes(entry)))}]" for entry in self.entries)

    def parts(self, task: Task, like: Tensor, *, together: bool) -> Iterator[Part]:
        """All entries at once.

        Raises:
            BadQuery: the model does not have this parameter.
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
            return torch.stack([tensor[_axes(entry)] for entry in self.entries])

        yield Part(tuple(range(count)), torch.eye(count), read)

    def __repr__(self) -> str:
        """Name and entries in one line."""
        count = len(self.entries)
        noun = "entry" if count == 1 else "entries"
        return f"Parameter({self.name!r}, {count} {noun}: {join_items(self.entries, most=6)})"


def _axes(entry: tuple[int, ...] | int) -> tuple[int, ...]:
    """The index of an entry, one number per axis."""
    return (entry,) if isinstance(entry, int) else tuple(entry)


@final
@dataclass(frozen=True, repr=False)
class Custom(Query):
    """Any differentiable function of the model that returns a scalar or a tensor `[query]`.

    The function receives the model with the tensors of a state in place of its own. It should read
    nothing that changes between calls. Random numbers that it draws from torch's default generators
    are the same at every call.

    >>> Custom(lambda model: model.weight.norm(), labels=["size of the weights"]).names
    ('size of the weights',)

    Args:
        function: Maps the model to a tensor of as many numbers as there are labels.
        labels: Name of each query.
        unit: What one unit of the numbers is.
        mode: Mode of the model while it is read, "eval" or "train".

    Raises:
        BadQuery: When it is used, that the function returns another number of values.
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
        """All queries at once."""
        del task, like, together
        count = len(self.labels)

        def read(model: nn.Module, batch: Batch) -> Tensor:
            del batch
            numbers = self.function(model).reshape(-1)
            if len(numbers) != count:
                raise BadQuery(f"{count} labels", f"the function returns {len(numbers)} numbers")
            return numbers

        yield Part(tuple(range(count)), torch.eye(count), read)

    def __repr__(self) -> str:
        """The function's name and the labels in one line."""
        name = getattr(self.function, "__name__", type(self.function).__name__)
        count = len(self.labels)
        noun = "label" if count == 1 else "labels"
        return f"Custom({name}, {count} {noun}: {join_items(self.labels, most=6)})"
