"""One score a row, parameters without axes, and queries that read what does not exist."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.errors import BadQuery, BadSetting, NoClasses, NonFiniteInfluence
from backtrail.run.run import Run

RATE = 0.3
H = 1e-5


def binary_rows(labels: torch.dtype) -> TensorDataset:
    """Twelve rows with the label of the sign of their first entry."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, (inputs[:, 0] > 0).to(labels))


def binary_loss(scores: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of one score a row."""
    return binary_cross_entropy_with_logits(scores.flatten(), batch[1].double(), reduction="none")


class OneScore(nn.Module):
    """One score for every row, `[row]` or `[row, 1]`."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(3, 1).double()
        self.flat = flat

    def forward(self, inputs: Tensor) -> Tensor:
        """The scores."""
        scores: Tensor = self.layer(inputs)
        return scores.flatten() if self.flat else scores


def score_after_step(data: TensorDataset, row: int, weight: float) -> float:
    """Score of a row after one step in which sample 1 has a weight, by hand."""
    inputs, labels = data.tensors
    model = OneScore(flat=True)
    weights = torch.ones(12, dtype=torch.float64)
    weights[1] = weight
    loss = (binary_loss(model(inputs), (inputs, labels)) * weights).mean()
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for parameter, slope in zip(model.parameters(), slopes, strict=True):
            parameter.sub_(RATE * slope)
        return float(model(inputs)[row])


@pytest.mark.parametrize("labels", [torch.int64, torch.float64])
@pytest.mark.parametrize("flat", [True, False])
def test_one_score_is_that_of_class_1(tmp_path: Path, labels: torch.dtype, *, flat: bool) -> None:
    """The log-odds of class 0 are minus the score; the logit of class 0 is 0."""
    data = binary_rows(labels)
    model = OneScore(flat=flat)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    task = backtrail.Task(model, data, loss=binary_loss)
    with backtrail.Recorder(tmp_path / "run", task, optimizer) as recorder:
        for batch in recorder.watch(DataLoader(data, batch_size=12)):
            binary_loss(model(batch[0]), batch).mean().backward()
            optimizer.step()
    run = backtrail.open_run(tmp_path / "run", task)
    zero, one = (int((data.tensors[1] == label).nonzero()[0]) for label in (0, 1))
    # Influence of sample 1 on the score: minus the derivative by its weight.
    by_hand = [
        -(score_after_step(data, row, 1 + H) - score_after_step(data, row, 1 - H)) / (2 * H)
        for row in (zero, one)
    ]

    def found(query: backtrail.Query) -> list[float]:
        return backtrail.DIT().attribute(run, query).total()[:, 0, 1].tolist()

    rows = [zero, one]
    margins = found(backtrail.Margin(data, samples=rows))
    np.testing.assert_allclose(margins, [-by_hand[0], by_hand[1]], rtol=1e-6)
    np.testing.assert_allclose(
        found(backtrail.Logit(data, samples=rows)), [0, by_hand[1]], rtol=1e-6
    )
    of_class_1 = found(backtrail.Logit(data, samples=rows, target=1))
    np.testing.assert_allclose(of_class_1, by_hand, rtol=1e-6)
    with pytest.raises(BadQuery, match="class 2, but there are 2 classes"):
        found(backtrail.Logit(data, samples=rows, target=2))


def test_targets_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    """The margin of a regression is refused, and not read from truncated targets."""
    data = TensorDataset(torch.randn(4, 3).double(), torch.full((4,), 0.7).double())
    model = OneScore(flat=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    task = backtrail.regression(model, data)
    with backtrail.Recorder(tmp_path / "run", task, optimizer) as recorder:
        for inputs, targets in recorder.watch(DataLoader(data, batch_size=4)):
            (model(inputs) - targets).square().mean().backward()
            optimizer.step()
    run = backtrail.open_run(tmp_path / "run", task)
    for query in (backtrail.Margin(data), backtrail.Logit(data)):
        with pytest.raises(NoClasses, match="not class numbers"):
            backtrail.GradientDot().attribute(run, query)


class Scaled(nn.Module):
    """A linear layer whose outputs a parameter without axes scales, which comes first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.head = nn.Linear(3, 2).double()

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores of two classes."""
        scores: Tensor = self.head(inputs) * self.scale.exp()
        return scores


def scaled_rows() -> TensorDataset:
    """Eight rows of two classes."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.arange(8) % 2)


def scaled_run(folder: Path) -> Run:
    """Two steps of SGD on a model with a parameter without axes."""
    data = scaled_rows()
    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    task = backtrail.classification(model, data)
    with backtrail.Recorder(folder, task, optimizer) as recorder:
        for inputs, labels in recorder.watch(DataLoader(data, batch_size=4)):
            optimizer.zero_grad()
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    return backtrail.open_run(folder, task)


def scaled_loss(sample: int, weight: float) -> float:
    """Mean loss after the same two steps by hand, with a weight for one sample."""
    inputs, labels = scaled_rows().tensors
    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    weights = torch.ones(8, dtype=torch.float64)
    weights[sample] = weight
    for rows in (slice(0, 4), slice(4, 8)):
        optimizer.zero_grad()
        losses = cross_entropy(model(inputs[rows]), labels[rows], reduction="none")
        (losses * weights[rows]).mean().backward()
        optimizer.step()
    return float(cross_entropy(model(inputs), labels).detach())


def test_parameters_without_axes_are_exact(tmp_path: Path) -> None:
    """Influence through them is the derivative by a sample's weight, and re-runs are exact."""
    run = scaled_run(tmp_path / "run")
    query = backtrail.Loss(run.task.data, aggregate="mean")
    by_hand = [-(scaled_loss(s, 1 + H) - scaled_loss(s, 1 - H)) / (2 * H) for s in range(8)]
    influence = backtrail.DIT().attribute(run, query)
    np.testing.assert_allclose(influence.total()[0, 0], by_hand, rtol=1e-6, atol=1e-9)
    assert np.isfinite(influence.growth).all()
    removed = [scaled_loss(sample, 0) - scaled_loss(sample, 1) for sample in range(8)]
    np.testing.assert_allclose(
        backtrail.leave_one_out(run, query, samples=range(8))[0], removed, rtol=1e-9, atol=1e-12
    )
    for form in ("published", "corrected"):
        of_themselves = backtrail.DiffIn(form=form, rank=None).self_influence(run)
        assert np.isfinite(of_themselves).all()
    assert np.isfinite(backtrail.find_mislabeled(run, method="tracin")["score"].to_numpy()).all()


def test_entries_of_parameters(tmp_path: Path) -> None:
    """A plain number is an entry of a vector, and a parameter without axes has one entry."""
    run = scaled_run(tmp_path / "run")

    def found(name: str, entries: list[tuple[int, ...] | int]) -> np.ndarray:
        query = backtrail.Parameter(name, entries)
        return backtrail.DIT().attribute(run, query).total()

    np.testing.assert_array_equal(found("head.bias", [1, 0]), found("head.bias", [(1,), (0,)]))
    assert backtrail.Parameter("scale", [()]).names == ("scale",)
    assert found("scale", [()]).any()
    wrong: list[tuple[str, list[tuple[int, ...] | int]]] = [
        ("head.bias", [2]),
        ("head.bias", [(0, 0)]),
        ("head.weight", [0]),
        ("head.weight", [(0, 3)]),
        ("scale", [0]),
    ]
    for name, entries in wrong:
        with pytest.raises(BadQuery, match=f"parameter '{name}', but its shape is"):
            found(name, entries)
    alike: list[list[tuple[int, ...] | int]] = [[], [0, 0], [0, (0,)]]
    for entries in alike:
        with pytest.raises(BadSetting, match="Invalid entries="):
            backtrail.Parameter("head.bias", entries)


def test_an_influence_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    """A query whose derivative is NaN gives no result, by any method, and the error names it."""
    run = scaled_run(tmp_path / "run")

    def infinite_slope(model: nn.Module) -> Tensor:
        weight = next(model.parameters())
        return (weight - weight.detach()).abs().sqrt()

    query = backtrail.Custom(infinite_slope, labels=["root"])
    methods: list[backtrail.Method] = [
        backtrail.DIT(),
        backtrail.TracIn(),
        backtrail.GradientDot(),
        backtrail.DataValueEmbedding(rank=2),
    ]
    for method in methods:
        with pytest.raises(NonFiniteInfluence, match="step 1 on the query 'root' at state 2"):
            method.attribute(run, query)


def test_an_error_of_the_users_own_query_is_not_reworded(tmp_path: Path) -> None:
    """It reaches the caller as it was raised."""
    run = scaled_run(tmp_path / "run")

    def broken(model: nn.Module) -> Tensor:
        raise ZeroDivisionError(type(model).__name__)

    for method in (backtrail.DIT(), backtrail.TracIn()):
        with pytest.raises(ZeroDivisionError) as caught:
            method.attribute(run, backtrail.Custom(broken))
        assert any(entry.name == "broken" for entry in caught.traceback)
