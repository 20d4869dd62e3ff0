"""What a query is, and its values and gradients at a state.

A query set is cut into parts, each a function of the model that gives a few numbers, so that a thousand test samples
never sit in one graph. The model that a part receives has a state's tensors in place of its own.
"""

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from whence.task import Task
from whence.tree import Tree, each

Mode = Literal["eval", "train"]


@dataclass(frozen=True, slots=True)
class Part:
    """A few numbers of the model, and how they add up to queries: `weights @ function(model)`.

    Attributes:
        queries: the rows that this part adds to.
        weights: `[len(queries), number]`.
        function: from the model to `[number]`.
    """

    queries: tuple[int, ...]
    weights: Tensor
    function: Callable[[nn.Module], Tensor]


class Query(abc.ABC):
    """One or more scalar functions of a model's parameters (and BatchNorm statistics)."""

    mode: Mode
    unit: str  # what one unit of the scalar is, e.g. nats

    @property
    @abc.abstractmethod
    def names(self) -> tuple[str, ...]:
        """One name per query."""

    @abc.abstractmethod
    def parts(self, task: Task, like: Tensor, *, together: bool) -> Iterator[Part]:
        """The parts, with batches on the device and in the precision of `like`; few large ones if together."""


def values(query: Query, task: Task, *, params: Tree, buffers: Tree) -> Float[Tensor, " query"]:
    """The queries' values at one state; traceable, so that many states can be read under `vmap`."""
    like = next(iter(params.values()))
    found = [like.new_zeros(())] * len(query.names)
    with _asking(query, task):
        for part in query.parts(task, like, together=True):
            numbers = part.weights.to(like) @ task.bind(params, _copied(buffers), part.function)
            for row, number in zip(part.queries, numbers, strict=True):
                found[row] = found[row] + number
    return torch.stack(found)


def gradients(
    query: Query, task: Task, *, params: Tree, buffers: Tree, trained: Sequence[str]
) -> tuple[Float[Tensor, " query"], Tree, Tree]:
    """Values `[query]` and gradients `[query, ...]`, by trained parameters and by running BatchNorm statistics."""
    inputs = {name: params[name] for name in trained}, {n: buffers[n] for n in task.running if n in buffers}
    like = next(iter(params.values()))
    found = like.new_zeros(len(query.names))
    sums = [each(lambda tensor: tensor.new_zeros(len(found), *tensor.shape), tree) for tree in inputs]
    with _asking(query, task):
        for part in query.parts(task, like, together=False):

            def numbers(some: Tree, running: Tree, part: Part = part) -> Tensor:
                return part.weights.to(like) @ task.bind(params | some, _copied(buffers) | running, part.function)

            value, pull = vjp(numbers, *inputs)  # type: ignore[misc]
            found[list(part.queries)] += value
            for row, unit in zip(part.queries, torch.eye(len(value)).to(value), strict=True):
                for total, gradient in zip(sums, pull(unit), strict=True):
                    for name, tensor in gradient.items():
                        total[name][row] += tensor
    return found, sums[0], sums[1]


def _copied(buffers: Tree) -> Tree:
    return each(torch.clone, buffers)


def _asking(query: Query, task: Task) -> Any:
    task.binding.set_modes(None if query.mode == "eval" else ())
    return sdpa_kernel(SDPBackend.MATH)
