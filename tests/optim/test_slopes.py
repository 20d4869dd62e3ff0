"""The secant of an update: the mean of its derivative over the width of one sample."""

import numpy as np
import pytest
import torch
from torch import Tensor

from backtrail.optim.flatten import flat_chunks
from backtrail.optim.jacobian import GRADIENT, PARAMETER, Diagonals
from backtrail.optim.slopes import Secant, Tangent, UpdateDerivative
from backtrail.step.optimizers import RULES
from backtrail.step.state import State
from backtrail.step.update import Update
from tests.step.updates import started

SLOTS = 16


def diagonals_of(slope: UpdateDerivative, update: Update, state: State, grad: Tensor) -> Diagonals:
    """At all entries of the parameter."""
    (chunk,) = flat_chunks(update, state, {"w": grad})
    return slope.diagonals(update, state, {"w": grad}, chunk=chunk, slots=SLOTS)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("kind", ["Adam", "RMSprop", "Adagrad", "NAdam"])
def test_the_secant_is_the_mean_of_tangents_over_its_width(kind: str, steps: int) -> None:
    """Gauss-Legendre quadrature of U' between g - s and g + s, with s = width rms(g) / sqrt(n)."""
    update, state, grad = started(kind, steps)
    grad = torch.where(
        grad.abs() < 0.5, grad.sign() * 0.5, grad
    )  # no entry changes its sign, where Adam has a kink
    size = 0.5 * grad.square().mean().sqrt() / SLOTS**0.5
    places, weights = np.polynomial.legendre.leggauss(40)
    tangents = [diagonals_of(Tangent(), update, state, grad + float(x) * size) for x in places]
    found = diagonals_of(Secant(width=0.5), update, state, grad)
    for output in (key for key, source in found if source == GRADIENT):
        pair = (output, GRADIENT)
        mean = sum(
            float(w) / 2 * diagonals[pair] for w, diagonals in zip(weights, tangents, strict=True)
        )
        torch.testing.assert_close(found[pair], mean, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", RULES)
def test_a_narrow_secant_is_the_tangent(kind: str) -> None:
    """In the limit nothing is replaced, and only the gradient's column ever is."""
    update, state, grad = started(kind, 2)
    exact, narrow = (
        diagonals_of(slope, update, state, grad) for slope in (Tangent(), Secant(width=1e-4))
    )
    assert exact.keys() == narrow.keys()
    for pair, entry in exact.items():
        torch.testing.assert_close(narrow[pair], entry, rtol=1e-5, atol=1e-7)


def test_momentum_has_no_curvature_to_average() -> None:
    """SGD is linear in its gradient: the secant is the derivative, from the first step on."""
    for steps in (0, 2):
        update, state, grad = started("SGD", steps)
        exact, wide = (
            diagonals_of(slope, update, state, grad) for slope in (Tangent(), Secant(width=5.0))
        )
        torch.testing.assert_close(wide, exact, rtol=1e-12, atol=1e-12)


def test_adams_first_step_is_steep_at_a_point_and_not_over_a_width() -> None:
    """Near g = 0 the derivative is about lr / eps; no removal moves a weight by more than lr."""
    update, state, grad = started("AdamW", 0)
    grad[2] = 1e-12
    steep, gentle = (
        diagonals_of(slope, update, state, grad)[PARAMETER, GRADIENT][2]
        for slope in (Tangent(), Secant())
    )
    size = grad.square().mean().sqrt() / SLOTS**0.5
    assert steep.abs() > 1e6
    assert gentle.abs() <= 1.01 * 0.1 / size  # the learning rate is 0.1


def test_a_gradient_of_zero_falls_back_to_the_tangent() -> None:
    """There is no width to average over."""
    update, state, _ = started("AdamW", 3)
    zero = torch.zeros(6, dtype=torch.float64)
    exact, found = (diagonals_of(slope, update, state, zero) for slope in (Tangent(), Secant()))
    torch.testing.assert_close(found, exact, rtol=0, atol=0)
