"""Queries of the whole model: entries of a parameter, or any function."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import final, get_args

import torch
from torch import Tensor, nn

from backtrail import arguments
from backtrail.errors import BadQuery, BadSetting, join_items
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
        entries: Index of each entry, a tuple with one number per axis; or a plain number, where
            there is one axis. A parameter without axes has the one entry `()`.
        unit: Unit of the parameter.
        mode: Without effect, since the model is not called.

    Raises:
        BadSetting: An argument has an invalid value.
        BadQuery: When it is used, that the model does not have this parameter, or the parameter not
            this entry.
    """

    name: str
    entries: Sequence[tuple[int, ...] | int]
    unit: str = "parameter"
    mode: Mode = "eval"

    def __post_init__(self) -> None:
        """Turn every index into a tuple, and check the other arguments.

        Raises:
            BadSetting: An argument has an invalid value.
        """
        arguments.text("name", self.name, "the name of a parameter of the model")
        arguments.text("unit", self.unit)
        arguments.choice("mode", self.mode, get_args(Mode))
        # The dataclass is frozen.
        object.__setattr__(self, "entries", _indices(self.entries))

    @property
    def names(self) -> tuple[str, ...]:
        """Like `0.weight[0, 3]`; a parameter without axes by its own name."""
        names: list[str] = []
        for entry in self._indices:
            place = ", ".join(map(str, entry))
            names.append(f"{self.name}[{place}]" if entry else self.name)
        return tuple(names)

    @property
    def _indices(self) -> list[tuple[int, ...]]:
        """The entries, of which `__post_init__` made tuples."""
        return [entry for entry in self.entries if isinstance(entry, tuple)]

    def parts(self, task: Task, like: Tensor, *, together: bool) -> Iterator[Part]:
        """All entries at once.

        Raises:
            BadQuery: the model does not have this parameter, or the parameter not this entry.
        """
        del like, together
        known = list(task.parameters())
        if self.name not in known:
            raise BadQuery(f"parameter {self.name!r}", f"the model has {known}")
        shape = task.parameters()[self.name].shape
        for entry in self._indices:
            is_within = len(entry) == len(shape) and all(map(_has_place, shape, entry))
            if not is_within:
                raise BadQuery(
                    f"entry {entry} of parameter {self.name!r}", f"its shape is {list(shape)}"
                )
        count = len(self.entries)

        def read(model: nn.Module, batch: Batch) -> Tensor:
            del batch
            owner, _, leaf = self.name.rpartition(".")
            tensor = getattr(model.get_submodule(owner), leaf)
            return torch.stack([tensor[entry] for entry in self._indices])

        yield Part(tuple(range(count)), torch.eye(count), read)

    def __repr__(self) -> str:
        """Name and entries in one line."""
        count = len(self.entries)
        noun = "entry" if count == 1 else "entries"
        return f"Parameter({self.name!r}, {count} {noun}: {join_items(self.entries, most=6)})"


def _indices(entries: object) -> tuple[tuple[int, ...], ...]:
    """One tuple of numbers for every entry.

    Raises:
        BadSetting: There are none, two are alike, or one is something else.
    """
    expected = "one or more indices, all different, each a tuple of one number per axis"
    found: list[tuple[int, ...]] = []
    for item in arguments.items("entries", entries, expected):
        number = arguments.as_whole(item)
        if number is None:
            numbers = arguments.whole_numbers(
                "entries", item, least=None, expected=expected, empty=True
            )
            found.append(tuple(numbers))
        else:
            found.append((number,))
    if not found or len(set(found)) < len(found):
        raise BadSetting("entries", entries, expected)
    return tuple(found)


def _has_place(size: int, index: int) -> bool:
    return -size <= index < size


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

    def __post_init__(self) -> None:
        """Check the arguments.

        Raises:
            BadSetting: An argument has an invalid value.
        """
        arguments.function("function", self.function, "a function of the model")
        arguments.text("unit", self.unit)
        arguments.choice("mode", self.mode, get_args(Mode))
        expected = "a sequence of one or more names, all different"
        labels = arguments.items("labels", self.labels, expected)
        are_names = all(isinstance(label, str) for label in labels)
        if not labels or not are_names or len(set(labels)) < len(labels):
            raise BadSetting("labels", self.labels, expected)

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
            found = self.function(model)
            if not isinstance(found, Tensor) or not found.is_floating_point():
                kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
                raise BadQuery("a tensor of real numbers", f"the function returns {kind}")
            numbers = found.reshape(-1)
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
