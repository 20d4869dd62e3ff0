r"""The adjoint sweep: cotangents are pulled back through the recorded steps, with a score per slot.

Step t takes the parameters θ and the optimizer's moments m before it to those after it,

.. math:: (\theta_{t+1}, m_{t+1}) = U_t(\theta_t, m_t, g_t), \qquad g_t = \nabla L_t(\theta_t; w)

The cotangent of the state τ that a query q reads is its gradient. Each step pulls it back by its
transposed derivative, and the derivative by the weight of slot b, at w = 1, is the influence with
its sign turned:

.. math::
    \text{start} \quad & (\lambda_\theta, \lambda_m) = (\nabla q(\theta_\tau),\; 0) \\
    \text{update} \quad & (a_\theta, a_m, a_g) = U_t'^{\,\top} (\lambda_\theta, \lambda_m) \\
    \text{scores} \quad & I_{t,b} = -c_{t,b}\, \langle a_g, \nabla \ell_b(\theta_t) \rangle \\
    \text{gradient} \quad & (\lambda_\theta, \lambda_m)
        \leftarrow (a_\theta + \nabla^2 L_t(\theta_t)\, a_g,\; a_m)

Where the loop clips the gradient, :math:`a_g` first goes back through the clipping. BatchNorm's
running statistics B are part of the state as well: their cotangent :math:`\lambda_B` goes back
through the forward pass, which also reads θ, together with :math:`a_g`. The micro-batches of a step
are pulled back from the last to the first, since each starts from the statistics that the one
before it left.

All cotangents of a sweep are stacked along a first axis, `[query, ...]`, and share one forward and
backward pass of the step.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp, vmap

from backtrail.accel.context import accelerated
from backtrail.curvature.vjp import GradientVJP
from backtrail.errors import BacktrailError, LateSecondDerivative
from backtrail.optim.jacobian import pull_update
from backtrail.step.state import State, elementwise_keys
from backtrail.step.step import Gradient, MicroBatch, Transition, accumulate
from backtrail.sweep.rules import Rules
from backtrail.sweep.schedule import Action, Advance, Restore, Reverse
from backtrail.tree import Tree, concatenate, each, flat_rows

log = logging.getLogger(__name__)


@final
@dataclass(frozen=True, slots=True)
class Cotangent:
    """Derivatives of queries with respect to a state, each tensor with a first axis `[query, ...]`.

    Attributes:
        params: λ_θ, of the trained parameters.
        buffers: λ_B, of BatchNorm's running statistics.
        moments: λ_m, of the optimizer's elementwise tensors.
    """

    params: Tree
    buffers: Tree
    moments: dict[str, Tree]

    def __len__(self) -> int:
        """Number of queries."""
        return len(next(iter(self.params.values())))

    def join(self, other: "Cotangent") -> "Cotangent":
        """Concatenate both along the query axis."""
        moments: dict[str, Tree] = {}
        for name, tree in self.moments.items():
            if tree:
                moments[name] = concatenate([tree, other.moments[name]])
        return Cotangent(
            concatenate([self.params, other.params]),
            concatenate([self.buffers, other.buffers]),
            moments,
        )

    def norms(self) -> Float[Tensor, " query"]:
        """Euclidean norm of λ_θ of each query."""
        by_tensor = [
            torch.linalg.vector_norm(flat_rows(tensor), dim=1) for tensor in self.params.values()
        ]
        whole: Tensor = torch.linalg.vector_norm(torch.stack(by_tensor), dim=0)
        return whole


def start_cotangent(state: State, params: Tree, buffers: Tree) -> Cotangent:
    """Make the cotangent at the state that queries read.

    Args:
        state: that state.
        params: gradients of the queries by the trained parameters, `[query, ...]`.
        buffers: their gradients by the running statistics, `[query, ...]`.
    """
    count = len(next(iter(params.values())))
    moments: dict[str, Tree] = {}
    for name, tree in state.moments.items():
        keys = elementwise_keys(tree, state.params[name])
        # No query reads the optimizer's moments.
        moments[name] = {key: tree[key].new_zeros(count, *tree[key].shape) for key in keys}
    # The update's chunks are views of flattened tensors, so these must be contiguous.
    return Cotangent(each(Tensor.contiguous, params), buffers, moments)


@final
@dataclass(frozen=True, slots=True)
class PulledBack:
    """What pulling cotangents back through one step gives.

    Attributes:
        cotangent: of the state before the step.
        influence: I of every slot, `[query, slot]`.
        losses: training loss of every slot, `[slot]`.
    """

    cotangent: Cotangent
    influence: Tensor
    losses: Tensor


def pull_back(
    transition: Transition, state: State, cotangent: Cotangent, *, rules: Rules, chunk: int
) -> PulledBack:
    """Pull the cotangents of the state after a step back to the state before it.

    Args:
        transition: the step.
        state: the state before it.
        cotangent: of the state after it. It is overwritten: its memory becomes the result's.
        rules: how derivatives are taken.
        chunk: how many queries are pulled back at once; more are faster on small models and take
            more memory.
    """
    # Outside of the block below, whose attention kernel rounds differently: under autocast by so
    # much that the slope of the update at its gradient would be another one.
    trained = _gradient_under_autocast(transition, state)
    with transition.replaying(double_backward=rules.curvature.product == "autograd"):
        primal = _StepGradient.of(transition, state, rules, trained)
        clipped, clip_vjp = _clip_with_vjp(transition, primal.consumed)
        _check_step(transition, state, primal, clipped)
        # The update overwrites λ_θ and λ_m with a_θ and a_m in place.
        params = cotangent.params
        moments, grads = pull_update(
            rules.update_derivatives(transition, state, clipped),
            clipped,
            params=params,
            moments=cotangent.moments,
        )
        grads = clip_vjp(grads)
        before = Cotangent(params, dict(cotangent.buffers), moments)
        scores: list[Tensor] = []
        for gradient_vjp in primal.vjps_from_last():
            scores.append(_pull_micro_batch(gradient_vjp, grads, before, chunk=chunk))
    in_order = scores[::-1]
    return PulledBack(before, -torch.cat(in_order, 1), primal.losses)


def pull_gradient(
    transition: Transition, state: State, grads: Tree, *, rules: Rules
) -> tuple[Tree, Tree, Float[Tensor, " slot"]]:
    """Pull one cotangent of a step's gradient, before clipping, back to what it is computed from.

    Args:
        transition: the step.
        state: the state before it.
        grads: the cotangent, each tensor `[1, ...]`.
        rules: how derivatives are taken.

    Returns:
        Cotangents of the trained parameters and of the running statistics, and the scores.
    """
    trained = _gradient_under_autocast(transition, state)
    with transition.replaying(double_backward=rules.curvature.product == "autograd"):
        primal = _StepGradient.of(transition, state, rules, trained)
        params = {name: torch.zeros_like(state.params[name])[None] for name in transition.trained}
        running = [name for name in transition.task.running if name in state.buffers]
        buffers = {name: torch.zeros_like(state.buffers[name])[None] for name in running}
        before = Cotangent(params, buffers, {})
        scores: list[Tensor] = []
        for gradient_vjp in primal.vjps_from_last():
            scores.append(_pull_micro_batch(gradient_vjp, grads, before, chunk=1))
    first = {name: tensor[0] for name, tensor in before.params.items()}
    first_buffers = {name: tensor[0] for name, tensor in before.buffers.items()}
    return first, first_buffers, torch.cat(scores[::-1], 1)[0]


def _check_step(
    transition: Transition, state: State, primal: "_StepGradient", clipped: Tree
) -> None:
    """Compare the step with what was recorded about it.

    Raises:
        ReplayMismatch: the task does not reproduce the recorded step.
    """
    check = transition.check
    if check is None:
        return
    check.check_gradient(clipped)
    if check.state_is_known:
        check.check_state(transition.apply_update(state, clipped, primal.buffers))


def _gradient_under_autocast(transition: Transition, state: State) -> Tree | None:
    """The gradient that the update was made of, by the training's kernels; None without autocast.

    Under autocast it is another gradient than the one that is differentiated.
    """
    if not transition.step.autocast:
        return None
    return transition.raw_gradient(state).gradient


def _clip_with_vjp(transition: Transition, raw: Tree) -> tuple[Tree, Callable[[Tree], Tree]]:
    """The clipped gradient, and the VJP of the clipping for a stack of cotangents."""
    if transition.task.clip is None:
        return raw, lambda cotangents: cotangents
    clipped, pull = vjp(transition.clip, raw)  # type: ignore[misc]
    return clipped, vmap(lambda cotangent: pull(cotangent)[0])


def _pull_micro_batch(
    gradient_vjp: GradientVJP, grads: Tree, cotangent: Cotangent, *, chunk: int
) -> Float[Tensor, "query slot"]:
    """Pull the cotangents of one micro-batch's gradient and buffers back, in place.

    Args:
        gradient_vjp: the micro-batch's gradient and its VJP.
        grads: a_g.
        cotangent: its parameters gain the curvature product, and its buffers become those before
            the forward pass.
        chunk: how many queries at once.

    Returns:
        The scores of the micro-batch's slots.
    """
    scores: list[Tensor] = []
    for first in range(0, len(cotangent), chunk):
        rows = slice(first, first + chunk)
        some_grads = select_queries(grads, rows)
        some_buffers = select_queries(cotangent.buffers, rows)
        with accelerated():
            products, buffers, some_scores = batched_vjp(gradient_vjp, some_grads, some_buffers)
        for name, product in products.items():
            cotangent.params[name][rows] += product
        for name, before in buffers.items():
            cotangent.buffers[name][rows] = before
        scores.append(some_scores)
    return torch.cat(scores)


def batched_vjp(
    gradient_vjp: GradientVJP, grads: Tree, buffers: Tree
) -> tuple[Tree, Tree, Float[Tensor, "query slot"]]:
    """Apply a micro-batch's VJP to several queries at once; in halves where memory runs out.

    Args:
        gradient_vjp: the micro-batch's gradient and its VJP.
        grads: cotangents of the gradient, `[query, ...]`.
        buffers: cotangents of the running statistics after the forward pass, `[query, ...]`.

    Returns:
        Cotangents of the parameters, of the running statistics before the forward pass, and the
        scores.

    Raises:
        BacktrailError: The task is wrong, whichever way it is computed.
    """
    count = len(next(iter(grads.values())))
    if count == 1:
        # Most kernels are faster without a batching rule, and one query needs none.
        one_grads = each(lambda tensor: tensor[0], grads)
        one_buffers = each(lambda tensor: tensor[0], buffers)
        products, before, scores = gradient_vjp.vjp(one_grads, one_buffers)
        return _as_stack(products), _as_stack(before), scores[None]
    apply = gradient_vjp.batched_vjp or vmap(gradient_vjp.vjp, randomness="same")
    try:
        pulled: tuple[Tree, Tree, Tensor] = apply(grads, buffers)
        return pulled
    except torch.OutOfMemoryError:
        log.warning(
            "out of memory; pulling back fewer queries at once, which may change the last digits"
        )
    except BacktrailError:
        # It says what is wrong, and would be raised for one query as well.
        raise
    except RuntimeError as error:
        # One after the other gives the same where `vmap` cannot follow the model.
        first_line = str(error).partition("\n")[0]
        log.info("pulling back one query at a time: %s", first_line)
        return _one_after_the_other(gradient_vjp, grads, buffers)
    # Outside of the handler, where the error would keep the tensors of the failed call alive.
    halves = slice(0, count // 2), slice(count // 2, None)
    results = [
        batched_vjp(gradient_vjp, select_queries(grads, half), select_queries(buffers, half))
        for half in halves
    ]
    products_of_halves, before_of_halves, scores_of_halves = zip(*results, strict=True)
    return (
        concatenate(products_of_halves),
        concatenate(before_of_halves),
        torch.cat(scores_of_halves),
    )


def lacks_second_derivative(error: Exception) -> bool:
    """Whether torch says that it cannot differentiate a backward pass."""
    sentences = ("is not implemented", "differentiate twice", "once_differentiable")
    return any(sentence in str(error) for sentence in sentences)


def _one_after_the_other(
    gradient_vjp: GradientVJP, grads: Tree, buffers: Tree
) -> tuple[Tree, Tree, Tensor]:
    products: list[Tree] = []
    before: list[Tree] = []
    scores: list[Tensor] = []
    for row in range(len(next(iter(grads.values())))):
        one = slice(row, row + 1)
        product, statistics, score = batched_vjp(
            gradient_vjp, select_queries(grads, one), select_queries(buffers, one)
        )
        products.append(product)
        before.append(statistics)
        scores.append(score)
    return concatenate(products), concatenate(before), torch.cat(scores)


def select_queries(tree: Tree, rows: slice) -> Tree:
    """Views of some queries of a stack `[query, ...]`."""
    return {name: tensor[rows] for name, tensor in tree.items()}


def _as_stack(tree: Tree) -> Tree:
    return each(lambda tensor: tensor[None], tree)


@final
@dataclass(frozen=True, slots=True)
class _StepGradient:
    """The gradient of a step, and the VJPs of its micro-batches.

    Attributes:
        consumed: the gradient that the training's update was made of, before clipping.
        buffers: the model's buffers after the step.
        losses: of every slot, `[slot]`.
        vjps_from_last: gradient and VJP of each micro-batch, from the last to the first.
    """

    consumed: Tree
    buffers: Tree
    losses: Tensor
    vjps_from_last: Callable[[], Iterator[GradientVJP]]

    @staticmethod
    def of(
        transition: Transition, state: State, rules: Rules, trained: Tree | None
    ) -> "_StepGradient":
        micro_batches = transition.micro_batches()
        if len(micro_batches) == 1:
            only = _gradient_vjp(micro_batches[0], state, state.buffers, rules=rules)
            return _StepGradient(
                trained or only.gradient, only.buffers, only.losses, lambda: iter([only])
            )

        # Accumulation exists to save memory: first the gradients, of which no graph is left, and
        # then the graph of one micro-batch at a time.
        buffers_before: list[Tree] = []

        def gradients() -> Iterator[Gradient]:
            for before, result in transition.micro_batch_gradients(state):
                buffers_before.append(before)
                yield result

        total = accumulate(gradients())

        def vjps_from_last() -> Iterator[GradientVJP]:
            for index in reversed(range(len(micro_batches))):
                before = buffers_before[index]
                yield _gradient_vjp(micro_batches[index], state, before, rules=rules)

        return _StepGradient(trained or total.gradient, total.buffers, total.losses, vjps_from_last)


def _gradient_vjp(
    micro_batch: MicroBatch, state: State, buffers: Tree, *, rules: Rules
) -> GradientVJP:
    """The VJP at weights of 1, with the buffers before the micro-batch's forward pass."""
    like = next(iter(state.params.values()))
    ones = torch.ones(len(micro_batch.share)).to(like)
    return rules.gradient_vjp(micro_batch, state.params, buffers, weights=ones)


@final
@dataclass(frozen=True, slots=True)
class SweptStep:
    """What a sweep computes at one step.

    Attributes:
        step: its index.
        influence: I of every slot, `[query, slot]`, for the queries that read a later state.
        losses: training loss of every slot, `[slot]`.
        norms: norm of λ_θ of the same queries before the step, `[query]`.
        cotangent: of the state before the step, with the queries that read this very state behind
            the others; None if no query reads this or a later state.
    """

    step: int
    influence: Tensor
    losses: Tensor
    norms: Tensor
    cotangent: Cotangent | None


@final
@dataclass(frozen=True, slots=True)
class Sweep:
    """Executes a schedule: restores, recomputes and reverses steps, from the last to the first.

    Attributes:
        load: the kept state of a number.
        transition: the step of an index.
        add_queries: from a state's number, the state, and the cotangents that later states passed
            on to it (overwritten; None if there are none), its cotangents with those of the queries
            that read it.
        rules: how derivatives are taken.
        chunk: how many queries are pulled back at once.
    """

    load: Callable[[int], State]
    transition: Callable[[int], Transition]
    add_queries: Callable[[int, State, Cotangent | None], Cotangent | None]
    rules: Rules
    chunk: int

    def __call__(
        self, actions: Iterator[Action], cotangent: Cotangent | None
    ) -> Iterator[SweptStep]:
        """Execute a schedule.

        Args:
            actions: the schedule.
            cotangent: of the state after its last step.

        Yields:
            The steps, from the last to the first.
        """
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

    def _reverse(self, step: int, state: State, cotangent: Cotangent | None) -> SweptStep:
        transition = self.transition(step)
        if cotangent is None:
            # No query reads a later state, so the step influences none and is not computed.
            slots = sum(transition.slot_counts)
            return SweptStep(
                step,
                influence=torch.zeros(0, slots),
                losses=torch.full((slots,), torch.nan),
                norms=torch.zeros(0),
                cotangent=self.add_queries(step, state, None),
            )
        try:
            pulled = pull_back(transition, state, cotangent, rules=self.rules, chunk=self.chunk)
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, BacktrailError) or not lacks_second_derivative(error):
                raise
            raise LateSecondDerivative(step, str(error).partition("\n")[0]) from error
        # Before the queries of this state join, of which the step has no influence.
        norms = pulled.cotangent.norms()
        before = self.add_queries(step, state, pulled.cotangent)
        return SweptStep(step, pulled.influence, pulled.losses, norms, before)
