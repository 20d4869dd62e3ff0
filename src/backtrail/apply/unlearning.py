"""Unlearning: the trained model without the influence of some samples, as a state_dict.

It comes without any guarantee of law or privacy. How close the result is to a training without the
samples depends on the training; :func:`judge_forgetting` measures it.
"""

import logging
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from backtrail import arguments
from backtrail.curvature.policies import Curvature
from backtrail.errors import BadSetting, UnusedOption
from backtrail.exclusive import exclusive
from backtrail.methods.diff_in.checkpoints import Checkpoints
from backtrail.methods.diff_in.diff_in import DiffIn
from backtrail.methods.diff_in.trajectory import Point
from backtrail.methods.dit.dit import DIT
from backtrail.methods.observe import check_run
from backtrail.methods.retrain.removal import RemovedGroup, changed_state
from backtrail.run.run import Precision, Run
from backtrail.step.state import State
from backtrail.sweep.rules import Rules
from backtrail.task import torch_compile
from backtrail.task.task import Task
from backtrail.tree import add

log = logging.getLogger(__name__)


FIRST_ORDER = DIT()  # the default method
PROBES = 16  # number of steps at which the first-order prediction is compared with a real step
BENT = 0.3  # relative error of the first-order prediction above which the log warns


@exclusive
def forget(
    run: Run | Checkpoints,
    samples: Sequence[int],
    *,
    method: DIT | DiffIn | None = FIRST_ORDER,
    replay: int = 0,
    dtype: Precision = None,
) -> dict[str, Tensor]:
    r"""Compute the state_dict of the trained model without the influence of some samples.

    First comes the first-order effect of removing all the samples together, on the state
    :math:`s = T - k`; then the last k steps run again without them:

    .. math:: \theta_s
        - \sum_{t < s,\, b \in \mathrm{group}} \frac{\partial \theta_s}{\partial w_{t,b}}
        \;\longrightarrow\; \theta_T

    With k = 0 that is the first-order effect alone; with k = T it is the training without the
    samples. BatchNorm's running statistics and the optimizer's moments are part of the state.
    Nothing is written, and nothing is guaranteed for law or privacy;
    :func:`backtrail.judge_forgetting` measures how close the result is to a training without the
    samples.

    The sweep takes about three times as long as a replay of the training up to s, whatever the
    number of samples. So `method=None, replay=run.steps` is both cheaper and exact: train again
    where you can, and use the first order to study a training. Estimates by `DiffIn` take a few
    gradients, and the replay of k steps alone takes k steps.

    At 16 steps of the sweep, the actual step without the samples is computed too. Where these
    differ from the first-order prediction by more than 30 % of what they change (all together), the
    log warns.

    Args:
        run: The recorded training; or, with a `DiffIn`, checkpoints of a training that was not
            recorded.
        samples: The samples to forget; all must have been trained on.
        method: What comes before the replay. `DIT()`: the exact derivative of the training, with
            its `curvature`, `slope` and `denominator`. `DiffIn(form="corrected")`: an estimate from
            a few states, without replay. None: nothing; the replay starts at the recorded state.
        replay: k, the number of last steps that run again without the samples.
        dtype: Precision of sweep and replay; by default the recorded one.

    Returns:
        Parameters and buffers, for `model.load_state_dict`.

    Raises:
        BadSetting: `replay` out of range, or a method that is not possible with checkpoints.
        UnusedOption: `replay` or `dtype` with a `DiffIn`, which does not use them.
        UnknownSample: A sample that the training set does not have.
        UnknownId: A sample that the training did not see, where samples have ids of their own.
        NeverTrainedOn: A sample that was in no batch.
    """
    if not isinstance(run, Checkpoints):
        check_run(run)
    replay = arguments.whole("replay", replay, least=0)
    dtype = arguments.precision("dtype", dtype)
    if isinstance(method, DiffIn):
        # It estimates the final parameters alone: there is no state to replay from, and no sweep.
        if replay:
            raise UnusedOption("replay", replay, call="forget(method=DiffIn)", takes=())
        if dtype is not None:
            raise UnusedOption("dtype", dtype, call="forget(method=DiffIn)", takes=())
        return _by_diff_in(run, samples, method)
    if method is not None and not isinstance(method, DIT):
        raise BadSetting(
            "method", method, "backtrail.DIT(), backtrail.DiffIn(form='corrected') or None"
        )
    if isinstance(run, Checkpoints):
        raise BadSetting(
            "method",
            method,
            "backtrail.DiffIn(form='corrected'), since checkpoints hold no steps to run",
        )
    if replay > run.steps:
        raise BadSetting("replay", replay, f"0 <= replay <= {run.steps} (number of steps)")
    run.check_steps()
    start = run.steps - replay
    renormalize = method is not None and method.denominator == "renormalize"
    group = RemovedGroup.of(run, samples, renormalize=renormalize, dtype=dtype)
    if method is None:
        state = run.state(start, replay=True, dtype=dtype)
    else:
        state, error = first_order(group, start, method)
        if not error <= BENT:  # also where it is NaN, since the sweep overflowed
            _warn(group, error)
    if replay:
        state = group.replayed(start, state)
    return state_dict(run.task, state)


@exclusive
def first_order(group: RemovedGroup, stop: int, method: DIT) -> tuple[State, float]:
    """The state `stop` after its first-order change, and the relative error of that prediction.

    Raises:
        BadSetting: the curvature is to be chosen automatically, which takes queries; there are
            none.
    """
    if not isinstance(method.curvature, Curvature):
        raise BadSetting(
            "curvature", method.curvature, "one curvature, for example backtrail.GaussNewton()"
        )
    probed = set(np.linspace(group.first, stop - 1, PROBES).round().astype(int).tolist())
    total_error = 0.0
    total_change = 0.0
    before = None
    for number, now in group.sweep(stop, Rules(method.curvature, method.slope)):
        step = number - 1  # the step that leads to this state
        if before is not None and step in probed:
            error, change = group.linearity_gap(step, before, now)
            total_error += error
            total_change += change
        before = now
    assert before is not None
    # Without any change, as for a sample that was never visited, the prediction is exact.
    relative_error = total_error / total_change if total_change else 0.0
    return changed_state(before), relative_error


def _warn(group: RemovedGroup, relative_error: float) -> None:
    log.warning(
        "forgetting %d samples to first order: steps without them differ from their first-order "
        "prediction by %.0f %% of what they change, so the parameters may be far from those of "
        "retraining. Retrain instead: replay=%d",
        len(group.removal.samples),
        100 * relative_error,
        group.run.steps,
    )


def _by_diff_in(
    run: Run | Checkpoints, samples: Sequence[int], method: DiffIn
) -> dict[str, Tensor]:
    end: Point | State
    if isinstance(run, Checkpoints):
        end = run.trajectory(method.checkpoints).end
    else:
        end = run.state(run.steps)
    change = method.parameter_change(run, samples)
    # Only parameters are estimated: BatchNorm's statistics stay as they were.
    state = State(add(end.params, change), end.buffers)
    return state_dict(run.task, state)


def state_dict(task: Task, state: State) -> dict[str, Tensor]:
    """A state for `model.load_state_dict`: the model's precision, all names of tied parameters."""
    named: dict[str, Tensor] = {}
    named.update(torch_compile.parameters(task.model))
    named.update(torch_compile.buffers(task.model))
    # A tied parameter is one tensor under several keys of the state_dict: hence by identity.
    name_of = {id(tensor): name for name, tensor in named.items()}
    tensors = state.params | state.buffers
    found = {}
    for key, like in task.model.state_dict(keep_vars=True).items():
        if id(like) in name_of:
            tensor = tensors[name_of[id(like)]]
            found[key] = tensor.to(like.dtype).clone()
    return found
