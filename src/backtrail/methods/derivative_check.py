r"""The check that every attribution makes of its own derivatives.

Two steps of the training are computed again in float64. Before them, the parameters, the running
statistics and the weights of the first step's slots are moved a little along a random direction d,
both ways. Two changes are compared with what the sweep says about them:

.. math::
    \text{gradient} \quad & \langle a, g(h) - g(-h) \rangle / 2h
        \;=\; \langle J_g^\top a, d \rangle \\
    \text{two steps} \quad & \langle \lambda, s(h) - s(-h) \rangle / 2h
        \;=\; \langle S^\top \lambda, d \rangle

with g the gradient of the first step and s the state after the second one: parameters, running
statistics and the optimizer's moments. a and λ are random.

Differences do not know how torch differentiates. So they see a stop-gradient, a buffer that is
written without one, or a kernel whose second derivative is wrong. They are taken at two sizes of h;
where the two do not agree with each other (a kink of ReLU in between, or too little precision),
nothing is said against the sweep.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from backtrail.curvature.policies import Hessian
from backtrail.errors import (
    BacktrailError,
    BadSetting,
    NoSecondDerivative,
    WrongDerivative,
)
from backtrail.optim.slopes import Tangent
from backtrail.run.run import Run
from backtrail.step.state import State, elementwise_keys
from backtrail.step.step import Transition, Weights
from backtrail.sweep.adjoint import (
    Cotangent,
    lacks_second_derivative,
    pull_back,
    pull_gradient,
)
from backtrail.sweep.rules import Rules
from backtrail.task.surrogate import surrogate_gradients
from backtrail.tree import Tree, norm

# Sizes of h, of which the parameters move by this share of their own size. Small, so that few kinks
# of a large network lie in between; float64 has room for that.
SIZES = (2e-7, 2.5e-8)
CLOSE = 1e-4  # relative difference that rounding explains
# The two sizes agree where their difference is below this share of the difference from the sweep.
AGREEING = 0.1
STEPS = 2
MOST_STATES = 4  # at which products by differences are checked
MOST_LAYERS = 64  # that a wrong derivative is looked for in
SMALLEST = 1e-3  # norm of a tensor, relative to the largest of its kind, that counts as its own
SEED = 0
RULES = Rules(Hessian(), Tangent())

PASSED = "passed"


@final
@dataclass(frozen=True, slots=True)
class _Direction:
    """What is moved before the first step.

    Attributes:
        params: change of the trained parameters.
        buffers: change of the running statistics.
        weights: change of the weights of the step's slots, `[slot]`.
    """

    params: Tree
    buffers: Tree
    weights: Tensor

    def moved(self, state: State, size: float) -> State:
        """The state after a move."""
        params = dict(state.params)
        for name, change in self.params.items():
            params[name] = params[name] + size * change
        buffers = dict(state.buffers)
        for name, change in self.buffers.items():
            buffers[name] = buffers[name] + size * change
        return State(params, buffers, state.moments)

    def product(self, params: Tree, buffers: Tree, scores: Tensor) -> float:
        """The inner product with derivatives by parameters, running statistics and weights."""
        total = (self.weights * scores).sum()
        for name, change in self.params.items():
            total = total + (change * params[name]).sum()
        for name, change in self.buffers.items():
            total = total + (change * buffers[name]).sum()
        return float(total)

    def only(self, names: Sequence[str]) -> "_Direction":
        """The move of some parameters alone."""
        params = {name: self.params[name] for name in names}
        return _Direction(params, {}, torch.zeros_like(self.weights))


@final
@dataclass(frozen=True, slots=True)
class _Compared:
    """A derivative by the sweep and by differences of two sizes.

    Attributes:
        swept: by the sweep.
        wide: by differences of the larger size.
        narrow: by differences of the smaller size.
    """

    swept: float
    wide: float
    narrow: float

    @property
    def gap(self) -> float:
        """Relative difference of the sweep from the nearer one of the differences."""
        return min(self._gap_from(self.wide), self._gap_from(self.narrow))

    def _gap_from(self, difference: float) -> float:
        scale = max(abs(self.swept), abs(difference))
        return abs(difference - self.swept) / scale if scale else 0.0

    @property
    def is_close(self) -> bool:
        """Whether the sweep agrees with the differences of either size."""
        return self.gap <= CLOSE

    @property
    def is_wrong(self) -> bool:
        """Whether the differences agree with each other, and not with the sweep."""
        if not math.isfinite(self.swept):
            return math.isfinite(self.wide) and math.isfinite(self.narrow)
        off = abs(self.wide - self.swept)
        return not self.is_close and abs(self.wide - self.narrow) <= AGREEING * off


def check_derivatives(run: Run, curvature: object) -> str:
    """Check the exact derivatives of two steps, once for every run that was opened.

    Args:
        run: The recorded training.
        curvature: The policy of the attribution; products by differences need a symmetric second
            derivative.

    Returns:
        "passed", or why nothing could be said.

    Raises:
        WrongDerivative: The derivative of a step is wrong.
        BadSetting: Products by differences, of a model that stops gradients or changes buffers.
        NoSecondDerivative: Products by differences are needed, and not possible.
    """
    if run.derivatives is None:
        run.find_cancelled()
        run.note_derivatives(_Check.of(run).made())
    found = run.derivatives
    assert found is not None
    by_differences = getattr(curvature, "product", None) == "difference"
    if by_differences or run.task.binding.no_second_derivative:
        _check_more_states(run)
    if run.moving_buffers and by_differences:
        raise BadSetting(
            "product",
            "difference",
            "product='autograd', since the forward passes of this training change "
            f"{', '.join(run.moving_buffers)}, which differences of gradients do not follow",
        )
    if run.asymmetric and by_differences:
        raise BadSetting(
            "product",
            "difference",
            "product='autograd', since the gradient of this training is not the derivative of its "
            f"loss ({run.asymmetric}), and differences of gradients need one that is",
        )
    return found


def _check_more_states(run: Run) -> None:
    """Check steps from the beginning to the end, once.

    Differences of gradients are wrong in steps that stop gradients or change buffers, which the
    steps in the middle of the training need not do.
    """
    if run.are_differences_checked:
        return
    starts = [number for number in run.kept if number < run.steps]
    spread = np.linspace(0, len(starts) - 1, num=min(len(starts), MOST_STATES))
    for place in spread.round().astype(int):
        _Check(run, starts[place]).made()
    run.note_differences_checked()


@final
@dataclass(frozen=True, slots=True)
class _Check:
    """The check of two steps.

    Attributes:
        run: the recorded training.
        first: number of the first step.
    """

    run: Run
    first: int

    @staticmethod
    def of(run: Run) -> "_Check":
        """The check at a state on disk in the middle of the training."""
        starts = [number for number in run.kept if number < run.steps]
        return _Check(run, starts[len(starts) // 2])

    @property
    def transitions(self) -> list[Transition]:
        """The steps in float64."""
        last = min(self.first + STEPS, self.run.steps)
        return [self.run.transition(index, torch.float64) for index in range(self.first, last)]

    def made(self) -> str:
        """Make the check.

        Raises:
            WrongDerivative: the derivative of a step is wrong.
            NoSecondDerivative: there is no way to take it.
            BacktrailError: the task is wrong.
            RuntimeError: the model fails.
        """
        try:
            transitions = self.transitions
            states = [self.run.state(self.first, dtype=torch.float64)]
            for transition in transitions:
                states.append(transition.advance(states[-1]))
        except BacktrailError:
            raise
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            return f"not checked: the training cannot be computed in float64 ({_line(error)})"
        missing = self.run.task.binding.no_second_derivative
        if not missing:
            try:
                return self._compared(transitions, states)
            except (RuntimeError, NotImplementedError) as error:
                if isinstance(error, BacktrailError) or not lacks_second_derivative(error):
                    raise
                missing = _line(error)
        if self.run.moving_buffers:
            raise NoSecondDerivative(missing, self.run.moving_buffers)
        # From now on, policies take differences of gradients. Those are products with the transpose
        # of the derivative only where a gradient is the derivative of its loss.
        self.run.task.binding.no_second_derivative = missing
        found = self._compared(transitions, states, instead=missing)
        return f"{found}, by differences of gradients: torch has no second derivative ({missing})"

    def _compared(
        self, transitions: list[Transition], states: list[State], *, instead: str = ""
    ) -> str:
        """Compare the sweep with differences.

        Where they agree, this takes four gradients and three products with second derivatives.

        Args:
            transitions: the steps.
            states: before the first step, and after every step.
            instead: why the sweep itself takes differences of gradients, if it does.

        Raises:
            WrongDerivative: the derivative of a step is wrong.
        """
        state = states[0]
        generator = torch.Generator().manual_seed(SEED)
        direction = _direction(transitions[0], state, generator)
        a = _random_tree({n: state.params[n] for n in transitions[0].updated}, generator)
        cotangent = _cotangent(transitions[-1], states[-1], generator)

        by_gradient, by_steps = self._swept(transitions, states, direction, a, cotangent)

        def differences(size: float) -> tuple[float, float]:
            up = _moved_on(transitions, direction, state, size, a=a, cotangent=cotangent)
            down = _moved_on(transitions, direction, state, -size, a=a, cotangent=cotangent)
            return (up[0] - down[0]) / (2 * size), (up[1] - down[1]) / (2 * size)

        # What the parameters were moved by is still there, and is not a derivative of anything.
        still = _inner(_first(cotangent.params), direction.params)
        wide = differences(SIZES[0])
        first_look = (
            _Compared(by_gradient, wide[0], wide[0]),
            _Compared(by_steps - still, wide[1] - still, wide[1] - still),
        )
        if all(compared.is_close for compared in first_look):
            return PASSED
        # Only a disagreement needs the second size, which tells kinks from errors.
        narrow = differences(SIZES[1])
        gradient = _Compared(by_gradient, wide[0], narrow[0])
        steps = _Compared(by_steps - still, wide[1] - still, narrow[1] - still)
        if gradient.is_wrong:
            layers = self._layers(transitions[0], state, direction, a)
            raise WrongDerivative(self.first, "its gradient", gradient.gap, layers, instead=instead)
        if gradient.is_close and steps.is_wrong:
            raise WrongDerivative(
                self.first, "the state two steps later", steps.gap, instead=instead
            )
        if gradient.is_close and steps.is_close:
            return PASSED
        return "not checked: kinks (or too little precision) at the scale of the differences"

    def _swept(
        self,
        transitions: list[Transition],
        states: list[State],
        direction: _Direction,
        a: Tree,
        cotangent: Cotangent,
    ) -> tuple[float, float]:
        """Both derivatives along the direction, by the sweep; `states` are those between steps."""
        state = states[0]
        params, buffers, scores = pull_gradient(transitions[0], state, _as_stack(a), rules=RULES)
        by_gradient = direction.product(params, buffers, scores)
        self._note_asymmetry(transitions[0], state, a, by_gradient=params)
        # It is overwritten by the sweep.
        pulled = _copied(cotangent)
        for transition, before in zip(reversed(transitions), reversed(states[:-1]), strict=True):
            found = pull_back(transition, before, pulled, rules=RULES, chunk=1)
            pulled = found.cotangent
        by_steps = direction.product(
            _first(pulled.params), _first(pulled.buffers), -found.influence[0]
        )
        return by_gradient, by_steps

    def _note_asymmetry(
        self, transition: Transition, state: State, a: Tree, *, by_gradient: Tree
    ) -> None:
        """Note whether the gradient is another function than the derivative of the loss."""
        names = self.run.task.binding.surrogates
        if not names:
            return
        # As if the derivative of the gradient were its surrogate, too.
        with surrogate_gradients():
            params, _, _ = pull_gradient(transition, state, _as_stack(a), rules=RULES)
        gap = norm({name: params[name] - by_gradient[name] for name in params})
        if gap > CLOSE * norm(by_gradient):
            self.run.note_asymmetric(", ".join(names))

    def _layers(
        self, transition: Transition, state: State, direction: _Direction, a: Tree
    ) -> list[str]:
        """Names of the modules whose parameters have the wrong derivative, where it can be told."""
        modules: dict[str, list[str]] = {}
        for name in direction.params:
            modules.setdefault(name.rpartition(".")[0], []).append(name)
        params, buffers, scores = pull_gradient(transition, state, _as_stack(a), rules=RULES)
        wrong: list[str] = []
        for module, names in list(modules.items())[:MOST_LAYERS]:
            part = direction.only(names)
            swept = part.product(params, buffers, scores)
            by_size = []
            for size in SIZES:
                up = _gradient_product(transition, part, state, size, a)
                down = _gradient_product(transition, part, state, -size, a)
                by_size.append((up - down) / (2 * size))
            if _Compared(swept, *by_size).is_wrong:
                wrong.append(module or type(self.run.task.model).__name__)
        return wrong


def _direction(transition: Transition, state: State, generator: torch.Generator) -> _Direction:
    """A random move, of the size of what is moved."""
    params: Tree = {}
    for name in transition.trained:
        params[name] = _random_like(state.params[name], generator)
    buffers: Tree = {}
    for name in transition.task.running:
        if name in state.buffers:
            buffers[name] = _random_like(state.buffers[name], generator)
    slots = sum(transition.slot_counts)
    like = next(iter(state.params.values()))
    weights = torch.randn(slots, generator=generator, dtype=torch.float64).to(like.device)
    return _Direction(params, buffers, weights)


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of a tensor's own root mean square, or of 1 where that is zero."""
    size = tensor.square().mean().sqrt() if tensor.numel() else tensor.new_zeros(())
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
    return drawn * torch.where(size > 0, size, 1.0)


def _random_tree(tree: Tree, generator: torch.Generator) -> Tree:
    drawn: Tree = {}
    for name, tensor in tree.items():
        drawn[name] = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
    return drawn


def _cotangent(transition: Transition, after: State, generator: torch.Generator) -> Cotangent:
    """Random weights of the entries of a state, inverse to their size."""
    params = {name: after.params[name] for name in transition.trained}
    running = [name for name in transition.task.running if name in after.buffers]
    buffers = {name: after.buffers[name] for name in running}
    by_key: dict[str, Tree] = {}
    for name, tree in after.moments.items():
        for key in elementwise_keys(tree, after.params[name]):
            by_key.setdefault(key, {})[name] = tree[key]
    moments: dict[str, Tree] = {name: {} for name in after.moments}
    for key, tree in by_key.items():
        for name, weights in _weights_of(tree, generator).items():
            moments[name][key] = weights
    return Cotangent(_weights_of(params, generator), _weights_of(buffers, generator), moments)


def _weights_of(tree: Tree, generator: torch.Generator) -> Tree:
    """Random numbers `[1, ...]`, inverse to the norm of each tensor."""
    norms = {name: float(torch.linalg.vector_norm(tensor)) for name, tensor in tree.items()}
    # A tensor of rounding alone (the moment of a bias before BatchNorm) must not count as much.
    least = SMALLEST * max(norms.values(), default=0.0)
    weights: Tree = {}
    for name, tensor in tree.items():
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        weights[name] = (drawn / (max(norms[name], least) or 1.0))[None]
    return weights


def _moved_on(
    transitions: list[Transition],
    direction: _Direction,
    state: State,
    size: float,
    *,
    a: Tree,
    cotangent: Cotangent,
) -> tuple[float, float]:
    """The products with the gradient of the first step, and with the state after the last one."""
    now = direction.moved(state, size)
    weights: Weights | None = 1 + size * direction.weights
    product = 0.0
    for place, transition in enumerate(transitions):
        raw = transition.raw_gradient(now, weights=weights, autocast=False)
        weights = None
        if place == 0:
            product = _inner(a, raw.gradient)
        now = transition.apply_update(now, transition.clip(raw.gradient), raw.buffers)
    after = _inner(_first(cotangent.params), now.params)
    after += _inner(_first(cotangent.buffers), now.buffers)
    for name, tree in cotangent.moments.items():
        after += _inner(_first(tree), now.moments[name])
    return product, after


def _gradient_product(
    transition: Transition, direction: _Direction, state: State, size: float, a: Tree
) -> float:
    moved = direction.moved(state, size)
    raw = transition.raw_gradient(moved, weights=1 + size * direction.weights, autocast=False)
    return _inner(a, raw.gradient)


def _inner(left: Tree, right: Tree) -> float:
    return sum((float((tensor * right[name]).sum()) for name, tensor in left.items()), 0.0)


def _first(tree: Tree) -> Tree:
    return {name: tensor[0] for name, tensor in tree.items()}


def _as_stack(tree: Tree) -> Tree:
    return {name: tensor[None] for name, tensor in tree.items()}


def _copied(cotangent: Cotangent) -> Cotangent:
    def copy(tree: Tree) -> Tree:
        return {name: tensor.clone() for name, tensor in tree.items()}

    moments = {name: copy(tree) for name, tree in cotangent.moments.items()}
    return Cotangent(copy(cotangent.params), copy(cotangent.buffers), moments)


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]
