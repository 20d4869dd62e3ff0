"""Whether what a model says of a row depends on the other rows of its batch.

It does for contrastive losses, in-batch softmax, and a loss divided by an average over the batch.
Such a number means something for a group of rows only.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from backtrail.errors import BacktrailError, NotCut
from backtrail.task.noise import ConstantNumbers
from backtrail.task.task import Batch, Task, select_rows, size_of
from backtrail.tree import Tree

MOST_ROWS = 4  # that are compared; an even number, since a loss may read rows in pairs
# Allowed difference, relative to the largest number: matrix products of one row and of several take
# other kernels. A loss that couples rows changes by parts of itself.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
COARSE = 5e-2  # in other precisions


def are_rows_coupled(
    task: Task,
    batch: Batch,
    score: Callable[[nn.Module, Batch], Tensor],
    *,
    params: Tree,
    buffers: Tree,
) -> bool:
    """Whether the scores of a batch differ from those of its rows alone, in eval mode.

    Args:
        task: The model.
        batch: Its first `MOST_ROWS` are compared; two at least, or nothing is found.
        score: Maps model and batch to one number or several for every row, `[slot, ...]`.
        params: Parameters of the state at which they are compared.
        buffers: Buffers there.

    Raises:
        BacktrailError: The task or a query is wrong, whichever rows are read.
    """

    def read(some: Batch) -> Tensor:
        # A forward pass of a group draws other numbers for a row than that of the row alone.
        with ConstantNumbers():
            return task.bind(
                params,
                {name: tensor.clone() for name, tensor in buffers.items()},
                lambda model: score(model, some).detach(),
            )

    fixed = task.fixed_noise(next(iter(params.values())).dtype)
    kernel = sdpa_kernel(SDPBackend.MATH)
    try:
        with task.binding.in_modes(None), task.without_graph(), kernel, fixed:
            rows = torch.arange(min(MOST_ROWS, size_of(batch)))
            together = read(select_rows(batch, rows))
            alone = [read(select_rows(batch, row[None])) for row in rows]
    except NotCut:
        return False  # rows of such a batch cannot be told apart
    except BacktrailError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, StopIteration):
        # A loss that cannot read one row (or four) says so itself where it is asked to.
        return False
    if len(rows) < 2 or len(together) != len(rows):
        return False
    difference = (together - torch.cat(alone)).abs().max()
    largest = together.abs().max()
    return bool(difference > TOLERANCE.get(together.dtype, COARSE) * largest)
