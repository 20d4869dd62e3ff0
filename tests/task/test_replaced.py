"""Plain operations in the place of functions of torch, against those."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from backtrail.task.surrogate import surrogate_gradients
from backtrail.task.true_derivatives import TrueDerivatives

DOUBLE = torch.float64


def drawn(*shape: int) -> Tensor:
    """Normal numbers, always the same."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


def ctc(scores: Tensor, **settings: Any) -> Tensor:
    """Three sequences of 6 frames and 4 classes, of different lengths."""
    targets = torch.tensor([[1, 1, 2], [3, 2, 0], [1, 0, 0]])
    return functional.ctc_loss(
        scores, targets, torch.tensor([6, 5, 6]), torch.tensor([3, 2, 1]), **settings
    )


CTC: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": ctc,
    "sum": lambda x: ctc(x, reduction="sum"),
    "none": lambda x: ctc(x, reduction="none").square().sum(),
    "blank": lambda x: functional.ctc_loss(
        x,
        torch.tensor([[0, 2], [1, 0], [2, 2]]),
        torch.tensor([6, 6, 6]),
        torch.tensor([2, 2, 2]),
        blank=3,
    ),
    "one row of targets": lambda x: functional.ctc_loss(
        x, torch.tensor([1, 1, 2, 3, 2, 1]), torch.tensor([6, 5, 6]), torch.tensor([3, 2, 1])
    ),
    "no labels": lambda x: functional.ctc_loss(
        x, torch.tensor([[1], [0], [2]]), torch.tensor([6, 6, 6]), torch.tensor([1, 0, 1])
    ),
    "impossible": lambda x: functional.ctc_loss(
        x,
        torch.tensor([[1, 1, 1], [1, 2, 3], [2, 0, 0]]),
        torch.tensor([4, 6, 6]),
        torch.tensor([3, 3, 1]),
        zero_infinity=True,
    ),
    "one sequence": lambda x: functional.ctc_loss(
        x[:, 0], torch.tensor([1, 2]), torch.tensor(6), torch.tensor(2), reduction="sum"
    ),
    "torch.ctc_loss": lambda x: torch.ctc_loss(
        x,
        torch.tensor([[1, 2], [3, 1], [2, 2]]),
        torch.tensor([6, 6, 6]),
        torch.tensor([2, 2, 2]),
        0,
        2,
    ),
}


def compare(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """The value and the gradient are torch's; the derivative of the gradient is the true one."""
    x = x.clone().requires_grad_()
    expected = function(x)
    (expected_gradient,) = torch.autograd.grad(expected, x)

    def gradient(point: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(function(point), point)
        return found

    with TrueDerivatives():
        found = function(x)
    with surrogate_gradients():
        (found_gradient,) = torch.autograd.grad(found, x, create_graph=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_gradient, expected_gradient)
    cotangent = drawn(*x.shape).flip(0)
    (product,) = torch.autograd.grad(found_gradient, x, cotangent)
    direction = drawn(*x.shape)
    width = 1e-5
    up = gradient((x + width * direction).detach().requires_grad_())
    down = gradient((x - width * direction).detach().requires_grad_())
    difference = ((up - down) * cotangent).sum() / (2 * width)
    torch.testing.assert_close((product * direction).sum(), difference, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", sorted(CTC))
def test_ctc_of_normalised_probabilities(name: str) -> None:
    """As it is used."""
    compare(lambda x: CTC[name](torch.log_softmax(x, -1)), drawn(6, 3, 4))


@pytest.mark.parametrize("name", sorted(CTC))
def test_ctc_of_any_scores(name: str) -> None:
    """The gradient that torch takes is of normalised probabilities, so no derivative here."""
    compare(CTC[name], drawn(6, 3, 4))


def test_ctc_that_is_impossible_is_infinite() -> None:
    """As torch says."""
    scores = torch.log_softmax(drawn(2, 1, 4), -1).requires_grad_()
    with TrueDerivatives():
        loss = functional.ctc_loss(
            scores, torch.tensor([[1, 2, 3]]), torch.tensor([2]), torch.tensor([3])
        )
    assert loss == torch.inf


def test_pdist() -> None:
    """Distances of pairs."""
    compare(lambda x: functional.pdist(x).square().sum() + torch.pdist(x, 3.0).sum(), drawn(4, 3))


@pytest.mark.skipif(
    not hasattr(functional, "linear_cross_entropy"), reason="this torch has no such function"
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_in_chunks(reduction: str) -> None:
    """The last layer and its loss in one."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)

    def loss(x: Tensor) -> Tensor:
        labels = torch.tensor([0, 3, 1, 1, 4])
        losses = functional.linear_cross_entropy(
            drawn(5, 3), x, labels, reduction=reduction, options=options
        )
        return losses.square().sum()

    compare(loss, drawn(5, 3))
