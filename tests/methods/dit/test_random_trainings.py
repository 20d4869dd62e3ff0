"""DIT on random small trainings, against differences of an independent loop."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

import backtrail
from tests.random_trainings import (
    BAR,
    LAYERS,
    LOSSES,
    MODULES,
    NUDGE,
    SURROGATES,
    Training,
    trainings,
)

# torch says so of losses that have no batching rule.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
SLOTS = [0, 4, 11, 17]  # of steps 0, 1, 3 and 5
DRAWS = 50
MANY = 500
# Layers that are differentiated in another way than torch would.
SPECIAL = sorted(SURROGATES) + sorted(
    name
    for name in MODULES
    if any(word in name for word in ("running", "queue", "norm", "embedding", "spectral"))
)
# Trainings that random draws have found wrong, or refused without a reason.
FOUND = [
    # Adam's second moment is zero where gradients of a step cancel each other.
    Training(("tanh",), "hinge embedding", "AdamW", accumulate=2, seed=406),
    Training(("adaptive pooling",), "absolute error", "AdamW", accumulate=2, seed=292),
    # The loss of a whole micro-batch is zero, and so is its gradient.
    Training(("gelu",), "triplet", "RMSprop", accumulate=2, seed=257),
    Training(("batch norm, average",), "kl divergence", "SGD", seed=827),
    Training(("no_grad",), "ctc", "RMSprop", "0 in the middle", seed=52),
]
random = settings(
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def check(training: Training) -> None:
    """Influence is that of the loop to 1e-6, or attribution is refused before any number."""
    try:
        truth = training.truth(SLOTS)
    except ValueError:
        return  # A distribution of torch's refuses the values of a training that has diverged.
    narrow = training.truth(SLOTS, nudge=NUDGE / 4)
    scale = np.abs(truth).max(axis=1)
    # Differences know nothing of a chaotic training, or across a kink.
    known = np.isfinite(truth).all() and (scale > 1e-7).all()
    if not known or (np.abs(truth - narrow).max(axis=1) > BAR / 4 * scale).any():
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = training.influence(SLOTS, Path(folder) / "run")
        except backtrail.BacktrailError:
            return
    error = np.abs(found - truth).max(axis=1) / scale
    assert error.max() <= BAR, training


@settings(random, max_examples=DRAWS)
@given(trainings())
def test_influence_is_that_of_the_loop(training: Training) -> None:
    """A few random trainings."""
    check(training)


@pytest.mark.slow
@settings(random, max_examples=MANY, derandomize=False)
@given(trainings())
def test_influence_is_that_of_the_loop_in_many_draws(training: Training) -> None:
    """Many random trainings, others at every run."""
    check(training)


@pytest.mark.parametrize("training", FOUND, ids=str)
def test_trainings_that_were_wrong(training: Training, tmp_path: Path) -> None:
    """They are right now."""
    # Adam's update bends at zero, which differences feel in proportion to their size.
    truth = 2 * training.truth(SLOTS, nudge=NUDGE / 8) - training.truth(SLOTS, nudge=NUDGE / 4)
    found = training.influence(SLOTS, tmp_path / "run")
    error = np.abs(found - truth).max(axis=1) / np.abs(truth).max(axis=1)
    assert error.max() <= BAR


@pytest.mark.parametrize("layer", SPECIAL)
def test_layers_with_two_derivatives(layer: str, tmp_path: Path) -> None:
    """Surrogate gradients, moving buffers and the like are exact, not refused."""
    training = Training((layer,), "cross-entropy")
    truth = training.truth(SLOTS)
    found = training.influence(SLOTS, tmp_path / "run")
    error = np.abs(found - truth).max(axis=1) / np.abs(truth).max(axis=1)
    assert error.max() <= BAR


@pytest.mark.slow
@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_every_layer(layer: str) -> None:
    """Each layer of the list alone."""
    check(Training((layer,), "cross-entropy"))


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_loss(loss: str) -> None:
    """Each loss of the list behind one smooth layer."""
    check(Training(("tanh",), loss))
