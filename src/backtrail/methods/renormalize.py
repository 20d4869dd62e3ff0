r"""Influence of a removal that also shrinks the batch's denominator.

Without sample b, and with the mean taken over one sample less, the gradient of a step changes by

.. math:: g' - g = \frac{1}{n-1}\Big(\sum_i c_i g_i - n\, c_b g_b\Big)

so the influence follows from those with the denominator kept, slot by slot: nothing is swept again.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from backtrail.errors import CannotRenormalize
from backtrail.run.run import Run
from backtrail.step.state import Step
from backtrail.tree import cast


def renormalized(kept: Float[Tensor, "query slot"]) -> Float[Tensor, "query slot"]:
    """Turn influences with the denominator kept into those with it renormalised.

    >>> renormalized(torch.tensor([[3.0, 1.0]]))
    tensor([[ 2., -2.]])
    """
    n = kept.shape[1]
    return (n * kept - kept.sum(1, keepdim=True)) / (n - 1)


def check_renormalizable(run: Run) -> None:
    """Refuse runs in which removing a sample does more than drop one term of a mean.

    Raises:
        CannotRenormalize: a loss that is no mean, a batch of one, a sample twice in a batch, or
            samples whose losses depend on one another.
    """
    if run.task.reduce != "mean":
        raise CannotRenormalize(f"the loss is reduced by {run.task.reduce!r}, not by a mean")
    if run.has_ids:
        raise CannotRenormalize(
            "whether losses depend on one another cannot be tried: rows cannot be read again"
        )
    for step in run.log:
        if len(step.samples) == 1:
            raise CannotRenormalize(f"step {step.index} has a single sample")
        if len(set(step.samples)) < len(step.samples):
            raise CannotRenormalize(f"step {step.index} has a sample twice")
    if coupled(run):
        raise CannotRenormalize(
            "the loss of a sample depends on the rest of its batch (BatchNorm, contrastive)"
        )


def coupled(run: Run, index: int = 0) -> bool:
    """Whether the losses of a step's first batch change when its last row is left out."""
    step = run.step(index)
    rows = step.fed[0].samples
    # At two states: a head that starts at zero gives any batch the same losses, a finished training
    # next to none.
    return len(rows) > 1 and any(_lean_on_the_last(run, step, state) for state in {0, run.kept[-1]})


def _lean_on_the_last(run: Run, step: Step, number: int) -> bool:
    state, rows = run.state(number), step.fed[0].samples
    batches = [cast(run.task.batch(some), None, run.task.device) for some in (rows, rows[:-1])]
    with run.task.binding.in_modes(step.evaluating):
        whole, part = (run.task.losses(state.params, state.buffers, batch)[0] for batch in batches)
    return not torch.allclose(whole[:-1], part, rtol=1e-4, atol=1e-6)
