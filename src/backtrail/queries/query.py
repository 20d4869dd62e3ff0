"""What a query is, and its values and gradients at a state.

A set of queries is cut into parts, each a function of the model that returns a few numbers, so that
a thousand test samples never sit in one autograd graph. The model that a part receives has the
tensors of a state in place of its own.
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

from backtrail.accel.second_order import is_eager
from backtrail.errors import BacktrailError, join_items
from backtrail.exclusive import exclusive
from backtrail.task.task import Batch, Task
from backtrail.task.true_derivatives import TrueDerivatives
from backtrail.tree import Tree, each, tree_flatten, tree_leaves, tree_unflatten

Mode = Literal["eval", "train"]
# Rows of the query set, their values `[row]`, and their gradients `[row, ...]` by the trained
# parameters and by the running statistics.
RowGradients = tuple[tuple[int, ...], Tensor, Sequence[Tree]]

# Gradients of several parts are taken in one `vmap` as long as they need no more bytes than this.
BLOCK_BYTES = 128 * 2**20
# Where fewer parts than this fit, one after the other is faster than `vmap`.
FEWEST_AT_ONCE = 32


@final
@dataclass(frozen=True, slots=True, repr=False)
class Part:
    r"""Some of the queries of a :class:`Query`, as one function of the model.

    With `values = function(model, batch)`, the part adds `weights[i] @ values` to the query number
    `queries[i]`; a query is the sum over all parts that name it.

    >>> import torch
    >>> part = Part((0, 2), torch.eye(2), lambda model, batch: model(batch)[0], torch.ones(1, 3))
    >>> part.numbers(torch.nn.Linear(3, 2)).shape
    torch.Size([2])

    Attributes:
        queries: Numbers of the queries that the part adds to.
        weights: Tensor `[len(queries), number]`.
        function: Maps the model and the batch to a tensor `[number]`. It must be differentiable,
            and must not change the model.
        batch: What the function reads besides the model. Parts that share `function` and whose
            batches differ only in the entries of their tensors are differentiated together.
        at_once: How many parts may wait to be differentiated together.
    """

    queries: tuple[int, ...]
    weights: Tensor
    function: Callable[[nn.Module, Batch], Tensor]
    batch: Batch = ()
    at_once: int = 1

    def numbers(self, model: nn.Module) -> Tensor:
        """Evaluate the function: `[number]`."""
        return self.function(model, self.batch)

    def __repr__(self) -> str:
        """Which queries, and of how many numbers they are made."""
        return f"Part(queries {join_items(self.queries, most=6)}, {self.weights.shape[1]} numbers)"


class Query(abc.ABC):
    r"""One or more scalar functions :math:`q(\theta)` of a model: what influence is computed on.

    Each scalar has a name, which is its name in the result (`influence.queries`), and all of them
    share a unit. Influence is what a query *gains* when a sample is removed.

    For a function of the model alone, :class:`backtrail.Custom` is enough. Derive a class where the
    data is too large for one forward pass. It needs `unit` and `mode`, as class attributes or set
    in `__init__`, and the two abstract methods `names` and `parts`:

    >>> import torch, backtrail
    >>> class Confidence(backtrail.Query):
    ...     "Largest logit of each row, read one row at a time."
    ...
    ...     unit = "logit"
    ...     mode = "eval"
    ...
    ...     def __init__(self, inputs):
    ...         self.inputs = inputs
    ...
    ...     @property
    ...     def names(self):
    ...         return tuple(f"confidence[{row}]" for row in range(len(self.inputs)))
    ...
    ...     def parts(self, task, like, *, together):
    ...         def largest(model, batch):
    ...             return model(batch).max(1).values
    ...
    ...         for row in range(len(self.inputs)):
    ...             batch = self.inputs[row : row + 1].to(like)
    ...             yield backtrail.Part((row,), torch.ones(1, 1), largest, batch)
    >>> inputs = torch.eye(2)
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 5.0], [3.0, 2.0]]))
    >>> task = backtrail.classification(model, [])
    >>> query = Confidence(inputs)
    >>> backtrail.queries.values(query, task, params=task.parameters(), buffers={}).tolist()
    [3.0, 5.0]

    Attributes:
        unit: What one unit of the scalars is, for example "nats"; the influence has the same unit.
        mode: Whether the model is in "eval" or "train" mode while it is read. The queries built
            into the library use "eval", whatever the mode of the training.
    """

    unit: str
    mode: Mode

    @property
    @abc.abstractmethod
    def names(self) -> tuple[str, ...]:
        """Name of each query, all different; their number is the length of the axis `query`."""

    @abc.abstractmethod
    def parts(self, task: Task, like: Tensor, *, together: bool) -> Iterator[Part]:
        """Cut the queries into parts.

        Args:
            task: The task of the run, for its `predict`, `loss` and `collate`.
            like: A parameter of the model; batches must be on its device and in its precision.
            together: True where only values are wanted, so a few large parts are fastest; False
                where each query is differentiated, and a part should hold one or few of them.
        """

    def prepare(self, task: Task, *, params: Tree, buffers: Tree) -> None:
        """Look at the model once before the first reading; nothing by default.

        Args:
            task: The task of the run.
            params: Parameters of some state.
            buffers: Buffers of that state.
        """
        del task, params, buffers


@exclusive
def values(query: Query, task: Task, *, params: Tree, buffers: Tree) -> Float[Tensor, " query"]:
    """Values of the queries at one state; traceable, so that `vmap` can read many states."""
    like = next(iter(params.values()))
    found = [like.new_zeros(())] * len(query.names)
    if is_eager():
        # Under `vmap` the caller has prepared the query: nothing can be decided by numbers there.
        query.prepare(task, params=params, buffers=buffers)
    with _reading(query, task, like) as reset_generators:
        for part in query.parts(task, like, together=True):
            reset_generators()
            numbers = task.bind(params, _copied(buffers), part.numbers)
            # One by one where that is the same: a product with zeros would spread a NaN to all.
            identity = torch.eye(len(part.weights)).to(part.weights)
            is_identity = torch.equal(part.weights, identity)
            gained = numbers if is_identity else part.weights.to(like) @ numbers
            for row, number in zip(part.queries, gained, strict=True):
                found[row] = found[row] + number
    return torch.stack(found)


@exclusive
def gradients(
    query: Query, task: Task, *, params: Tree, buffers: Tree, trained: Sequence[str]
) -> tuple[Float[Tensor, " query"], Tree, Tree]:
    """Values of the queries at one state, and their gradients.

    Returns:
        Values `[query]`, gradients by the trained parameters `{name: [query, ...]}`, and gradients
        by the running statistics of BatchNorm `{name: [query, ...]}`.
    """
    trained_params = {name: params[name] for name in trained}
    running = {name: buffers[name] for name in task.running if name in buffers}
    like = next(iter(params.values()))
    found = like.new_zeros(len(query.names))
    by_params = _zeros(trained_params, rows=len(found))
    by_running = _zeros(running, rows=len(found))
    query.prepare(task, params=params, buffers=buffers)
    with _reading(query, task, like) as reset_generators:
        at_state = _PartGradients(
            task, params, buffers, trained_params, running, reset_generators=reset_generators
        )
        parts = query.parts(task, like, together=False)
        for block in _blocks(parts, most=_parts_at_once(trained_params, running)):
            for queries, value, (of_params, of_running) in at_state.of(block):
                rows = torch.tensor(queries, device=like.device)
                found.index_add_(0, rows, value.to(found))
                _add_rows(by_params, rows, of_params)
                _add_rows(by_running, rows, of_running)
    return found, by_params, by_running


def _zeros(tree: Tree, *, rows: int) -> Tree:
    return each(lambda tensor: tensor.new_zeros(rows, *tensor.shape), tree)


def _add_rows(into: Tree, rows: Tensor, gained: Tree) -> None:
    for name, tensor in gained.items():
        into[name].index_add_(0, rows, tensor)


def _parts_at_once(*trees: Tree) -> int:
    """How many gradients by these tensors fit; 1 where `vmap` would not pay."""
    size = sum(tensor.nbytes for tree in trees for tensor in tree.values())
    room = BLOCK_BYTES // max(1, size)
    return room if room >= FEWEST_AT_ONCE else 1


@final
@dataclass(frozen=True, slots=True)
class _PartGradients:
    """Values and gradients of parts at one state.

    Attributes:
        task: The task.
        params: Parameters of the state.
        buffers: Buffers of the state.
        trained: Parameters that gradients are taken by.
        running: Running statistics that gradients are taken by.
        reset_generators: To be called before a part is read, so that its random numbers do not
            depend on the parts before it.
    """

    task: Task
    params: Tree
    buffers: Tree
    trained: Tree
    running: Tree
    reset_generators: Callable[[], None]

    def of(self, block: Sequence[Part]) -> Iterator[RowGradients]:
        """Those of a block of parts that `vmap` may take together, or one part after the other.

        Raises:
            BacktrailError: The task or a query is wrong, whichever way it is computed.
        """
        if len(block) > 1:
            try:
                found = self._at_once(block)
            except BacktrailError:  # says what is wrong, whether in a batch or one by one
                raise
            except (RuntimeError, NotImplementedError, ValueError) as error:
                # A model may branch on its data, which `vmap` cannot follow: a loop gives the same.
                self.task.binding.note_one_by_one(error)
            else:
                yield from found
                return
        for part in block:
            yield from self._one(part)

    def _one(self, part: Part) -> Iterator[RowGradients]:
        """Those of one part, by plain autograd.

        It follows every model that training can follow. torch.func does not: packed sequences,
        an `autograd.Function` without `setup_context`, hooks on saved tensors, a model that
        differentiates by its own inputs.
        """
        self.reset_generators()
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.trained.items()}
        statistics = {
            name: tensor.detach().requires_grad_() for name, tensor in self.running.items()
        }
        with torch.enable_grad():
            # A copy of the statistics, since a module may write to them in place.
            buffers = _copied(self.buffers) | _copied(statistics)
            with TrueDerivatives() as mode:
                mode.note_buffers(buffers.values())
                numbers = self.task.bind(self.params | leaves, buffers, part.numbers)
        inputs = (*leaves.values(), *statistics.values())
        for query, weight in zip(part.queries, part.weights.to(numbers), strict=True):
            found = tuple(torch.zeros_like(tensor) for tensor in inputs)
            if numbers.requires_grad:
                found = torch.autograd.grad(
                    numbers,
                    inputs,
                    weight,
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            rows = [gradient[None] for gradient in found]
            of_params = dict(zip(leaves, rows[: len(leaves)], strict=True))
            of_running = dict(zip(statistics, rows[len(leaves) :], strict=True))
            yield (query,), (weight @ numbers.detach())[None], (of_params, of_running)

    def _at_once(self, block: Sequence[Part]) -> Iterator[RowGradients]:
        self.reset_generators()
        first = block[0]
        _, shape = tree_flatten(first.batch)
        stacks: list[Any] = []
        axes: list[int | None] = []
        for leaves in zip(*[tree_leaves(part.batch) for part in block], strict=True):
            is_tensor = isinstance(leaves[0], Tensor)
            # What is no tensor is the same object in all parts of a block.
            stacks.append(torch.stack(leaves) if is_tensor else leaves[0])
            axes.append(0 if is_tensor else None)

        def one(weights: Tensor, *leaves: Any) -> tuple[Tensor, list[tuple[Tree, Tree]]]:
            part = replace(first, batch=tree_unflatten(leaves, shape))
            numbers, pull = self._pull(part)
            weights = weights.to(numbers)
            return weights @ numbers, [pull(weight) for weight in weights]

        all_weights = torch.stack([part.weights for part in block])
        # Every part gets the random numbers that it would get alone.
        at_once = vmap(one, in_dims=(0, *axes), randomness="same")
        found, trees = at_once(all_weights, *stacks)
        # `trees` has an entry per query of a part, with an axis of the parts: rows likewise.
        rows = zip(*[part.queries for part in block], strict=True)
        return zip(rows, found.unbind(1), trees, strict=True)

    def _pull(self, part: Part) -> tuple[Tensor, Callable[[Tensor], tuple[Tree, Tree]]]:
        """The numbers of a part, and their VJP by trained parameters and running statistics."""

        def numbers(trained: Tree, running: Tree) -> Tensor:
            buffers = _copied(self.buffers) | running
            with TrueDerivatives() as mode:
                mode.note_buffers(buffers.values())
                return self.task.bind(self.params | trained, buffers, part.numbers)

        found, pull = vjp(numbers, self.trained, self.running)  # type: ignore[misc]
        return found, pull


def _blocks(parts: Iterator[Part], *, most: int) -> Iterator[list[Part]]:
    """Parts that differ only in the entries of their batches' tensors, up to `most` together."""
    waiting: dict[Any, list[Part]] = {}
    for part in parts:
        leaves, shape = tree_flatten(part.batch)
        kinds = [_kind(leaf) for leaf in leaves]
        form = (part.function, part.weights.shape, str(shape), *kinds)
        waiting.setdefault(form, []).append(part)
        if len(waiting[form]) >= most:
            yield waiting.pop(form)
        if sum(map(len, waiting.values())) >= part.at_once:
            yield from waiting.values()
            waiting = {}
    yield from waiting.values()


def _kind(leaf: Any) -> object:
    """What two leaves of batches must have in common to be stacked."""
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else id(leaf)


def _copied(buffers: Tree) -> Tree:
    """Copies, since a module may write to its buffers in place."""
    return each(torch.clone, buffers)


@contextmanager
def _reading(query: Query, task: Task, like: Tensor) -> Iterator[Callable[[], None]]:
    """Set the model's mode, and attention kernels that `vmap` and `vjp` can follow.

    Random numbers that a query draws are the same at every reading and at every state, or the
    change of a query would be that of its noise.

    Yields:
        A function that sets the random generators to the state with which every part is read.
    """
    evaluating = None if query.mode == "eval" else ()
    noise = task.fixed_noise(like.dtype)
    with task.binding.in_modes(evaluating), sdpa_kernel(SDPBackend.MATH), noise as reset_generators:
        yield reset_generators
