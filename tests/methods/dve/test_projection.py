"""Projections keep inner products, on average over seeds, and exactly at full rank."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from backtrail.errors import BadSetting
from backtrail.methods.dve.projection import Kind, Projection, projection
from backtrail.persample.sketch import Dense, KroneckerSketch

SHAPES = {"matrix": (6, 5), "kernel": (4, 3, 2, 2), "vector": (7,), "number": ()}
SEEDS = 400
ROUND = torch.zeros((), dtype=torch.float64)


def gradients(rows: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """Draw gradients of every parameter, `[row, ...]`."""
    return {name: torch.randn(rows, *shape, dtype=torch.float64) for name, shape in shapes.items()}


def products(left: dict[str, Tensor], right: dict[str, Tensor]) -> Tensor:
    """Return the inner products of all pairs of gradients, `[row, row]`."""
    rows = [[tensor.reshape(len(tensor), -1) for tensor in tree.values()] for tree in (left, right)]
    return torch.cat(rows[0], 1) @ torch.cat(rows[1], 1).T


def sketched(left: dict[str, Tensor], right: dict[str, Tensor], drawn: Projection) -> Tensor:
    """Return the inner products of all pairs of projected gradients, `[row, row]`."""
    return drawn.of_gradient(left) @ drawn.of_gradient(right).T


@pytest.mark.parametrize("kind", get_args(Kind))
def test_products_are_right_on_the_average_over_seeds(kind: Any) -> None:
    """The mean over 400 seeds is within five standard errors of every product."""
    left = gradients(2)
    right = gradients(2)
    found = torch.stack(
        [
            sketched(left, right, projection(SHAPES, kind=kind, rank=6, seed=s, like=ROUND))
            for s in range(SEEDS)
        ]
    )
    error = (found.mean(0) - products(left, right)).abs()
    assert (error <= 5 * found.std(0) / SEEDS**0.5).all()


def test_two_sides_drawn_alike_make_a_biased_sketch() -> None:
    """Two sides with the same random numbers give a biased sketch, independent ones do not."""
    shapes = {"matrix": (6, 6)}
    left = {"matrix": torch.eye(6, dtype=torch.float64)[None]}
    apart = []
    alike = []
    for seed in range(SEEDS):
        own = projection(shapes, rank=4, seed=seed, like=ROUND)
        side = own.sides["matrix"].left
        apart.append(sketched(left, left, own)[0, 0])
        alike.append(
            sketched(left, left, Projection({"matrix": KroneckerSketch(side, side)}))[0, 0]
        )
    for found, biased in ((torch.stack(apart), False), (torch.stack(alike), True)):
        off = (found.mean() - 6.0).abs() / (found.std() / SEEDS**0.5)
        assert off > 10 if biased else off < 5


def test_no_two_sides_share_numbers() -> None:
    """No two sides have the same random numbers, in one parameter or in two."""
    drawn = projection({"a": (9, 9), "b": (9, 9)}, rank=4)
    bases = [
        s.basis
        for one in drawn.sides.values()
        for s in (one.left, one.right)
        if isinstance(s, Dense)
    ]
    assert len(bases) == 4
    assert not any(torch.equal(a, b) for place, a in enumerate(bases) for b in bases[:place])


@pytest.mark.parametrize("kind", get_args(Kind))
def test_products_are_exact_at_full_rank(kind: Any) -> None:
    """A rank of at least the number of entries projects nothing away."""
    left = gradients(3)
    right = gradients(4)
    found = sketched(left, right, projection(SHAPES, kind=kind, rank=48, like=ROUND))
    torch.testing.assert_close(found, products(left, right), rtol=1e-12, atol=1e-12)


def test_orthonormal_sides_are_orthonormal_but_for_their_scale() -> None:
    """The columns are orthogonal, with the length that makes the sketch unbiased."""
    side = projection({"w": (50,)}, kind="orthonormal", rank=10, like=ROUND).sides["w"].left
    assert isinstance(side, Dense)
    torch.testing.assert_close(side.basis.T @ side.basis, 5.0 * torch.eye(10, dtype=torch.float64))


def test_every_parameter_has_its_place() -> None:
    """Parameters have slices in the order of their names; one without a gradient has zeros."""
    drawn = projection(SHAPES, rank=6, like=ROUND)
    assert drawn.layout == {
        "matrix": slice(0, 6),
        "kernel": slice(6, 12),
        "vector": slice(12, 18),
        "number": slice(18, 19),
    }
    assert drawn.rank == 19
    whole = gradients(2)
    found = drawn.of_gradient({name: whole[name] for name in ("vector", "matrix")})
    assert not found[:, 6:12].any()
    for name in ("vector", "matrix"):
        torch.testing.assert_close(
            found[:, drawn.layout[name]], drawn.sides[name].reduce(whole[name])
        )


def test_factors_of_rows_and_columns_go_into_the_projection() -> None:
    """The scaled projection of g is the projection of d times g, d an outer product."""
    drawn = projection(SHAPES, rank=6, like=ROUND)
    whole = gradients(2)
    factors = {
        name: tuple(torch.rand(size).double() for size in KroneckerSketch.sizes(shape))
        for name, shape in SHAPES.items()
    }
    scaled = {}
    for name, gradient in whole.items():
        d = factors[name][0] if len(factors[name]) == 1 else torch.outer(*factors[name])
        scaled[name] = gradient * d.reshape(SHAPES[name])
    torch.testing.assert_close(drawn.scaled(factors).of_gradient(whole), drawn.of_gradient(scaled))


def test_any_diagonal_is_exact_on_the_entries_of_a_mask() -> None:
    """A mask commutes with any diagonal matrix."""
    drawn = projection(SHAPES, kind="mask", rank=6, like=ROUND)
    whole = gradients(2)
    diagonal = {name: torch.rand(shape).double() for name, shape in SHAPES.items()}
    wanted = drawn.of_gradient({name: whole[name] * d for name, d in diagonal.items()})
    torch.testing.assert_close(drawn.of_gradient(whole) * drawn.of_diagonal(diagonal), wanted)


def test_entries_are_asked_of_masks_only() -> None:
    """A projection that mixes entries refuses to name them."""
    with pytest.raises(BadSetting, match="mask"):
        projection(SHAPES, rank=2).entries("matrix")


def test_a_seed_is_a_projection() -> None:
    """The seed alone gives a parameter's projection, in any precision and beside any others."""
    whole = gradients(2, {"matrix": (6, 5)})
    once, again = (projection(s, rank=6, like=ROUND) for s in ({"matrix": (6, 5)}, SHAPES))
    other = projection(SHAPES, rank=6, seed=1, like=ROUND)
    first = once.of_gradient(whole)
    assert torch.equal(first, again.of_gradient(whole)[:, :6])
    assert not torch.allclose(first, other.of_gradient(whole)[:, :6])
    rough = projection({"matrix": (6, 5)}, rank=6).of_gradient({"matrix": whole["matrix"].float()})
    torch.testing.assert_close(rough, first.float(), rtol=1e-5, atol=1e-5)


def test_a_rank_of_nothing_is_refused() -> None:
    """Rank 0 is refused."""
    with pytest.raises(BadSetting, match="rank"):
        projection(SHAPES, rank=0)
