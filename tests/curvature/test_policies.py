"""Every policy's product is an explicit matrix times a vector, by autograd and by differences."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian as second_derivative
from torch.autograd.functional import jacobian
from torch.utils.data import TensorDataset

import backtrail
from backtrail.curvature.policies import Curvature
from backtrail.errors import NoOutputs
from backtrail.step.state import BatchRecord, Step
from backtrail.step.step import Transition
from backtrail.step.update import Update
from tests.cases import Tied, decay, mlp, normed
from tests.curvature.problems import SLOTS, Problem, problem

PROBLEMS = {
    "smooth": lambda: problem(mlp),
    "penalty": lambda: problem(mlp, penalty=decay),
    "tied": lambda: problem(Tied),
    "batchnorm": lambda: problem(normed),
    "batchnorm, eval": lambda: problem(normed, evaluating=True),
}
Matrix = Callable[[Problem], Tensor]


# Plain autograd, entry by entry: torch.func.jacrev twice over a BatchNorm in train mode is wrong in
# the rows of its weight (torch 2.13).
def slopes(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """First derivatives of a function of one tensor."""
    found: Tensor = jacobian(function, at)
    return found


def bend(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Second derivatives of a scalar function of one tensor."""
    found: Tensor = second_derivative(function, at)
    return found


def hessian(given: Problem) -> Tensor:
    """Second derivative of the whole loss."""
    return bend(given.total, given.start)


def gauss_newton(given: Problem) -> Tensor:
    """J' K J with K the loss's second derivative by the outputs."""
    ends = given.outputs(given.start).detach()
    by_parameters = slopes(given.outputs, given.start).flatten(0, 1)

    def mean_loss(outputs: Tensor) -> Tensor:
        return given.micro_batch.transition.task.losses_of(outputs, given.micro_batch.batch).mean()

    middle = bend(mean_loss, ends).view(ends.numel(), ends.numel())
    return by_parameters.T @ middle @ by_parameters + bend(given.penalty, given.start)


def empirical_fisher(given: Problem) -> Tensor:
    """Mean of g g' over the samples."""
    gradients = slopes(given.losses, given.start)
    return gradients.T @ gradients / len(SLOTS) + bend(given.penalty, given.start)


def nothing(given: Problem) -> Tensor:
    """No curvature at all."""
    return torch.zeros(len(given.start), len(given.start), dtype=torch.float64)


POLICIES: list[tuple[Curvature, Matrix]] = [
    (backtrail.Hessian(), hessian),
    (backtrail.GaussNewton(), gauss_newton),
    (backtrail.EmpiricalFisher(), empirical_fisher),
    (backtrail.Zero(), nothing),
]


@pytest.mark.parametrize("product", ["autograd", "difference"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda pair: type(pair[0]).__name__)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_product_equals_the_explicit_matrix(
    name: str, policy: tuple[Curvature, Matrix], product: str
) -> None:
    """So do the gradient, the scores of the samples, and the way through running statistics."""
    given, (curvature, matrix) = PROBLEMS[name](), policy
    linear = replace(curvature, product=product).gradient_vjp(  # type: ignore[type-var]
        given.micro_batch,
        given.params,
        given.buffers,
        weights=torch.ones(len(SLOTS), dtype=torch.float64),
    )
    a = torch.randn(len(given.start), dtype=torch.float64)
    running = {n: given.buffers[n] for n in given.micro_batch.transition.task.running}
    b = {n: torch.randn_like(t) for n, t in running.items()}
    second, before, scores = linear.vjp(given.tree(a), b)
    flat = torch.cat(
        [second.get(n, torch.zeros_like(t)).flatten() for n, t in given.params.items()]
    )
    expected = matrix(given) @ a
    if running:
        expected = expected + slopes(given.statistics, given.start).T @ torch.cat(list(b.values()))
    rtol, atol = (1e-9, 1e-12) if product == "autograd" else (1e-6, 1e-7)
    torch.testing.assert_close(flat, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(
        scores, slopes(given.losses, given.start) @ a / len(SLOTS), rtol=rtol, atol=atol
    )
    gradient = torch.cat([tensor.flatten() for tensor in linear.gradient.values()])
    torch.testing.assert_close(gradient, slopes(given.total, given.start))
    assert set(before) == set(running)


def test_gauss_newton_needs_outputs() -> None:
    """A predict that returns no tensor is told so."""

    class Nothing(nn.Linear):
        def forward(self, inputs: Tensor) -> None:  # type: ignore[override]
            """Keep it to itself."""

    model = Nothing(2, 2)
    data = TensorDataset(torch.zeros(4, 2))
    task = backtrail.Task(model, data, loss=lambda _outputs, batch: batch[0].sum(1))
    step = Step(index=0, fed=(BatchRecord((0, 1), 0, ""),), settings=({"lr": 0.1},), norm=0.0)
    names = tuple(task.parameters())
    micro_batch = Transition(
        task, Update("SGD", (names,), ({"lr": 0.1},)), step, (task.batch([0, 1]),)
    ).micro_batches()[0]
    with pytest.raises(NoOutputs, match="NoneType"):
        backtrail.GaussNewton().gradient_vjp(
            micro_batch, task.parameters(), {}, weights=torch.ones(2)
        )
