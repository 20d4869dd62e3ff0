"""Algebra on `dict[str, Tensor]`, the only container of parameters in this code base."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.utils import _pytree

# Nested containers (tuples, lists, dicts, and classes registered with torch) as lists of leaves.
# torch has no public name for these yet, so this is the one module that imports them.
tree_flatten = _pytree.tree_flatten
tree_flatten_with_path = _pytree.tree_flatten_with_path
tree_leaves = _pytree.tree_leaves
tree_map = _pytree.tree_map
tree_unflatten = _pytree.tree_unflatten

Tree = dict[str, Tensor]
Value = TypeVar("Value")


def each(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """Apply a function to every tensor of a tree.

    >>> each(torch.neg, {"w": torch.ones(1)})
    {'w': tensor([-1.])}
    """
    return {name: function(tensor) for name, tensor in tree.items()}


def add(left: Tree, right: Tree) -> Tree:
    """Sum of two trees; a name that is in one of them only counts as zero in the other.

    >>> add({"w": torch.ones(1)}, {"w": torch.ones(1), "b": torch.ones(1)})
    {'w': tensor([2.]), 'b': tensor([1.])}
    """
    total = dict(left)
    for name, tensor in right.items():
        total[name] = total[name] + tensor if name in total else tensor
    return total


def precision_of(tree: Mapping[str, Tensor]) -> torch.dtype:
    """Precision of the first floating-point tensor of a tree; torch's default without one.

    >>> precision_of({"count": torch.ones(1, dtype=torch.int64), "w": torch.ones(1).double()})
    torch.float64
    """
    for tensor in tree.values():
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()


def norm(tree: Tree) -> float:
    """Euclidean norm over all entries of all tensors.

    >>> norm({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    5.0
    """
    if not tree:
        return 0.0
    # Takes all tensors in one call, also of several devices: hundreds of small kernels would take
    # longer.
    return float(get_total_norm(list(tree.values())))


def count_writes(tensor: Tensor) -> int:
    """How often a tensor has been written to in place, known without waiting for its device.

    >>> tensor = torch.zeros(2)
    >>> before = count_writes(tensor)
    >>> count_writes(tensor.add_(1)) - before
    1
    """
    return tensor._version


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor that a view shows a part of; None for a tensor that is no view.

    >>> rows = torch.zeros(2, 3)
    >>> base_of(rows[0]) is rows
    True
    """
    return tensor._base


def stack(trees: Sequence[Tree]) -> Tree:
    """Stack trees with the same names and shapes along a new first axis."""
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def concatenate(trees: Sequence[Tree]) -> Tree:
    """Concatenate trees with the same names along their first axis."""
    return {name: torch.cat([tree[name] for tree in trees]) for name in trees[0]}


def flat_rows(tensor: Tensor) -> Tensor:
    """A stack `[row, ...]` as a matrix `[row, entry]`; numbers without axes have one entry each.

    >>> flat_rows(torch.ones(2, 3, 4)).shape, flat_rows(torch.ones(2)).shape
    (torch.Size([2, 12]), torch.Size([2, 1]))
    """
    return tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]


def cast(
    value: Value, dtype: torch.dtype | None, device: torch.device | str | None = None
) -> Value:
    """Move every tensor of a nested value to a device, and floating-point ones to a precision.

    Complex and integer tensors keep their type.

    Args:
        value: Tensors in nested containers.
        dtype: The precision; None keeps it.
        device: The device; None keeps it.
    """

    def move(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None)

    moved: Value = tree_map(move, value)
    return moved


def mapping_to_dict(batch: Any) -> Any:
    """Convert a mapping of another class, such as a tokenizer's output, to a dict.

    torch finds tensors only in containers that it knows. Any other value is returned as it is.
    """
    return dict(batch) if isinstance(batch, Mapping) else batch
