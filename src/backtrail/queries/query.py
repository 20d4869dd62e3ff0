"""What a query is, and its values and gradients at a state.

A query set is cut into parts, each a function of the model that gives a few numbers, so that a
thousand test samples never sit in one graph. The model that a part receives has a state's tensors
in place of its own.
"""

import abc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from backtrail.exclusive import exclusive
from backtrail.task.task import Batch, Task
from backtrail.tree import Tree, each, tree_flatten, tree_leaves, tree_unflatten

Mode = Literal["eval", "train"]
Slope = tuple[tuple[int, ...], Tensor, Sequence[Tree]]  # queries, and their values and gradients
BLOCK, FEWEST = (
    128 * 2**20,
    32,
)  # bytes of gradients taken at once; where fewer rows fit, one by one is faster


@dataclass(frozen=True, slots=True)
class Part:
    """A few numbers of the model, and how they add up to queries: `weights @ function(model, batch)`.

    Attributes:
        queries: the rows that this part adds to.
        weights: `[len(queries), number]`.
        function: from the model and the batch to `[number]`.
        batch: what the function reads beside the model.
        at_once: how many parts may be read and differentiated at once.
    """

    queries: tuple[int, ...]
    weights: Tensor
    function: Callable[[nn.Module, Batch], Tensor]
    batch: Batch = ()
    at_once: int = 1

    def numbers(self, model: nn.Module) -> Tensor:
        """The numbers of a model."""
        return self.function(model, self.batch)


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
        """The parts, which read batches on the device and in the precision of `like`; few large ones if together."""


@exclusive
def values(query: Query, task: Task, *, params: Tree, buffers: Tree) -> Float[Tensor, " query"]:
    """The queries' values at one state; traceable, so that many states can be read under `vmap`."""
    like = next(iter(params.values()))
    found = [like.new_zeros(())] * len(query.names)
    with _asking(query, task):
        for part in query.parts(task, like, together=True):
            numbers = part.weights.to(like) @ task.bind(params, _copied(buffers), part.numbers)
            for row, number in zip(part.queries, numbers, strict=True):
                found[row] = found[row] + number
    return torch.stack(found)


@exclusive
def gradients(
    query: Query, task: Task, *, params: Tree, buffers: Tree, trained: Sequence[str]
) -> tuple[Float[Tensor, " query"], Tree, Tree]:
    """Values `[query]` and gradients `[query, ...]`, by trained parameters and by running BatchNorm statistics."""
    inputs = (
        {name: params[name] for name in trained},
        {n: buffers[n] for n in task.running if n in buffers},
    )
    slopes = _Slopes(task, params, buffers, *inputs)
    like = next(iter(params.values()))
    found = like.new_zeros(len(query.names))
    sums = [
        each(lambda tensor: tensor.new_zeros(len(found), *tensor.shape), tree) for tree in inputs
    ]
    room = BLOCK // max(1, sum(tensor.nbytes for tree in inputs for tensor in tree.values()))
    with _asking(query, task):
        for block in _blocks(
            query.parts(task, like, together=False), room if room >= FEWEST else 1
        ):
            for queries, value, trees in slopes.of(block):
                rows = torch.tensor(queries, device=like.device)
                found.index_add_(0, rows, value.to(found))
                for total, tree in zip(sums, trees, strict=True):
                    for name, tensor in tree.items():
                        total[name].index_add_(0, rows, tensor)
    return found, sums[0], sums[1]


@final
@dataclass(frozen=True, slots=True)
class _Slopes:
    """Values and gradients of parts at one state, `[query, ...]`."""

    task: Task
    params: Tree
    buffers: Tree
    trained: Tree
    running: Tree

    def of(self, block: Sequence[Part]) -> Iterator[Slope]:
        """Those of parts that differ by the entries of their batches only: at once, or one by one if they must."""
        if len(block) > 1:
            try:
                found = self._at_once(block)
            except (RuntimeError, NotImplementedError, ValueError) as error:
                self.task.binding.note_one_by_one(error)
            else:
                yield from found
                return
        for part in block:
            numbers, pull = self._pull(part)
            for query, weight in zip(part.queries, part.weights.to(numbers), strict=True):
                yield (
                    (query,),
                    (weight @ numbers)[None],
                    [each(lambda t: t[None], tree) for tree in pull(weight)],
                )

    def _at_once(self, block: Sequence[Part]) -> Iterator[Slope]:
        first, shape = block[0], tree_flatten(block[0].batch)[1]
        leaves = zip(*[tree_leaves(part.batch) for part in block], strict=True)
        stacks = [torch.stack(some) if isinstance(some[0], Tensor) else some[0] for some in leaves]
        axes = [0 if isinstance(some, Tensor) else None for some in stacks]

        def one(weights: Tensor, *leaves: Any) -> tuple[Tensor, list[tuple[Tree, Tree]]]:
            numbers, pull = self._pull(replace(first, batch=tree_unflatten(leaves, shape)))
            weights = weights.to(numbers)
            return weights @ numbers, [pull(weight) for weight in weights]

        values, trees = vmap(one, in_dims=(0, *axes))(
            torch.stack([part.weights for part in block]), *stacks
        )
        return zip(
            zip(*[part.queries for part in block], strict=True),
            values.unbind(1),
            trees,
            strict=True,
        )

    def _pull(self, part: Part) -> tuple[Tensor, Callable[[Tensor], tuple[Tree, Tree]]]:
        def numbers(trained: Tree, running: Tree) -> Tensor:
            return self.task.bind(
                self.params | trained, _copied(self.buffers) | running, part.numbers
            )

        found, pull = vjp(numbers, self.trained, self.running)  # type: ignore[misc]
        return found, pull


def _blocks(parts: Iterator[Part], most: int) -> Iterator[list[Part]]:
    """Parts that differ by the entries of their batches only, together."""
    waiting: dict[Any, list[Part]] = {}
    for part in parts:
        leaves, shape = tree_flatten(part.batch)
        kinds = [
            (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else id(leaf) for leaf in leaves
        ]
        form = part.function, part.weights.shape, str(shape), *kinds
        waiting.setdefault(form, []).append(part)
        if len(waiting[form]) >= most:
            yield waiting.pop(form)
        if sum(map(len, waiting.values())) >= part.at_once:
            yield from waiting.values()
            waiting = {}
    yield from waiting.values()


def _copied(buffers: Tree) -> Tree:
    return each(torch.clone, buffers)


@contextmanager
def _asking(query: Query, task: Task) -> Iterator[None]:
    evaluating = None if query.mode == "eval" else ()
    with task.binding.in_modes(evaluating), sdpa_kernel(SDPBackend.MATH):
        yield
