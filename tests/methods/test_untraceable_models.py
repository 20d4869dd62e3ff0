"""Models that torch.func cannot follow are attributed as exactly as others.

The truth is a loop of plain torch with one slot's weight moved up and down, or its own gradients.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.run.run import Run

# torch warns where it has no batching rule and takes a loop; under these tests warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

ORDER = [list(range(first, first + 4)) for first in (0, 4, 8, 0, 4)]
SLOTS = [(0, 0), (2, 3), (4, 1)]  # (step, slot)
RATE = 0.1


class Packed(nn.Module):
    """A recurrent network on sequences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.recurrent = nn.GRU(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Classify by the last hidden state."""
        sequence = pack_padded_sequence(
            self.embed(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        scores: Tensor = self.head(self.recurrent(sequence)[1][-1])
        return scores


class OldSine(torch.autograd.Function):
    """A function of the old form, without `setup_context`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Sine."""
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        """Cosine."""
        (x,) = ctx.saved_tensors
        return x.cos() * cotangent


class WithFunction(nn.Module):
    """A network with such a function in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        scores: Tensor = self.last(OldSine.apply(self.first(x)))
        return scores


class HookedBackward(nn.Module):
    """A network with a hook on a module's backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = perceptron()
        self.inside[2].register_full_backward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        scores: Tensor = self.inside(x)
        return scores


class SavedHooks(nn.Module):
    """A network that moves its saved tensors elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = perceptron()

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            scores: Tensor = self.inside(x)
        return scores


class Branching(nn.Module):
    """A network with a branch on its data, by the row alone where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = perceptron()

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        scores: Tensor = self.inside(x)
        return scores * 2 if len(x) > 0 and float(x.detach().abs().max()) > -1 else -scores


class Bag(nn.Module):
    """A layer without a second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores."""
        scores: Tensor = self.head(self.bag(tokens).tanh())
        return scores


def perceptron() -> nn.Module:
    """A smooth perceptron."""
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))


def first_entry(model: nn.Module, batch: Any) -> Any:
    """Call the model on the inputs."""
    return model(batch[0])


def with_input_gradient(model: nn.Module, batch: Any) -> Tensor:
    """Scores that hold a derivative by the inputs, as in a gradient penalty."""
    inputs = batch[0].detach().requires_grad_()
    scores: Tensor = model(inputs)
    (slope,) = torch.autograd.grad(scores.square().sum(), inputs, create_graph=True)
    return scores + 0.3 * slope[:, :3]


def with_func(model: nn.Module, batch: Any) -> Tensor:
    """The same by torch.func."""
    slope: Tensor = vmap(grad(lambda x: model(x[None]).square().sum()))(batch[0])
    scores: Tensor = model(batch[0])
    return scores + 0.3 * slope[:, :3]


@dataclass(frozen=True)
class Kind:
    """A model, how it is called, and whether its inputs are tokens."""

    build: Callable[[], nn.Module]
    predict: Callable[[nn.Module, Any], Any] = first_entry
    tokens: bool = False


KINDS = {
    "packed": Kind(Packed, lambda model, batch: model(batch[0], batch[1]), tokens=True),
    "function": Kind(WithFunction),
    "hooked": Kind(HookedBackward),
    "saved": Kind(SavedHooks),
    "branch": Kind(Branching),
    "input gradient": Kind(perceptron, with_input_gradient),
    "torch.func": Kind(perceptron, with_func),
    "bag": Kind(Bag, tokens=True),
}


def loss(outputs: Tensor, batch: Any) -> Tensor:
    """Cross-entropy of each row."""
    return cross_entropy(outputs, batch[-1], reduction="none")


class Training:
    """Twelve rows, five steps with momentum, in float64."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        made = torch.Generator().manual_seed(1)
        labels = torch.randint(0, 3, (12,), generator=made)
        tokens = torch.randint(0, 9, (12, 5), generator=made)
        lengths = torch.randint(1, 6, (12,), generator=made)
        inputs = torch.randn(12, 6, dtype=torch.float64, generator=made)
        entries = [tokens, lengths, labels] if kind.tokens else [inputs, labels]
        self.data = TensorDataset(*entries)

    def build(self) -> nn.Module:
        """Make the model anew."""
        torch.manual_seed(3)
        return self.kind.build().double()

    def task(self, model: nn.Module) -> backtrail.Task:
        """Describe it."""
        return backtrail.Task(model, self.data, loss=loss, predict=self.kind.predict)

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of each row."""
        return loss(self.kind.predict(model, batch), batch)

    def steps(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        watch: Callable[[Any], Iterable[Any]] = iter,
        weights: Tensor | None = None,
    ) -> list[dict[str, Tensor]]:
        """Train; return the parameters before each step."""
        states: list[dict[str, Tensor]] = []
        for step, batch in enumerate(watch(DataLoader(self.data, batch_sampler=ORDER))):
            states.append({name: t.detach().clone() for name, t in model.state_dict().items()})
            slot_weights = torch.ones(4).double() if weights is None else weights[step]
            (self.losses(model, batch) * slot_weights).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return states

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Gradient descent with momentum."""
        return torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)

    def record(self, folder: Path) -> Run:
        """Record it."""
        model = self.build()
        optimizer = self.optimizer(model)
        with backtrail.Recorder(folder, self.task(model), optimizer) as recorder:
            self.steps(model, optimizer, recorder.watch)
        return backtrail.open_run(folder, self.task(self.build()))

    def queried(self, model: nn.Module) -> Tensor:
        """Losses of rows 0 and 5, and the mean loss."""
        losses = self.losses(model, self.data[:])
        return torch.stack([losses[0], losses[5], losses.mean()])

    def after(self, weights: Tensor) -> np.ndarray:
        """The queries after a training with these weights of the slots."""
        model = self.build()
        self.steps(model, self.optimizer(model), weights=weights)
        found: np.ndarray = self.queried(model).detach().numpy()
        return found

    def derivative(self, step: int, slot: int) -> np.ndarray:
        """What the queries gain by less weight of a slot."""
        sides = []
        for sign in (1, -1):
            weights = torch.ones(len(ORDER), 4, dtype=torch.float64)
            weights[step, slot] += sign * 1e-5
            sides.append(self.after(weights))
        found: np.ndarray = (sides[1] - sides[0]) / 2e-5
        return found

    def product(self, state: dict[str, Tensor], step: int, slot: int) -> np.ndarray:
        """Products of a slot's gradient with those of the queries, at a state."""
        model = self.build()
        model.load_state_dict(state)
        parameters = list(model.parameters())
        batch = self.data[ORDER[step]]
        mine = torch.autograd.grad(self.losses(model, batch)[slot], parameters, allow_unused=True)
        products = []
        for query in self.queried(model):
            theirs = torch.autograd.grad(query, parameters, retain_graph=True, allow_unused=True)
            terms = [
                float((one * other).sum())
                for one, other in zip(mine, theirs, strict=True)
                if one is not None and other is not None
            ]
            products.append(RATE / 4 * sum(terms))
        return np.array(products)


def at_slots(run: Run, training: Training, method: Any) -> np.ndarray:
    """Influence of the slots on the three queries, `[query, slot]`."""
    found = []
    for query in (
        backtrail.Loss(training.data, [0, 5]),
        backtrail.Loss(training.data, aggregate="mean"),
    ):
        found.append(method.attribute(run, query).values()[:, 0])
    steps, slots = zip(*SLOTS, strict=True)
    joined: np.ndarray = np.concatenate(found)[:, list(steps), list(slots)]
    return joined


@pytest.mark.parametrize("name", KINDS)
def test_influence_is_the_derivative_of_the_training(name: str, tmp_path: Path) -> None:
    """By both ways of taking the curvature product, on several queries at once."""
    training = Training(KINDS[name])
    run = training.record(tmp_path / "run")
    truth = np.stack([training.derivative(*place) for place in SLOTS], 1)
    differences = backtrail.DIT(curvature=backtrail.Hessian(product="difference"))
    for method in (backtrail.DIT(), differences):
        np.testing.assert_allclose(
            at_slots(run, training, method), truth, rtol=1e-6, atol=1e-8 * np.abs(truth).max()
        )


@pytest.mark.parametrize("name", KINDS)
def test_products_of_gradients_need_no_second_derivative(name: str, tmp_path: Path) -> None:
    """TracIn and GradientDot against gradients by plain autograd."""
    training = Training(KINDS[name])
    model = training.build()
    states = training.steps(model, training.optimizer(model))
    run = training.record(tmp_path / "run")
    own = np.stack([training.product(states[step], step, slot) for step, slot in SLOTS], 1)
    np.testing.assert_allclose(at_slots(run, training, backtrail.TracIn()), own, rtol=1e-9)
    end = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    last = np.stack([training.product(end, step, slot) for step, slot in SLOTS], 1)
    np.testing.assert_allclose(at_slots(run, training, backtrail.GradientDot()), last, rtol=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_removals_and_rankings_follow_the_model(name: str, tmp_path: Path) -> None:
    """Retraining agrees with the user's own, and every ranking that fits the task ranks."""
    training = Training(KINDS[name])
    run = training.record(tmp_path / "run")
    weights = torch.tensor([[float(row != 5) for row in rows] for rows in ORDER]).double()
    truth = training.after(weights) - training.after(torch.ones_like(weights))
    found = backtrail.leave_one_out(
        run, backtrail.Loss(training.data, aggregate="mean"), samples=[5]
    )
    np.testing.assert_allclose(found[0, 0], truth[2], rtol=1e-9)
    # A removal after the last visit changes nothing, so no run is made.
    query = backtrail.Loss(training.data, aggregate="mean")
    nothing = backtrail.retrain(run, query, [[8]], steps=(3, 5), observed_at=2)
    assert nothing.change[0, 0, 0] == 0
    assert np.isfinite(nothing.base[0, 0])
    for method in ("loss", "mean-loss", "tracin", "self-influence"):
        assert backtrail.find_mislabeled(run, method=method).height == 12
