"""Gradients of a task's rows at one state, each row on its own.

Modules are in eval mode, so that no row depends on its batch: BatchNorm uses the state's running
statistics, and dropout is off.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad, vmap

from backtrail.accel.second_order import is_eager
from backtrail.errors import BacktrailError, CoupledRows
from backtrail.methods.diff_in.trajectory import Point
from backtrail.task.coupling import are_rows_coupled
from backtrail.task.task import Batch, Task, size_of
from backtrail.tree import (
    Tree,
    add,
    cast,
    each,
    flat_rows,
    precision_of,
    stack,
    tree_flatten,
    tree_unflatten,
)


@final
@dataclass(frozen=True, slots=True)
class RowGradients:
    """The losses of rows as functions of the trained parameters, around one state."""

    task: Task
    point: Point

    def read(self, rows: Sequence[int]) -> Batch:
        """Read rows of the data set, on the state's device and in its precision."""
        like = next(iter(self.point.params.values()))
        return cast(self.task.batch(rows), like.dtype, like.device)

    def each(self, batch: Batch, trained: Tree) -> Tree:
        """The gradient of every row of a batch, `[row, ...]`.

        Raises:
            BacktrailError: The task is wrong, which no other way of computing would change.
        """
        leaves, structure = tree_flatten(batch)
        size = size_of(batch)
        # Leaves without a row axis (a shared mask, a number) are the same for every row.
        axes = [0 if _has_rows(leaf, size) else None for leaf in leaves]

        def gradient(*row: Tensor) -> Tree:
            # The model expects a batch, so a row keeps a first axis of length 1.
            one = [
                leaf if axis is None else leaf[None] for leaf, axis in zip(row, axes, strict=True)
            ]
            return self.sum(tree_unflatten(one, structure), trained)

        try:
            gradients: Tree = vmap(gradient, in_dims=tuple(axes))(*leaves)
        except BacktrailError:  # says what is wrong, whether in a batch or one by one
            raise
        except (RuntimeError, NotImplementedError, ValueError) as error:
            # The model has an operation without a batching rule.
            self.task.binding.note_one_by_one(error)
            by_row = []
            for row in range(size):
                parts = [
                    leaf if axis is None else leaf[row]
                    for leaf, axis in zip(leaves, axes, strict=True)
                ]
                by_row.append(gradient(*parts))
            return stack(by_row)
        return gradients

    def sum(self, batch: Batch, trained: Tree) -> Tree:
        """The gradient of the sum of the rows' losses."""

        def total(part: Tree) -> Tensor:
            # A row gets the same random numbers at every state, alone and under `vmap`.
            with self.task.fixed_noise(precision_of(self.point.params)):
                losses, _ = self.task.losses(self.point.params | part, self.point.buffers, batch)
            return losses.sum()

        return _gradient(total, trained)

    def of_penalty(self, trained: Tree) -> Tree:
        """The gradient of the task's penalty; empty where it has none."""
        penalty = self.task.penalty
        if penalty is None:
            return {}
        return _gradient(lambda part: penalty(self.point.params | part), trained)

    def refuse_coupled(self, batch: Batch) -> None:
        """Refuse a loss of which a row alone has none.

        Args:
            batch: Any rows, of which the first few are compared.

        Raises:
            CoupledRows: The loss of a row depends on the other rows of its batch.
        """

        def score(model: nn.Module, some: Batch) -> Tensor:
            return self.task.losses_of(self.task.predict(model, some), some)

        point = self.point
        if are_rows_coupled(self.task, batch, score, params=point.params, buffers=point.buffers):
            raise CoupledRows(
                "The loss",
                "Use backtrail.DIT(), which reads the batches of the training as they were",
            )


def _gradient(function: Callable[[Tree], Tensor], trained: Tree) -> Tree:
    """The gradient of a function, under a transform of torch.func or by plain autograd."""
    if not is_eager():
        gradient: Tree = grad(function)(trained)
        return gradient
    # Outside of `vmap` torch.func is not needed, and refuses models that autograd can follow.
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in trained.items()}
    with torch.enable_grad():
        value = function(leaves)
    if not value.requires_grad:
        return each(torch.zeros_like, trained)
    found = torch.autograd.grad(
        value, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def _has_rows(leaf: object, size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size


@final
@dataclass(frozen=True, slots=True)
class Proxy:
    """The training's loss, estimated on one batch B; its gradient stands for that of any step.

    Attributes:
        gradients: Gradients of rows at one state.
        batches: B, in parts that go through the model one after the other.
        scale: Sum of the factors c of a step: 1 for a mean loss.
    """

    gradients: RowGradients
    batches: Sequence[Batch]
    scale: float

    def gradient(self, trained: Tree) -> Tree:
        """The gradient G_B of the loss over B, with the penalty."""
        total: Tree = {}
        for batch in self.batches:
            total = add(total, self.gradients.sum(batch, trained))
        size = sum(size_of(batch) for batch in self.batches)
        mean = each(lambda tensor: tensor * (self.scale / size), total)
        return add(mean, self.gradients.of_penalty(trained))


def inner_products(directions: Tree, rows: Tree) -> Float[Tensor, "direction row"]:
    """Inner products of directions `[direction, ...]` with rows `[row, ...]`."""
    by_tensor = [flat_rows(directions[name]) @ flat_rows(rows[name]).T for name in directions]
    total = by_tensor[0]
    for products in by_tensor[1:]:
        total = total + products
    return total
