"""Windows, visits, resuming and chunks of queries of one sweep."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import backtrail
from backtrail.errors import (
    CannotRenormalize,
    DifferentInfluence,
    NoSuchState,
    NotObserved,
    TooLittleMemory,
)
from backtrail.influence.influence import Influence
from backtrail.methods.memory import Budget, Sizes, fit
from backtrail.run.run import Run
from tests.cases import CASES, Case
from tests.interruption import Interrupted
from tests.oracles.sums import sum_by_sample
from tests.recorded_runs import recorded_run
from tests.standard_queries import standard_queries


@pytest.mark.parametrize("name", ["momentum", "adamw", "batchnorm, sgd", "short batches"])
def test_windows_and_visits_are_derivatives_of_their_own_retrainings(
    name: str, tmp_path: Path
) -> None:
    """They equal differences of re-runs with a sample's weight lowered, always or at some steps."""
    run = recorded_run(name, tmp_path)
    a = 1
    b = run.steps
    influence = backtrail.DIT().attribute(run, standard_queries(), observed_at=[a, b])
    tiny = 1e-4
    for sample in (0, 4):
        everywhere = change(run, sample, tiny, (0, run.steps), (a, b))
        late = change(run, sample, tiny, (a, b), (b,))
        assert_close(influence.window(a, b)[:, sample], everywhere[:, 1] - everywhere[:, 0])
        assert_close(influence.visits(a, b)[:, sample], late[:, 0])


def change(
    run: Run, sample: int, size: float, steps: tuple[int, int], states: tuple[int, ...]
) -> np.ndarray:
    """Return the derivative of the queries by a sample's weight in some steps, `[query, state]`."""
    from backtrail.methods.retrain.retrain import perturb  # noqa: PLC0415
    from backtrail.methods.retrain.weights import Perturbation  # noqa: PLC0415

    direction = torch.zeros(run.steps, max(len(step.samples) for step in run.log))
    for step in run.log[steps[0] : steps[1]]:
        for place, row in enumerate(step.samples):
            direction[step.index, place] = -float(row == sample)
    nudges = [Perturbation(direction=direction, size=sign * size) for sign in (1.0, -1.0)]
    found = perturb(run, standard_queries(), nudges, observed_at=states).change
    return (found[:, :, 0] - found[:, :, 1]) / (2 * size)


def assert_close(found: np.ndarray, truth: np.ndarray) -> None:
    """Assert that two arrays agree to the accuracy of a central difference."""
    np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-7 * np.abs(truth).max())


def test_the_two_readings_are_different_questions(tmp_path: Path) -> None:
    """The change between two states differs from the effect of the steps between them."""
    run = recorded_run("momentum", tmp_path)
    influence = backtrail.DIT().attribute(run, standard_queries(), observed_at=[2, run.steps])
    assert not np.allclose(influence.window(2, run.steps), influence.visits(2, run.steps))


def test_sums_over_visits_and_windows_are_the_whole(tmp_path: Path) -> None:
    """All visits, and all windows, add up to the total; a sample never seen has exactly zero."""
    run = recorded_run("twice in a batch", tmp_path)
    influence = backtrail.DIT().attribute(run, standard_queries(), observed_at=[1, 2, 3])
    total = influence.total()
    np.testing.assert_allclose(
        total[:, -1], sum_by_sample(influence.values()[:, -1], run), rtol=1e-14
    )
    windows = sum(influence.window(a, b) for a, b in ((0, 1), (1, 2), (2, 3)))
    np.testing.assert_allclose(windows, total[:, -1], rtol=1e-12)
    np.testing.assert_allclose(influence.visits(0, 3), total[:, -1], rtol=1e-12)
    unseen = [s for s in range(run.samples) if not any(s in step.samples for step in run.log)]
    assert unseen
    assert (total[:, :, unseen] == 0).all()
    assert (influence.values()[:, 0, 1:] == 0).all()  # state 1 cannot feel the steps from 1 on


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_cutting_queries_changes_only_rounding(chunk: int, tmp_path: Path) -> None:
    """The result does not depend on how many queries share a sweep, up to 1e-12."""
    run = recorded_run("adamw", tmp_path)
    whole = (
        backtrail.DIT(chunk=100).attribute(run, standard_queries(), observed_at="epochs").values()
    )
    parts = (
        backtrail.DIT(chunk=chunk).attribute(run, standard_queries(), observed_at="epochs").values()
    )
    np.testing.assert_allclose(parts, whole, rtol=1e-12, atol=1e-15)


def test_the_same_question_gives_the_same_bits(tmp_path: Path) -> None:
    """Two attributions in memory and one on disk are equal bit for bit."""
    run = recorded_run("clip norm, adamw", tmp_path)
    first, second = (backtrail.DIT().attribute(run, standard_queries()).values() for _ in range(2))
    on_disk = backtrail.DIT().attribute(run, standard_queries(), out=tmp_path / "dit").values()
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, on_disk)


def test_an_interrupted_attribution_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before any step and resumed, an attribution has the same bits."""
    monkeypatch.setattr("backtrail.methods.result.SHORTEST", 1)
    run = recorded_run("adamw", tmp_path)
    whole = (
        backtrail.DIT()
        .attribute(run, standard_queries(), observed_at=[3, 5], out=tmp_path / "whole")
        .values()
    )
    real = Run.transition
    for stop in range(run.steps):
        out = tmp_path / f"part{stop}"

        def failing(
            self: Run, index: int, dtype: torch.dtype | None = None, stop: int = stop
        ) -> object:
            if index == stop:
                raise Interrupted
            return real(self, index, dtype)

        monkeypatch.setattr(Run, "transition", failing)
        with pytest.raises(Interrupted):
            backtrail.DIT().attribute(run, standard_queries(), observed_at=[3, 5], out=out)
        monkeypatch.setattr(Run, "transition", real)
        resumed = backtrail.DIT().attribute(run, standard_queries(), observed_at=[3, 5], out=out)
        np.testing.assert_array_equal(resumed.values(), whole)
        assert not (out / "cotangents").exists()


def test_a_finished_attribution_is_read_and_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished attribution is opened from its folder."""
    run = recorded_run("adamw", tmp_path)
    first = backtrail.DIT().attribute(run, standard_queries(), out=tmp_path / "dit").values()
    monkeypatch.setattr(
        "backtrail.methods.dit.attribution.Attribution.fill",
        lambda *_: pytest.fail("computed again"),
    )
    again = backtrail.DIT().attribute(run, standard_queries(), out=tmp_path / "dit")
    np.testing.assert_array_equal(again.values(), first)
    np.testing.assert_array_equal(backtrail.open_influence(tmp_path / "dit").values(), first)


def test_another_question_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    """A folder that holds an attribution with other settings is refused; the message names them."""
    run = recorded_run("adamw", tmp_path)
    backtrail.DIT().attribute(run, standard_queries(), out=tmp_path / "dit")
    with pytest.raises(DifferentInfluence, match="denominator"):
        backtrail.DIT(denominator="renormalize").attribute(
            run, standard_queries(), out=tmp_path / "dit"
        )


def test_losses_of_the_visits_come_with_the_sweep(tmp_path: Path) -> None:
    """The loss of every slot is that of the training before the step."""
    run = recorded_run("sgd", tmp_path)
    influence = backtrail.DIT().attribute(run, standard_queries())
    for step in run.log:
        state = run.state(step.index, replay=True)
        losses = run.transition(step.index).raw_gradient(state)[2]
        np.testing.assert_allclose(
            influence.loss[step.index, : len(losses)], losses.numpy(), rtol=1e-12
        )


def test_states_that_are_not_there_are_refused(tmp_path: Path) -> None:
    """States that the run does not have, or that were not observed, are refused."""
    run = recorded_run("sgd", tmp_path)
    with pytest.raises(NoSuchState, match="state 6: the run has states 0 to 5"):
        backtrail.DIT().attribute(run, standard_queries(), observed_at=[2, 6])
    influence = backtrail.DIT().attribute(run, standard_queries(), observed_at=[2, 5])
    with pytest.raises(NotObserved, match="State 3"):
        influence.window(2, 3)


def influences(run: Run) -> tuple[Influence, Influence]:
    """Return the influence with the denominator kept, and with it renormalised."""
    kept = backtrail.DIT().attribute(run, standard_queries())
    return kept, backtrail.DIT(denominator="renormalize").attribute(run, standard_queries())


def test_a_renormalised_removal_is_what_reweighting_a_batch_does(tmp_path: Path) -> None:
    """At the last step of SGD it is the query's gradient times the change of the update."""
    run = recorded_run("sgd", tmp_path)
    _, found = influences(run)
    last = run.steps - 1
    lr = run.step(run.steps - 1).settings[0]["lr"]
    state = run.state(last, replay=True)
    end = run.state(run.steps)
    transition = run.transition(last)
    weights = torch.ones(3, dtype=torch.float64)
    without = torch.tensor([0.0, 1.5, 1.5], dtype=torch.float64)
    grads = [next(transition.micro_batch_gradients(state, w))[1][0] for w in (weights, without)]
    from backtrail.queries import gradients  # noqa: PLC0415

    _, query, _ = gradients(
        standard_queries(), run.task, params=end.params, buffers=end.buffers, trained=run.trained
    )
    assert isinstance(lr, float)
    truth = sum(-lr * (query[n] * (grads[1][n] - grads[0][n])).flatten(1).sum(1) for n in query)
    np.testing.assert_allclose(found.values()[:, 0, last, 0], np.asarray(truth), rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("twice in a batch", "a sample twice"),
        ("short batches", "a single sample"),
        ("batchnorm, sgd", "rest of its batch"),
    ],
)
def test_renormalising_is_refused_where_it_means_nothing(
    name: str, why: str, tmp_path: Path
) -> None:
    """The message says why the denominator cannot be renormalised, for each of three reasons."""
    with pytest.raises(CannotRenormalize, match=why):
        backtrail.DIT(denominator="renormalize").attribute(
            recorded_run(name, tmp_path), standard_queries()
        )


def test_a_sweep_that_cannot_fit_says_how_much_it_needs() -> None:
    """A sweep that does not fit into memory is refused before it begins."""
    with pytest.raises(TooLittleMemory, match="Use fewer queries"):
        fit(Sizes(100, 300, 100, 300, 1000), rows=8, free=2000, chunk=None, steps=50)


@pytest.mark.parametrize("held", [1, 2, 50])
def test_holding_fewer_states_changes_nothing(
    held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States that are recomputed in the sweep have the same bits as those that are held."""
    run = recorded_run("amsgrad", tmp_path)
    whole = backtrail.DIT().attribute(run, standard_queries()).values()
    budget: Callable[..., object] = lambda *_, **__: Budget(held, 3)  # noqa: E731
    monkeypatch.setattr("backtrail.methods.dit.dit.budget", budget)
    np.testing.assert_array_equal(
        backtrail.DIT(chunk=3).attribute(run, standard_queries()).values(), whole
    )


def test_the_case_table_has_what_the_method_promises() -> None:
    """The cases that cover documented properties are in the table."""
    names = {case.name for case in CASES}
    assert {
        "tied, adamw",
        "frozen",
        "unused",
        "two groups",
        "one cycle",
        "twice in a batch",
    } <= names
    assert isinstance(CASES[0], Case)
