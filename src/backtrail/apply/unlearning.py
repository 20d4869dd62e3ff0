"""Unlearning: the trained model without the influence of some samples, as a state_dict.

No guarantee of law or privacy comes with it: what is returned is close to the training without the
samples, or not, and :func:`judge_forgetting` tells how close.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from backtrail.curvature.policies import Curvature
from backtrail.errors import BadSetting, UnusedOption
from backtrail.exclusive import exclusive
from backtrail.methods.diff_in.checkpoints import Checkpoints
from backtrail.methods.diff_in.diff_in import DiffIn
from backtrail.methods.dit.dit import DIT
from backtrail.methods.retrain.removal import RemovedGroup, changed_state
from backtrail.run.run import Precision, Run
from backtrail.step.state import State
from backtrail.sweep.rules import Rules
from backtrail.task import torch_compile
from backtrail.task.task import Task
from backtrail.tree import add

log = logging.getLogger(__name__)


FIRST_ORDER = DIT()  # what a removal is estimated by, unless told otherwise
PROBES = 16  # steps at which the first order is compared with a real step
BENT = 0.3  # from which share on the first order is not to be relied on


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
        samples: The samples to forget; one that was never visited changes nothing.
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
    """
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
    if not 0 <= replay <= run.steps:
        raise BadSetting("replay", replay, f"0 <= replay <= {run.steps} (number of steps)")
    run.check_steps()
    start, renormalize = (
        run.steps - replay,
        method is not None and method.denominator == "renormalize",
    )
    group = RemovedGroup.of(run, samples, renormalize=renormalize, dtype=dtype)
    if method is None:
        begun = run.state(start, replay=True, dtype=dtype)
    else:
        begun, bend = first_order(group, start, method)
        if not bend <= BENT:  # also where a sweep overflowed
            _warn(group, bend)
    return state_dict(run.task, group.replayed(start, begun) if replay else begun)


@exclusive
def first_order(group: RemovedGroup, stop: int, method: DIT) -> tuple[State, float]:
    """The state `stop` after its first-order change, and the relative error of that order.

    Raises:
        BadSetting: the curvature is to be chosen, by queries that there are none of.
    """
    if not isinstance(method.curvature, Curvature):
        raise BadSetting(
            "curvature", method.curvature, "one curvature, for example backtrail.GaussNewton()"
        )
    probed = frozenset(np.linspace(group.first, stop - 1, PROBES).round().astype(int).tolist())
    off, far, before = 0.0, 0.0, None
    for number, now in group.sweep(stop, Rules(method.curvature, method.slope)):
        if before is not None and number - 1 in probed:
            bend = group.linearity_gap(number - 1, before, now)
            off, far = off + bend[0], far + bend[1]
        before = now
    assert before is not None
    return changed_state(before), off / far if far else 0.0


def _warn(group: RemovedGroup, bend: float) -> None:
    log.warning(
        "forgetting %d samples to first order: steps without them differ from their first-order "
        "prediction by %.0f %% of what they change, so the parameters may be far from those of "
        "retraining. Retrain instead: replay=%d",
        *(len(group.removal.samples), 100 * bend, group.run.steps),
    )


def _by_diff_in(
    run: Run | Checkpoints, samples: Sequence[int], method: DiffIn
) -> dict[str, Tensor]:
    end = (
        run.trajectory(method.checkpoints).end
        if isinstance(run, Checkpoints)
        else run.state(run.steps)
    )
    return state_dict(
        run.task, State(add(end.params, method.parameter_change(run, samples)), end.buffers)
    )


def state_dict(task: Task, state: State) -> dict[str, Tensor]:
    """A state for `model.load_state_dict`: the model's precision, all names of tied parameters."""
    named: Mapping[str, Tensor] = torch_compile.parameters(task.model) | torch_compile.buffers(
        task.model
    )
    names, tensors = (
        {id(tensor): name for name, tensor in named.items()},
        state.params | state.buffers,
    )
    return {
        key: tensors[names[id(like)]].to(like.dtype).clone()
        for key, like in task.model.state_dict(keep_vars=True).items()
        if id(like) in names
    }
