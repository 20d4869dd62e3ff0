"""The mean outer product of gradients by sampled labels is the Gauss-Newton matrix."""

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


def test_a_seed_draws_these_labels() -> None:
    """On every version of torch: the losses are those of these classes, and of these targets."""
    outputs = torch.tensor([[0.3, -0.2, 0.9]], dtype=torch.float64)
    rows = outputs.repeat(8, 1)
    many = rows, (torch.zeros(8, 1), torch.zeros(8, dtype=torch.long))
    labels = torch.tensor([2, 2, 2, 0, 0, 2, 0, 2])
    wanted = nn.functional.cross_entropy(rows, labels, reduction="none")
    task, _, _ = TASKS["classification"]
    assert task.draw is not None
    assert torch.equal(task.draw(*many, torch.Generator().manual_seed(7)), wanted)
    task, _, _ = TASKS["tokens"]
    assert task.draw is not None
    tokens = rows.reshape(4, 2, 3), (torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.long))
    of_rows = wanted.reshape(4, 2).sum(1) * 0.5**0.5
    found = task.draw(*tokens, torch.Generator().manual_seed(7))
    torch.testing.assert_close(found, of_rows)
    task, _, _ = TASKS["regression"]
    assert task.draw is not None
    noise = torch.tensor([[0.38524611], [0.97175245], [0.54416890]], dtype=torch.float64)
    found = task.draw(torch.ones(3, 1), many[1], torch.Generator().manual_seed(7))
    torch.testing.assert_close(found.double(), noise[:, 0].square() / 2, rtol=1e-6, atol=0)


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
