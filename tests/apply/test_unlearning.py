"""Unlearning: a full replay is retraining, the first order is the derivative; its evaluation."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.apply import unlearning as forgetting
from backtrail.errors import (
    BadCheckpoint,
    BadSetting,
    NeverTrainedOn,
    UnknownId,
    UnknownSample,
    UnusedOption,
)
from backtrail.methods.retrain.removal import RemovedGroup, changed_state
from backtrail.run.run import Run
from backtrail.stats import auc
from backtrail.sweep.rules import Rules
from tests.cases import CASES_BY_NAME, CLASSES, FEATURES, clip, loader, rows
from tests.oracles.group import change_by_removal, floats, trained_with
from tests.recorded_runs import recorded_run
from tests.standard_queries import HELD_OUT
from tests.streams import recorded_stream

GROUP = [0, 4]
CHOSEN = [
    "momentum",
    "adamw",
    "tied, adamw",
    "frozen",
    "accumulation, batchnorm",
    "clip norm",
    "batchnorm, skipped",
]


def loaded(run: Run, state: dict[str, Tensor]) -> nn.Module:
    """Return the task's model with a state_dict, loaded strictly."""
    run.task.model.load_state_dict(state)
    return run.task.model


@pytest.mark.parametrize("name", CHOSEN)
def test_replaying_all_steps_is_retraining(name: str, tmp_path: Path) -> None:
    """Every entry of the state_dict is that of plain training with weight 0 for the group."""
    run = recorded_run(name, tmp_path)
    case = CASES_BY_NAME[name]
    found = floats(loaded(run, backtrail.forget(run, GROUP, replay=run.steps)))
    torch.testing.assert_close(
        found, floats(trained_with(case, GROUP, 0.0)), rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("name", CHOSEN)
def test_first_order_is_the_derivative_times_one(name: str, tmp_path: Path) -> None:
    """The change is the derivative by the group's weight, but for variances kept positive."""
    run = recorded_run(name, tmp_path)
    case = CASES_BY_NAME[name]
    trained = floats(trained_with(case, GROUP, 1.0))
    change = change_by_removal(case, GROUP)
    found = floats(loaded(run, backtrail.forget(run, GROUP)))
    shrinks = [
        "running_var" in key
        for key, t in run.task.model.state_dict().items()
        for _ in range(t.numel())
    ]
    free = ~(
        torch.tensor([s for s, t in zip(shrinks, kinds(run), strict=True) if t]) & (change < 0)
    )
    torch.testing.assert_close(
        found[free], (trained + change)[free], rtol=1e-6, atol=1e-6 * float(change.abs().max())
    )


def kinds(run: Run) -> Iterator[bool]:
    """Yield for every entry of the state_dict whether it is a floating-point number."""
    for tensor in run.task.model.state_dict().values():
        yield from [tensor.is_floating_point()] * tensor.numel()


@pytest.mark.parametrize("name", ["momentum", "adamw", "batchnorm, sgd"])
def test_replay_alone_leaves_early_visits_as_they_were(name: str, tmp_path: Path) -> None:
    """Without a method only the last steps are trained again without the group."""
    run = recorded_run(name, tmp_path)
    case = CASES_BY_NAME[name]
    found = floats(loaded(run, backtrail.forget(run, GROUP, method=None, replay=3)))
    expected = floats(trained_with(case, GROUP, 0.0, first=run.steps - 3))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["momentum", "adamw", "batchnorm, sgd", "clip norm"])
def test_a_replay_goes_on_from_the_corrected_state(name: str, tmp_path: Path) -> None:
    """The last steps start from corrected parameters, moments and statistics."""
    run = recorded_run(name, tmp_path)
    case = CASES_BY_NAME[name]
    group = RemovedGroup.of(run, GROUP)
    start = run.steps - 2
    *_, (_, now) = group.sweep(start, Rules(backtrail.Hessian(), backtrail.Tangent()))
    begun = changed_state(now)
    model = case.built()
    model.load_state_dict(begun.params | begun.buffers)
    model.train()
    optimizer = case.optimizer(model)
    for key, parameter in model.named_parameters():
        optimizer.state[parameter] = {k: m.clone() for k, m in begun.moments[key].items()}
    for step, (inputs, labels) in list(enumerate(loader(case, rows())))[start:]:
        weights = torch.tensor([0.0 if row in GROUP else 1.0 for row in case.groups[step][0]])
        (cross_entropy(model(inputs), labels, reduction="none") * weights).mean().backward()
        clip(case, model)
        optimizer.step()
        optimizer.zero_grad()
    found = loaded(run, backtrail.forget(run, GROUP, replay=2))
    torch.testing.assert_close(floats(found), floats(model), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("method", [backtrail.DIT(), backtrail.DiffIn(), None])
def test_a_sample_never_seen_is_refused(
    method: backtrail.DIT | backtrail.DiffIn | None, tmp_path: Path
) -> None:
    """A sample that is in no batch cannot be forgotten, by any method, nor is that judged."""
    run = recorded_run("twice in a batch", tmp_path)
    with pytest.raises(NeverTrainedOn, match="Sample 8 was never trained on"):
        backtrail.forget(run, [8], method=method)
    with pytest.raises(NeverTrainedOn, match="Sample 8 was never trained on"):
        backtrail.judge_forgetting(run, [8], run.state(run.steps).params, test=HELD_OUT)


def test_nothing_is_written_and_nothing_is_changed(tmp_path: Path) -> None:
    """Neither the run's folder nor the task's model is changed."""
    run = recorded_run("batchnorm, adamw", tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    before = floats(run.task.model).clone()
    state = backtrail.forget(run, GROUP, replay=1)
    state["0.weight"].zero_()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files
    assert torch.equal(floats(run.task.model), before)


def test_a_renormalised_batch_shares_the_weight(tmp_path: Path) -> None:
    """With a renormalised denominator it is the re-run with the same denominator."""
    run = recorded_run("momentum", tmp_path)
    method = backtrail.DIT(denominator="renormalize")
    loss = backtrail.Loss(HELD_OUT, aggregate="mean")
    expected = backtrail.retrain(run, loss, [[4]], denominator="renormalize")
    again = loaded(run, backtrail.forget(run, [4], method=method, replay=run.steps))(
        HELD_OUT.tensors[0]
    )
    found = float(cross_entropy(again.detach(), HELD_OUT.tensors[1])) - float(expected.base[0, 0])
    assert found == pytest.approx(float(expected.change[0, 0, 0]), rel=1e-9)
    kept, shared = (
        backtrail.forget(run, [4], method=method) for method in (backtrail.DIT(), method)
    )
    assert not torch.allclose(kept["0.weight"], shared["0.weight"])


def test_a_few_states_give_an_estimate(tmp_path: Path) -> None:
    """With Diff-In it adds the method's change, to a run or to checkpoints."""
    run = recorded_run("momentum", tmp_path)
    method = backtrail.DiffIn(checkpoints=2, form="corrected")
    change = method.parameter_change(run, GROUP)
    end = run.state(run.steps).params
    found = backtrail.forget(run, GROUP, method=method)
    assert all(torch.equal(found[name], tensor + change[name]) for name, tensor in end.items())
    given = [(state, dict(run.state(state).params), 0.3) for state in (2, 4)]
    few = backtrail.Checkpoints(run.task, given, steps=run.steps)
    found = backtrail.forget(few, GROUP, method=method)
    change = method.parameter_change(few, GROUP)
    assert all(
        torch.equal(found[name], tensor + change[name]) for name, tensor in given[-1][1].items()
    )
    with pytest.raises(BadSetting, match="checkpoints hold no steps"):
        backtrail.forget(few, GROUP)


def test_samples_with_ids_are_forgotten_by_their_ids(tmp_path: Path) -> None:
    """Samples with ids are removed by id, and membership is not evaluated."""
    run = recorded_stream(tmp_path / "run")
    gone = [int(run.ids[0]), int(run.ids[-1])]
    state = backtrail.forget(run, gone, replay=run.steps)
    judged = backtrail.judge_forgetting(
        run, gone, state, test=[{"inputs": torch.ones(3).double(), "labels": 1}] * 2
    )
    assert judged.parameters < 1e-9
    assert judged.membership is None
    assert "membership" not in str(judged)
    with pytest.raises(UnknownId):
        backtrail.forget(run, [1])


def test_the_log_warns_where_steps_bend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A change beyond the limit logs a warning with the remedy."""
    run = recorded_run("adamw", tmp_path)
    monkeypatch.setattr(forgetting, "BENT", 1e9)
    backtrail.forget(run, GROUP)
    assert not caplog.text
    monkeypatch.setattr(forgetting, "BENT", 0.0)
    backtrail.forget(run, GROUP)
    assert "far from those of retraining. Retrain instead: replay=5" in caplog.text


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    """Unknown samples, invalid replays and methods are refused, with what is expected."""
    run = recorded_run("sgd", tmp_path)
    with pytest.raises(UnknownSample, match="no sample 9"):
        backtrail.forget(run, [2, 9])
    with pytest.raises(BadSetting, match="0 <= replay <= 5"):
        backtrail.forget(run, [2], replay=6)
    with pytest.raises(UnusedOption, match=r"replay=1: .*DiffIn"):
        backtrail.forget(run, [2], replay=1, method=backtrail.DiffIn())
    with pytest.raises(BadSetting, match="GaussNewton"):
        backtrail.forget(run, [2], method=backtrail.DIT(curvature="auto"))
    with pytest.raises(BadSetting, match="one or more rows"):
        backtrail.judge_forgetting(run, [2], {}, test=[])
    with pytest.raises(BadCheckpoint, match="has no parameter"):
        backtrail.judge_forgetting(run, [2], {}, test=HELD_OUT)


def test_the_judgement_is_what_one_would_compute(tmp_path: Path) -> None:
    """Distance, divergence, agreement and membership are those computed from three models."""
    run = recorded_run("batchnorm, sgd", tmp_path)
    case = CASES_BY_NAME["batchnorm, sgd"]
    state = backtrail.forget(run, GROUP)
    judged = backtrail.judge_forgetting(run, GROUP, state, test=HELD_OUT)
    models = [trained_with(case, GROUP, 1.0), case.built(), trained_with(case, GROUP, 0.0)]
    models[1].load_state_dict(state)
    flat = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models]
    assert judged.parameters == pytest.approx(
        float((flat[1] - flat[2]).norm() / (flat[0] - flat[2]).norm())
    )
    inputs, labels = (
        torch.cat([a[GROUP], b]) for a, b in zip(rows().tensors, HELD_OUT.tensors, strict=True)
    )
    with torch.no_grad():
        scores = [model.eval()(inputs) for model in models]
    chances = [some[2:].softmax(-1) for some in scores]
    kl = [float((chances[2] * (chances[2] / some).log()).sum(-1).mean()) for some in chances[:2]]
    assert judged.divergence == pytest.approx(kl)
    assert judged.predictions == pytest.approx(kl[1] / kl[0])
    same = [
        float((some.argmax(-1) == chances[2].argmax(-1)).double().mean()) for some in chances[:2]
    ]
    assert judged.agreement == pytest.approx(same)
    guilty = np.arange(len(inputs)) < 2
    areas = [auc(-cross_entropy(some, labels, reduction="none").numpy(), guilty) for some in scores]
    assert judged.membership == pytest.approx(areas)
    assert "same class on" in str(judged)


def test_retraining_is_perfect_and_doing_nothing_is_one(tmp_path: Path) -> None:
    """Retraining has distance 0, the trained model distance 1."""
    run = recorded_run("adamw", tmp_path)
    end = run.state(run.steps).params
    perfect = backtrail.judge_forgetting(
        run, GROUP, backtrail.forget(run, GROUP, replay=run.steps), test=HELD_OUT
    )
    nothing = backtrail.judge_forgetting(run, GROUP, end, test=HELD_OUT)
    assert perfect.parameters < 1e-10
    assert perfect.predictions < 1e-10
    assert perfect.agreement is not None
    assert perfect.agreement[1] == 1.0
    assert (nothing.parameters, nothing.predictions) == (1.0, 1.0)


def test_outputs_that_are_no_classes_are_compared_by_squares(tmp_path: Path) -> None:
    """A regression is compared by squared differences, and has no agreement."""
    torch.manual_seed(0)
    model = nn.Linear(FEATURES, CLASSES).double()
    data = rows()
    targets = torch.utils.data.TensorDataset(
        data.tensors[0], torch.randn(len(data), CLASSES, dtype=torch.float64)
    )
    task = backtrail.regression(model, targets)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with backtrail.Recorder(tmp_path / "run", task, optimizer) as recorder:
        for inputs, wanted in recorder.watch(torch.utils.data.DataLoader(targets, 3)):
            task.loss(model(inputs), (inputs, wanted)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    run = backtrail.open_run(tmp_path / "run", task)
    state = backtrail.forget(run, GROUP)
    judged = backtrail.judge_forgetting(run, GROUP, state, test=targets)
    with torch.no_grad():
        models = run.state(run.steps).params, state, backtrail.forget(run, GROUP, replay=run.steps)
        outputs = [torch.func.functional_call(model, some, targets.tensors[0]) for some in models]
    expected = [float((some - outputs[2]).square().mean()) for some in outputs[:2]]
    assert judged.divergence == pytest.approx(expected)
    assert judged.agreement is None
    assert "same class" not in str(judged)


def test_a_teacher_in_float32_is_judged_in_float32(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where float64 fails, the comparison is in the training's precision, and that is logged."""
    torch.manual_seed(0)
    teacher = nn.Linear(6, 2).requires_grad_(requires_grad=False)
    data = TensorDataset(torch.randn(24, 6), torch.randint(0, 2, (24,)))

    def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        distance = (outputs - teacher(batch[0])).square().sum(1)
        return cross_entropy(outputs, batch[1], reduction="none") + distance

    model = nn.Linear(6, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    task = backtrail.Task(model, data, loss=loss)
    with backtrail.Recorder(tmp_path / "run", task, optimizer) as recorder:
        for batch in recorder.watch(DataLoader(data, batch_size=8)):
            loss(model(batch[0]), batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    run = backtrail.open_run(tmp_path / "run", task)
    state = backtrail.forget(run, [2], replay=run.steps)
    judged = backtrail.judge_forgetting(run, [2], state, test=TensorDataset(*data[:4]))
    assert judged.parameters < 1e-3
    assert "is in torch.float32" in caplog.text


def test_rows_that_make_no_batch_are_named(tmp_path: Path) -> None:
    """What collate says is passed on."""
    run = recorded_run("adamw", tmp_path)
    state = backtrail.forget(run, [2])
    with pytest.raises(BadSetting, match=r"Invalid test=.*collate.*Overflow"):
        backtrail.judge_forgetting(run, [2], state, test=[10**30])
