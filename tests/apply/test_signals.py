"""Losses and outputs of samples against a plain model that evaluates one row at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backtrail.apply import signals as scores
from backtrail.errors import NoClasses
from backtrail.run.run import Run
from backtrail.task.classes import class_labels
from tests.cases import CASES_BY_NAME, CLASSES, rows
from tests.recorded_runs import recorded_regression, recorded_run
from tests.streams import SAMPLE_IDS, STREAM_ROWS, KeywordModel, recorded_stream

CHOSEN = ["sgd", "adamw", "batchnorm, sgd", "tied, adamw"]


def model_at(run: Run, number: int, made: nn.Module) -> nn.Module:
    """Return a model with a state's weights, in eval mode."""
    state = run.state(number, replay=True)
    made.load_state_dict(state.params | state.buffers, strict=False)
    return made.eval()


@torch.no_grad()
def said(model: nn.Module, data: object, place: int) -> tuple[Tensor, int]:
    """Return the logits of one row, and its label."""
    inputs, label = data[place]
    return model(inputs[None].double())[0], int(label)


@pytest.mark.parametrize("name", CHOSEN)
def test_losses_and_outputs_are_those_of_single_rows(name: str, tmp_path: Path) -> None:
    """Losses and outputs are those of single rows, at stored and replayed states."""
    run = recorded_run(name, tmp_path)
    data = rows()
    for number in (run.steps - 2, run.steps):
        model = model_at(run, number, CASES_BY_NAME[name].built())
        found = scores.outputs(run, number)
        losses = scores.losses(run, number)
        for place in range(run.samples):
            logits, label = said(model, data, place)
            np.testing.assert_allclose(found[place], logits, rtol=1e-12)
            assert losses[place] == pytest.approx(-float(logits.log_softmax(0)[label]), rel=1e-12)
    assert scores.labels(run).tolist() == data.tensors[1].tolist()


def test_el2n_and_margin_average_over_states(tmp_path: Path) -> None:
    """EL2N and margins are means over states, computed class by class."""
    run = recorded_run("sgd", tmp_path)
    data = rows()
    states = [2, 5]
    gaps = np.zeros(run.samples)
    margins = np.zeros(run.samples)
    for number in states:
        model = model_at(run, number, CASES_BY_NAME["sgd"].built())
        for place in range(run.samples):
            logits, label = said(model, data, place)
            chances = (logits.exp() / logits.exp().sum()).tolist()
            squares = [(p - (c == label)) ** 2 for c, p in enumerate(chances)]
            gaps[place] += sum(squares) ** 0.5 / 2
            margins[place] += (
                float(logits[label] - max(logits[c] for c in range(CLASSES) if c != label)) / 2
            )
    np.testing.assert_allclose(scores.el2n(run, states), gaps, rtol=1e-12)
    np.testing.assert_allclose(scores.margins(run, states), margins, rtol=1e-12)


def test_samples_with_ids_stand_in_their_order(tmp_path: Path) -> None:
    """Rows of a stream are evaluated from the stored batches, in the order of ids."""
    run = recorded_stream(tmp_path / "run")
    model = model_at(run, run.steps, KeywordModel())
    found = scores.outputs(run, run.steps)
    losses = scores.losses(run, run.steps)
    labels = scores.labels(run)
    for place, sample in enumerate(run.ids.tolist()):
        logits, label = said(model, STREAM_ROWS, SAMPLE_IDS.index(sample))
        np.testing.assert_allclose(found[place], logits, rtol=1e-12)
        assert losses[place] == pytest.approx(-float(logits.log_softmax(0)[label]), rel=1e-12)
        assert labels[place] == label


def test_a_task_without_classes_has_losses_only(tmp_path: Path) -> None:
    """A regression has losses, and its outputs and labels are refused."""
    run = recorded_regression(tmp_path / "run")
    assert scores.losses(run, run.steps).shape == (6,)
    for ask in (lambda: scores.outputs(run, run.steps), lambda: scores.labels(run)):
        with pytest.raises(
            NoClasses, match=r"labels are torch.float32 of shape \[\d, 1\], not class numbers"
        ):
            ask()


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_a_single_score_is_that_of_class_one(shape: tuple[int, ...]) -> None:
    """A single logit is that of class 1, as in a binary cross-entropy."""
    outputs = torch.tensor([0.5, -2.0]).view(shape)
    labels = torch.tensor([1.0, 0.0]).view(shape)
    found = scores.class_scores(outputs, [torch.zeros(2), labels])
    np.testing.assert_allclose(
        scores.probabilities(found.numpy())[:, 1], outputs.flatten().sigmoid(), rtol=1e-6
    )
    assert class_labels([torch.zeros(2), labels]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("outputs", "batch", "problem"),
    [
        (
            torch.zeros(2, 3, 4),
            [torch.zeros(2), torch.zeros(2, 3).long()],
            r"predict returns shape \[2, 3, 4\]",
        ),
        (
            {"hidden": torch.zeros(2, 3)},
            [torch.zeros(2), torch.zeros(2).long()],
            "without `logits`",
        ),
        (torch.zeros(2, 3), {"inputs": torch.zeros(2)}, "a dict without labels"),
        (
            torch.zeros(2, 3),
            [torch.zeros(2), torch.rand(2)],
            r"float32 of shape \[2\], not class numbers",
        ),
        (
            torch.zeros(2, 3),
            [torch.zeros(2), torch.tensor([-100, 1])],
            "labels go from -100 to 1, and there are 3 classes",
        ),
    ],
)
def test_what_is_no_classification_is_told(outputs: object, batch: object, problem: str) -> None:
    """The message says why outputs or labels are not those of a classification."""
    with pytest.raises(NoClasses, match=problem):
        scores.class_scores(outputs, batch)
