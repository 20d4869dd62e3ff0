"""Gradients of a task's rows at one state, each on its own: in eval mode, so that no row leans on its batch.

BatchNorm uses the state's running statistics, and dropout drops nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from backtrail.methods.diff_in.trajectory import Point
from backtrail.task.task import Batch, Task, size_of
from backtrail.tree import Tree, add, cast, each, stack


@final
@dataclass(frozen=True, slots=True)
class RowGradients:
    """The losses of rows as functions of the trained parameters, around one state."""

    task: Task
    point: Point

    def read(self, rows: Sequence[int]) -> Batch:
        """Rows of the data set on the state's device, in its precision."""
        like = next(iter(self.point.params.values()))
        return cast(self.task.batch(rows), like.dtype, like.device)

    def each(self, batch: Batch, trained: Tree) -> Tree:
        """The gradient of every row of a batch, `[row, ...]`."""
        leaves, shape = tree_flatten(batch)
        size = size_of(batch)
        axes = [
            0 if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size else None
            for leaf in leaves
        ]

        def slope(*row: Tensor) -> Tree:
            one = [
                leaf if axis is None else leaf[None] for leaf, axis in zip(row, axes, strict=True)
            ]
            return self.sum(tree_unflatten(one, shape), trained)

        try:
            found: Tree = vmap(slope, in_dims=tuple(axes))(*leaves)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            self.task.binding.note_one_by_one(error)
            parts = [
                [
                    leaf if axis is None else leaf[row]
                    for leaf, axis in zip(leaves, axes, strict=True)
                ]
                for row in range(size)
            ]
            return stack([slope(*part) for part in parts])
        return found

    def sum(self, batch: Batch, trained: Tree) -> Tree:
        """The gradient of the sum of the rows' losses."""

        def total(part: Tree) -> Tensor:
            return self.task.losses(self.point.params | part, self.point.buffers, batch)[0].sum()

        found: Tree = grad(total)(trained)
        return found

    def of_penalty(self, trained: Tree) -> Tree:
        """The gradient of the task's penalty."""
        penalty = self.task.penalty
        if penalty is None:
            return {}
        found: Tree = grad(lambda part: penalty(self.point.params | part))(trained)
        return found


@final
@dataclass(frozen=True, slots=True)
class Proxy:
    """The training's loss, estimated on one batch B: its gradient stands for that of any step.

    Attributes:
        gradients: of rows at one state.
        batches: B, cut into parts that go through the model at once.
        scale: the sum of the factors c of a step.
    """

    gradients: RowGradients
    batches: Sequence[Batch]
    scale: float

    def gradient(self, trained: Tree) -> Tree:
        """That of the loss over B, with the penalty."""
        total: Tree = {}
        for batch in self.batches:
            total = add(total, self.gradients.sum(batch, trained))
        size = sum(size_of(batch) for batch in self.batches)
        return add(
            each(lambda tensor: tensor * (self.scale / size), total),
            self.gradients.of_penalty(trained),
        )


def products(directions: Tree, rows: Tree) -> Float[Tensor, "direction row"]:
    """Inner products of directions `[direction, ...]` with rows `[row, ...]`."""
    return sum(  # type: ignore[return-value]
        directions[name].flatten(1) @ rows[name].flatten(1).T for name in directions
    )
