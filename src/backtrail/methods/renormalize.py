r"""Influence of a removal that also shrinks the batch's denominator.

Without sample b, and with the mean taken over one sample less, the gradient of a step changes by

.. math:: g' - g = \frac{1}{n-1}\Big(\sum_i c_i g_i - n\, c_b g_b\Big)

so the influence follows from those with the denominator kept, slot by slot, without another sweep.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from backtrail.errors import CannotRenormalize
from backtrail.run.run import Run
from backtrail.step.state import State, Step
from backtrail.tree import cast


def renormalize(kept: Float[Tensor, "query slot"]) -> Float[Tensor, "query slot"]:
    r"""Turn influences I with the denominator kept into those with it renormalized.

    .. math:: I'_b = \frac{1}{n-1}\Big(n\, I_b - \sum_i I_i\Big)

    >>> renormalize(torch.tensor([[3.0, 1.0]]))
    tensor([[ 2., -2.]])
    """
    n = kept.shape[1]
    return (n * kept - kept.sum(1, keepdim=True)) / (n - 1)


def check_renormalizable(run: Run) -> None:
    """Refuse runs in which removing a sample does more than drop one term of a mean.

    Raises:
        CannotRenormalize: A loss that is not a mean, a batch of one, a sample twice in a batch, or
            samples whose losses depend on one another.
    """
    if run.task.total is not None:
        raise CannotRenormalize("the loss is one value of a whole batch (Task(total=...))")
    if run.task.reduce != "mean":
        raise CannotRenormalize(f"the loss is reduced by {run.task.reduce!r}, not by a mean")
    if run.has_ids:
        raise CannotRenormalize(
            "its rows cannot be read again, to test whether losses depend on one another"
        )
    for step in run.log:
        if len(step.samples) == 1:
            raise CannotRenormalize(f"step {step.index} has a single sample")
        if len(set(step.samples)) < len(step.samples):
            raise CannotRenormalize(f"step {step.index} has a sample twice")
    if is_coupled(run):
        raise CannotRenormalize(
            "the loss of a sample depends on the rest of its batch (BatchNorm, contrastive)"
        )


def is_coupled(run: Run, index: int = 0) -> bool:
    """Test whether the losses of a step's first batch change without its last row."""
    step = run.step(index)
    if len(step.fed[0].samples) == 1:
        return False
    # At two states: a head that starts at zero gives any batch the same losses, and a finished
    # training nearly the same.
    return any(_changes_without_last_row(run, step, run.state(n)) for n in {0, run.kept[-1]})


def _changes_without_last_row(run: Run, step: Step, state: State) -> bool:
    rows = step.fed[0].samples
    with run.task.binding.in_modes(step.evaluating):
        whole = _losses(run, rows, state)
        part = _losses(run, rows[:-1], state)
    return not torch.allclose(whole[:-1], part, rtol=1e-4, atol=1e-6)


def _losses(run: Run, rows: tuple[int, ...], state: State) -> Float[Tensor, " slot"]:
    batch = cast(run.rows(rows), None, run.task.device)
    losses, _ = run.task.losses(state.params, state.buffers, batch)
    return losses
