"""Algebra on `dict[str, Tensor]`, the only container of parameters in this code base."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
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
    """Apply a function to every tensor.

    >>> each(torch.neg, {"w": torch.ones(1)})
    {'w': tensor([-1.])}
    """
    return {name: function(tensor) for name, tensor in tree.items()}


def add(left: Tree, right: Tree) -> Tree:
    """Sum of two trees; a name that only one of them has counts as zero in the other.

    >>> add({"w": torch.ones(1)}, {"w": torch.ones(1), "b": torch.ones(1)})
    {'w': tensor([2.]), 'b': tensor([1.])}
    """
    both = {
        name: tensor + right[name] if name in right else tensor for name, tensor in left.items()
    }
    return both | {name: tensor for name, tensor in right.items() if name not in left}


def norm(tree: Tree) -> float:
    """Euclidean norm over all entries of all tensors.

    >>> norm({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    5.0
    """
    if not tree:
        return 0.0
    norms = torch._foreach_norm(list(tree.values()))
    return float(torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])))


def stack(trees: Sequence[Tree]) -> Tree:
    """Stack equal trees along a new first axis."""
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def joined(trees: Sequence[Tree]) -> Tree:
    """One stack of several, one behind the other."""
    return {name: torch.cat([tree[name] for tree in trees]) for name in trees[0]}


def cast(
    value: Value, dtype: torch.dtype | None, device: torch.device | str | None = None
) -> Value:
    """Move every tensor of a nested value to a device, and every floating one to a precision.

    Complex and integer tensors keep their type; `None` leaves precision or device alone.
    """

    def move(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None)

    moved: Value = tree_map(move, value)
    return moved


def plain(batch: Any) -> Any:
    """A mapping of any kind (a tokenizer's, say) as a dict, in which torch finds the tensors; all else as it is."""
    return dict(batch) if isinstance(batch, Mapping) else batch
