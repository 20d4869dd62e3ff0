"""A task: the model, the data and the loss as pure functions."""

from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import Dataset, default_collate

import backtrail
from backtrail.errors import BadLoss, BadReduction, SharedStorage
from backtrail.task.task import default_predict, size_of
from tests.loops import Loop, adam, copied, mlp, recorded_loop, rows, stochastic_mlp


def task(model: nn.Module, data: Any = None, **options: Any) -> backtrail.Task:
    """A classification."""
    return backtrail.classification(model, rows() if data is None else data, **options)


def test_losses_are_those_of_the_given_tensors() -> None:
    """The loss reads the tensors it is given, never the live model's."""
    model = mlp()
    here = task(model)
    params = {name: torch.randn_like(tensor) for name, tensor in here.parameters().items()}
    batch = here.batch([3, 1, 4])
    losses, _ = here.losses(params, {}, batch)
    twin = mlp()
    twin.load_state_dict(params)
    torch.testing.assert_close(
        losses, cross_entropy(twin(batch[0]), batch[1], reduction="none").detach()
    )


def test_the_live_model_is_never_touched() -> None:
    """Neither its tensors nor its modes, nor its hooks' model, change when the task is asked."""
    model = stochastic_mlp().eval()
    before = copied(model.state_dict())
    here = task(model)
    here.binding.set_modes(())
    here.losses(here.parameters(), here.buffers(), here.batch(range(8)))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert all(tensor.device.type == "meta" for tensor in here.binding.parameters())


def test_tied_parameters_have_one_name() -> None:
    """The first of their names; gradients through both places add up."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    here = task(model)
    assert list(here.parameters()) == ["0.weight"]
    losses, _ = here.losses({"0.weight": 2 * torch.eye(3)}, {}, (torch.eye(3), torch.arange(3)))
    torch.testing.assert_close(
        losses, cross_entropy(4 * torch.eye(3), torch.arange(3), reduction="none")
    )


def test_models_with_their_own_generator_can_be_copied() -> None:
    """A module may hold what has no weights at all."""
    model = mlp()
    model.noise = torch.Generator()  # type: ignore[assignment]
    assert task(model).binding.model is not model


class Many(Dataset[Any]):
    """Rows that are fetched many at once."""

    def __len__(self) -> int:
        """Number of rows."""
        return 9

    def __getitem__(self, index: int) -> Any:
        """Not to be used."""
        raise AssertionError

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """The rows."""
        return [(torch.full((3,), float(i)), i % 3) for i in indices]


def test_rows_are_fetched_as_a_loader_would() -> None:
    """A data set that reads many rows at once is asked for many."""
    assert task(mlp(), Many()).batch([4, 7])[0][:, 0].tolist() == [4, 7]


class Keywords(nn.Module):
    """A model with named inputs."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Their difference."""
        return left - right


class Identity(nn.Module):
    """A model of one input."""

    def forward(self, inputs: Tensor) -> Tensor:
        """The input."""
        return inputs


BATCHES: list[tuple[nn.Module, Any, float]] = [
    (Identity(), (torch.ones(2), torch.zeros(2)), 1),
    (Identity(), [torch.ones(2), torch.zeros(2)], 1),
    (Identity(), torch.ones(2), 1),
    (Keywords(), {"left": torch.ones(2), "right": torch.zeros(2)}, 1),
    (Keywords(), UserDict(left=torch.ones(2), right=torch.zeros(2)), 1),
]


@pytest.mark.parametrize(("model", "batch", "found"), BATCHES)
def test_the_model_is_called_as_the_batch_asks(model: nn.Module, batch: Any, found: float) -> None:
    """The first item of a tuple, the keywords of a mapping, or the batch itself."""
    assert default_predict(model, batch).tolist() == [found, found]


def test_a_batch_is_as_long_as_its_first_tensor() -> None:
    """Scalars and plain values do not count."""
    assert size_of({"id": "x", "scale": torch.tensor(2.0), "rows": [torch.zeros(5, 2)]}) == 5


def test_reductions_give_every_slot_its_share() -> None:
    """Mean over micro-batches of means, sum, and a function of all batches of a step."""
    batches = [(torch.zeros(n, 3), torch.zeros(n).long()) for n in (1, 3)]
    assert [c.tolist() for c in task(mlp()).shares(batches, [1, 3])] == [[0.5], [1 / 6] * 3]
    assert [c.tolist() for c in task(mlp(), reduce="sum").shares(batches, [1, 3])] == [
        [1],
        [1, 1, 1],
    ]
    own = task(mlp(), reduce=lambda given: torch.arange(float(sum(len(b[1]) for b in given))))
    assert [c.tolist() for c in own.shares(batches, [1, 3])] == [[0], [1, 2, 3]]
    with pytest.raises(BadReduction, match="4 slots"):
        task(mlp(), reduce=lambda _: torch.ones(2)).shares(batches, [1, 3])


def test_shared_storage_and_bad_losses_are_named() -> None:
    """Errors of the task itself, without a recorder."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model.get_parameter("0.weight").detach().view(3, 3))
    with pytest.raises(SharedStorage, match=r"'0.weight' and '1.weight'"):
        task(model).parameters()
    reduced = backtrail.Task(mlp(), rows(), lambda outputs, batch: cross_entropy(outputs, batch[1]))
    with pytest.raises(BadLoss, match=r"it returned \(\)"):
        reduced.losses(reduced.parameters(), {}, reduced.batch([0, 1]))


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("most", [0.1, 100.0])
def test_clipping_is_torchs(norm_type: float, most: float) -> None:
    """The same bits as torch's own functions."""
    grads = {name: torch.randn(size) for name, size in (("a", (3, 2)), ("b", (4,)), ("c", ()))}
    by_norm, by_value = (
        [nn.Parameter(torch.zeros_like(g)) for g in grads.values()] for _ in range(2)
    )
    for live in (by_norm, by_value):
        for parameter, grad in zip(live, grads.values(), strict=True):
            parameter.grad = grad.clone()
    nn.utils.clip_grad_norm_(by_norm, most, norm_type)
    nn.utils.clip_grad_value_(by_value, most)
    for clip, live in (
        (backtrail.ClipNorm(most, norm_type), by_norm),
        (backtrail.ClipValue(most), by_value),
    ):
        for found, parameter in zip(clip(grads).values(), live, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(found, parameter.grad, rtol=1e-6, atol=0)


def test_regression_averages_over_a_rows_outputs() -> None:
    """Squared error, whatever the shape of targets."""
    data = [(torch.randn(3), torch.randn(8)) for _ in range(5)]
    here = backtrail.regression(nn.Linear(3, 8), data)
    batch = here.batch(range(5))
    losses, _ = here.losses(here.parameters(), {}, batch)
    torch.testing.assert_close(losses.mean(), mse_loss(here.model(batch[0]), batch[1]).detach())


class Words(nn.Module):
    """A tiny language model."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.table = nn.Embedding(7, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token."""
        found: Tensor = self.table(tokens)
        return found


def test_language_models_average_over_a_rows_tokens() -> None:
    """Targets of -100 do not count, and a row of nothing else has loss zero."""
    targets = torch.tensor([[1, 2, -100], [3, -100, -100], [-100, -100, -100]])
    here = backtrail.language_model(Words(), [(torch.arange(3), row) for row in targets])
    losses, _ = here.losses(here.parameters(), {}, here.batch(range(3)))
    logits = here.model(torch.arange(3)).detach()
    expected = [
        cross_entropy(logits[:2], torch.tensor([1, 2])),
        cross_entropy(logits[:1], torch.tensor([3])),
    ]
    torch.testing.assert_close(losses, torch.stack([*expected, torch.zeros(())]))


LAYERS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.BatchNorm1d(4), (6, 4)),
    (lambda: nn.BatchNorm1d(4, momentum=None), (6, 4)),
    (lambda: nn.BatchNorm1d(4, affine=False), (6, 4, 5)),
    (lambda: nn.BatchNorm1d(4, track_running_stats=False), (6, 4)),
    (lambda: nn.BatchNorm2d(4, momentum=0.3, eps=0.1), (6, 4, 2, 3)),
    (lambda: nn.BatchNorm3d(4), (2, 4, 2, 3, 2)),
    (lambda: nn.InstanceNorm1d(4, track_running_stats=True), (6, 4, 5)),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_normalising_layers_do_as_torchs(
    make: Callable[[], nn.Module], shape: tuple[int, ...], *, training: bool
) -> None:
    """Outputs and running statistics, in train and eval mode, over several passes."""
    layer = make().train(training)
    here = backtrail.Task(
        layer,
        rows(),
        lambda outputs, _: outputs.flatten(1).square().sum(1),
        predict=lambda m, b: m(b),
    )
    here.binding.set_modes(() if training else None)
    buffers = copied(here.buffers())
    for _ in range(3):
        inputs = torch.randn(shape) + 1
        losses, buffers = here.losses(here.parameters(), buffers, inputs)
        torch.testing.assert_close(
            losses, layer(inputs).flatten(1).square().sum(1).detach(), rtol=1e-4, atol=1e-4
        )
    torch.testing.assert_close(buffers, dict(layer.named_buffers()))


def test_a_layer_called_twice_goes_on_from_its_own_statistics() -> None:
    """Two passes through one batch norm in one forward move its statistics twice."""
    layer = nn.BatchNorm1d(3)
    here = backtrail.Task(
        layer, rows(), lambda outputs, _: outputs.sum(1), predict=lambda m, b: m(m(b) + 1)
    )
    here.binding.set_modes(())
    inputs = torch.randn(5, 3)
    _, buffers = here.losses(here.parameters(), copied(here.buffers()), inputs)
    layer(layer(inputs) + 1)
    torch.testing.assert_close(buffers, dict(layer.named_buffers()))


def collated(items: list[Any]) -> Any:
    """Rows as keywords."""
    inputs, labels = default_collate(items)
    return {"inputs": inputs, "labels": labels}


class Labelled(nn.Module):
    """A model that computes its own loss of every row, as many do."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.body = mlp()

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """One loss per row."""
        return cross_entropy(self.body(inputs), labels, reduction="none")


def test_a_model_may_compute_its_own_losses(tmp_path: Path) -> None:
    """Keyword batches, and a loss that hands on what the model gave."""
    model = Labelled()
    here = backtrail.Task(model, rows(), lambda outputs, _: outputs, collate=collated)
    optimizer = adam(model)
    with backtrail.Recorder(tmp_path, here, optimizer) as recorder:
        for batch in recorder.watch(Loop.of(model, data=here.data).loader(collate_fn=collated)):
            model(**batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert backtrail.open_run(tmp_path, here).verify().difference < 1e-5


def test_double_precision_replays_to_the_last_digits(tmp_path: Path) -> None:
    """In float64 a replay differs by rounding alone."""
    data = [(inputs.double(), label) for inputs, label in zip(*rows().tensors, strict=True)]
    run = recorded_loop(Loop.of(stochastic_mlp().double(), data=data), tmp_path / "run")
    assert run.verify().difference < 1e-12
