r"""The adjoint sweep: cotangents walk back through the recorded steps and leave a score at every slot.

For the cotangent λ of the state after a step (METHODS: θ the parameters, m the moments, U the
update)

.. math::
    (a_\theta, a_m, a_g) = U_t^\top(\lambda_\theta, \lambda_m) \qquad
    I_{t,b} = -c_{t,b}\langle a_g, \nabla\ell_b\rangle \qquad
    \lambda \leftarrow (a_\theta + \nabla^2 L_t\, a_g,\; a_m)

All cotangents of a sweep are stacked along a first axis and share the primal pass.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp, vmap

from backtrail.accel.context import accelerated
from backtrail.curvature.vjp import GradientVJP
from backtrail.optim.flatten import flat_chunks
from backtrail.optim.jacobian import pull_update
from backtrail.step.state import State, elementwise
from backtrail.step.step import Transition, gathered
from backtrail.sweep.rules import Rules
from backtrail.sweep.schedule import Action, Advance, Restore, Reverse
from backtrail.tree import Tree, concatenate, each

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cotangent:
    """Derivatives of queries with respect to a state, each tensor with a first axis `[query, ...]`.

    Attributes:
        params: of the trained parameters.
        buffers: of the running BatchNorm statistics.
        moments: of the optimizer's elementwise tensors.
    """

    params: Tree
    buffers: Tree
    moments: dict[str, Tree]

    def __len__(self) -> int:
        """Number of queries."""
        return len(next(iter(self.params.values())))

    def join(self, other: "Cotangent") -> "Cotangent":
        """Both, one after the other along the query axis."""
        return Cotangent(
            concatenate([self.params, other.params]),
            concatenate([self.buffers, other.buffers]),
            {
                name: concatenate([tree, other.moments[name]])
                for name, tree in self.moments.items()
                if tree
            },
        )

    def norms(self) -> Float[Tensor, " query"]:
        """Euclidean norm of the parameters' part, by query."""
        by_tensor = [
            torch.linalg.vector_norm(tensor.flatten(1), dim=1) for tensor in self.params.values()
        ]
        whole: Tensor = torch.linalg.vector_norm(torch.stack(by_tensor), dim=0)
        return whole


def start(state: State, params: Tree, buffers: Tree) -> Cotangent:
    """The cotangent at the state that queries read: their gradients, and zero for the optimizer's moments."""
    count = len(next(iter(params.values())))
    moments = {
        name: each(
            lambda moment: moment.new_zeros(count, *moment.shape),
            {key: tree[key] for key in elementwise(tree, state.params[name])},
        )
        for name, tree in state.moments.items()
    }
    # Chunks of the update are views of them.
    return Cotangent(each(Tensor.contiguous, params), buffers, moments)


@dataclass(frozen=True, slots=True)
class Pulled:
    """One step of the sweep: the cotangent before the step, the influences `[query, slot]`, the losses `[slot]`."""

    cotangent: Cotangent
    influence: Tensor
    losses: Tensor


def pull_back(
    transition: Transition, state: State, cotangent: Cotangent, *, rules: Rules, chunk: int
) -> Pulled:
    """Take the cotangents of the state after a step back to the state before it.

    Args:
        transition: the step.
        state: the state before it.
        cotangent: of the state after it, `[query, ...]`. It is overwritten: its memory becomes the
            result's.
        rules: how derivatives are taken.
        chunk: how many queries are pulled at once; more are faster on small models and take more
            memory.
    """
    with transition.replaying(twice=rules.curvature.product == "autograd"):
        update, primal = transition.update, _Primal.of(transition, state, rules)
        clipped, unclip = _clipped(transition, primal.consumed)
        params = cotangent.params
        slots = sum(transition.sizes)
        derivatives = (
            (flat, rules.slope.diagonals(update, state, clipped, chunk=flat, slots=slots))
            for flat in flat_chunks(update, state, clipped)
        )
        moments, grads = pull_update(derivatives, clipped, params=params, moments=cotangent.moments)
        grads = unclip(grads)
        buffers = dict(cotangent.buffers)
        scores = [
            _add_pulled(linear, grads, into=Cotangent(params, buffers, {}), chunk=chunk)
            for linear in primal.backwards()
        ]
    return Pulled(Cotangent(params, buffers, moments), -torch.cat(scores[::-1], 1), primal.losses)


def _clipped(transition: Transition, consumed: Tree) -> tuple[Tree, Callable[[Tree], Tree]]:
    """The gradient after clipping, and from cotangents after to those before it."""
    if transition.task.clip is None:
        return consumed, lambda grads: grads
    clipped, pull = vjp(transition.clipped, consumed)  # type: ignore[misc]
    return clipped, vmap(lambda cotangent: pull(cotangent)[0])


def _add_pulled(linear: GradientVJP, grads: Tree, *, into: Cotangent, chunk: int) -> Tensor:
    """Add one piece's curvature products to the cotangents, in place; return its scores `[query, slot]`."""
    params, buffers, count = into.params, into.buffers, len(into)
    scores = []
    for first in range(0, count, chunk):
        rows = slice(first, first + chunk)
        with accelerated():
            second, before, score = pull_rows(linear, rows_of(grads, rows), rows_of(buffers, rows))
        for name, product in second.items():
            params[name][rows] += product
        for name, product in before.items():
            buffers[name][rows] = product
        scores.append(score)
    return torch.cat(scores)


def pull_rows(linear: GradientVJP, grads: Tree, buffers: Tree) -> tuple[Tree, Tree, Tensor]:
    """The transposed derivative of a piece for several queries at once: `GradientVJP.vjp` with a first axis."""
    if len(next(iter(grads.values()))) > 1:
        many = linear.batched_vjp or vmap(linear.vjp, randomness="same")
        try:
            pulled: tuple[Tree, Tree, Tensor] = many(grads, buffers)
            return pulled
        except torch.OutOfMemoryError:
            log.warning(
                "memory ran out; queries are pulled in smaller chunks, which may change the last digits"
            )
        return _halved(linear, grads, buffers)
    # One query needs no batching rule, and most kernels are faster without one.
    second, before, score = linear.vjp(each(lambda t: t[0], grads), each(lambda t: t[0], buffers))
    return each(lambda t: t[None], second), each(lambda t: t[None], before), score[None]


def _halved(linear: GradientVJP, grads: Tree, buffers: Tree) -> tuple[Tree, Tree, Tensor]:
    """The same product in two halves, each of which may be halved again: memory ran out."""
    middle = len(next(iter(grads.values()))) // 2
    parts = slice(0, middle), slice(middle, None)
    first, last = (
        pull_rows(linear, rows_of(grads, part), rows_of(buffers, part)) for part in parts
    )
    return (
        concatenate([first[0], last[0]]),
        concatenate([first[1], last[1]]),
        torch.cat([first[2], last[2]]),
    )


def rows_of(tree: Tree, rows: slice) -> Tree:
    """Some queries of a stack."""
    return {name: tensor[rows] for name, tensor in tree.items()}


@dataclass(frozen=True, slots=True)
class _Primal:
    """The gradient that a step consumed, and its pieces ready to be linearised from the last to the first."""

    consumed: Tree
    losses: Tensor
    backwards: Callable[[], Iterator[GradientVJP]]

    @staticmethod
    def of(transition: Transition, state: State, rules: Rules) -> "_Primal":
        # Under autocast the update was made from another gradient than the one that is
        # differentiated.
        trained = transition.raw_gradient(state)[0] if transition.step.autocast else None
        micro_batches = transition.micro_batches()
        ones = [
            torch.ones(len(micro_batch.share)).to(next(iter(state.params.values())))
            for micro_batch in micro_batches
        ]
        if len(micro_batches) == 1:
            linear = rules.gradient_vjp(
                micro_batches[0], state.params, state.buffers, weights=ones[0]
            )
            return _Primal(trained or linear.gradient, linear.losses, lambda: iter([linear]))

        # Accumulation exists to save memory, so gradients come first, and then one micro-batch's
        # graph at a time.
        walked = list(transition.walk(state))
        total, losses = gathered(walked)

        def backwards() -> Iterator[GradientVJP]:
            for micro_batch, (before, _), w in reversed(
                list(zip(micro_batches, walked, ones, strict=True))
            ):
                yield rules.gradient_vjp(micro_batch, state.params, before, weights=w)

        return _Primal(trained or total, losses, backwards)


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep leaves at one step.

    Attributes:
        step: its index.
        influence: `[query, slot]`, a row for every cotangent that is alive there.
        losses: training loss of every slot, `[slot]`.
        norms: of the same cotangents before the step, `[query]`.
        cotangent: of the state before the step, with those of the queries that read this very
            state.
    """

    step: int
    influence: Tensor
    losses: Tensor
    norms: Tensor
    cotangent: Cotangent | None


@dataclass(frozen=True, slots=True)
class Sweep:
    """Walks back through a training; knows no disk.

    Attributes:
        load: the kept state before a step.
        transition: a step, by index.
        meet: the cotangents of a state, given its number, the state, and what later states passed
            on to it, which is overwritten; None where no query is on its way.
        rules: how derivatives are taken.
        chunk: how many cotangents are pulled at once.
    """

    load: Callable[[int], State]
    transition: Callable[[int], Transition]
    meet: Callable[[int, State, Cotangent | None], Cotangent | None]
    rules: Rules
    chunk: int

    def __call__(self, actions: Iterator[Action], cotangent: Cotangent | None) -> Iterator[Swept]:
        """Execute a plan, from the cotangents of the state after its last step; yields steps from last to first."""
        held: dict[int, State] = {}
        for action in actions:
            match action:
                case Restore(step):
                    state = held[step] if step in held else self.load(step)
                case Advance(first, last):
                    for index in range(first, last):
                        state = self.transition(index).advance(state)
                    held[last] = state
                case Reverse(step):
                    swept = self._reverse(step, state, cotangent)
                    yield swept
                    cotangent = swept.cotangent
                    held.pop(step, None)

    def _reverse(self, step: int, state: State, cotangent: Cotangent | None) -> Swept:
        transition = self.transition(step)
        if cotangent is None:  # no query reads a later state, so this step moved none
            influence, losses = (
                torch.zeros(0, sum(transition.sizes)),
                torch.full((sum(transition.sizes),), torch.nan),
            )
            return Swept(step, influence, losses, torch.zeros(0), self.meet(step, state, None))
        pulled = pull_back(transition, state, cotangent, rules=self.rules, chunk=self.chunk)
        norms = pulled.cotangent.norms()
        return Swept(
            step, pulled.influence, pulled.losses, norms, self.meet(step, state, pulled.cotangent)
        )
