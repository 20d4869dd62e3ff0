"""Arithmetic of dicts of tensors."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backtrail.tree import Tree, add, cast, each, norm, stack

NUMBERS = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=4)
TREES = st.dictionaries(st.sampled_from("abc"), NUMBERS, max_size=3)


def tree(values: dict[str, list[float]]) -> Tree:
    """Turn lists into float64 tensors."""
    return {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in values.items()}


@given(TREES)
def test_norm_is_that_of_all_entries(values: dict[str, list[float]]) -> None:
    """The norm of a tree is that of one vector of all entries, zero without any."""
    flat = [number for numbers in values.values() for number in numbers]
    assert norm(tree(values)) == pytest.approx(sum(x * x for x in flat) ** 0.5)


def test_norm_takes_tensors_of_any_shape_and_precision() -> None:
    """Tensors may be scalars, empty, or of different precision."""
    mixed = {
        "a": torch.tensor(3.0),
        "b": torch.full((1, 1), 4.0, dtype=torch.float64),
        "c": torch.zeros(0),
    }
    assert norm(mixed) == pytest.approx(5)


@given(
    st.dictionaries(st.sampled_from("abc"), st.floats(-9, 9)),
    st.dictionaries(st.sampled_from("abc"), st.floats(-9, 9)),
)
def test_a_missing_name_adds_zero(left: dict[str, float], right: dict[str, float]) -> None:
    """The sum of two trees has the names of both."""
    found = add(tree({k: [v] for k, v in left.items()}), tree({k: [v] for k, v in right.items()}))
    assert {k: v.item() for k, v in found.items()} == {
        k: left.get(k, 0) + right.get(k, 0) for k in left | right
    }


def test_stack_makes_a_first_axis() -> None:
    """Trees of one structure are stacked along a new first axis."""
    found = stack([{"w": torch.full((2,), float(i))} for i in range(3)])
    assert found["w"].tolist() == [[0, 0], [1, 1], [2, 2]]


def test_each_keeps_names_and_order() -> None:
    """A function of tensors is applied to a tree, whose names keep their order."""
    assert list(each(torch.neg, {"z": torch.ones(1), "a": torch.ones(1)})) == ["z", "a"]


def test_cast_moves_floating_tensors_of_any_nesting() -> None:
    """Only floating-point tensors are cast, however nested, and None casts nothing."""
    value: dict[str, Any] = {"x": [torch.ones(2), (torch.arange(2), "text")], "none": None}
    found = cast(value, torch.float64)
    assert found["x"][0].dtype == torch.float64
    assert found["x"][1][0].dtype == torch.int64
    assert found["x"][1][1] == "text"
    assert found["none"] is None
    assert cast(value, None)["x"][0].dtype == torch.float32
