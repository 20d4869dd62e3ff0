"""Labels drawn from the model have the Gauss-Newton matrix as the mean of their gradients' outer products."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev

import backtrail

DRAWS = 40_000


def bent(loss: Callable[[Tensor, Any], Tensor], outputs: Tensor, batch: Any) -> Tensor:
    """The second derivative of the only slot's loss by its outputs, as a matrix."""

    def flat_loss(flat: Tensor) -> Tensor:
        return loss(flat.view(outputs.shape), batch)[0]

    return jacrev(grad(flat_loss))(outputs.flatten())


def drawn(task: backtrail.Task, outputs: Tensor, batch: Any) -> Tensor:
    """The mean of many outer products of gradients by the outputs."""
    assert task.draw is not None
    generator, copies = (
        torch.Generator().manual_seed(0),
        outputs.repeat(DRAWS, *[1] * (outputs.dim() - 1)),
    )
    copies.requires_grad_()
    many = tuple(part.repeat(DRAWS, *[1] * (part.dim() - 1)) for part in batch)
    (slopes,) = torch.autograd.grad(task.draw(copies, many, generator).sum(), copies)
    flat = slopes.flatten(1)
    return flat.T @ flat / DRAWS


def case(
    kind: Callable[..., backtrail.Task], outputs: list[Any], targets: int | list[Any]
) -> tuple[backtrail.Task, Tensor, Any]:
    """A task, and what its model says of one slot."""
    batch = torch.zeros(1), torch.tensor([targets])
    return kind(nn.Linear(1, 1), []), torch.tensor([outputs], dtype=torch.float64), batch


TASKS = {
    "classification": case(backtrail.classification, [0.3, -0.2, 0.9], 1),
    "ignored": case(backtrail.classification, [0.3, -0.2, 0.9], -100),
    "regression": case(backtrail.regression, [0.3, -0.2, 0.9], [1.0, 2.0, 3.0]),
    "tokens": case(backtrail.language_model, [[0.3, -0.2], [0.4, 0.0], [0.0, 1.0]], [1, 0, -100]),
}


@pytest.mark.parametrize("name", TASKS)
def test_drawn_labels_have_the_gauss_newton_matrix(name: str) -> None:
    """By the outputs, where it is the loss's second derivative."""
    task, outputs, batch = TASKS[name]
    truth, found = bent(task.loss, outputs, batch), drawn(task, outputs, batch)
    assert (found - truth).abs().max() <= 0.02 * max(float(truth.abs().max()), 1e-12)


def test_draws_follow_their_generator() -> None:
    """The same seed, the same labels."""
    task, outputs, batch = TASKS["classification"]
    many = outputs.repeat(50, 1), tuple(part.repeat(50) for part in batch)
    assert task.draw is not None
    first, second, other = (
        task.draw(*many, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
