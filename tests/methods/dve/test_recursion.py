"""The recursion of Data Value Embedding is the product of the steps' matrices."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from backtrail.errors import EmbeddingGrew
from backtrail.methods.dve.recursion import Propagator, Visits, curvature_weights, embed_step
from tests.oracles.value_recursion import products, value_embeddings

STEPS = 9
SLOTS = 3
RANK = 12
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
each_precision = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
each_size = pytest.mark.parametrize("rank", [RANK, 200], ids=["matrix", "rows"])  # 27 visits in all
each_damping = pytest.mark.parametrize("damping", [0.0, 0.5, 1.0])


def steps(rank: int, dtype: torch.dtype, size: float = 0.3) -> list[Visits]:
    """Draw steps whose update scales every coordinate differently and decays it."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    found = []
    for _ in range(STEPS):
        rate = size * normal(rank).square()
        decay = 1 - 0.05 * normal(rank).square()
        gradient = normal(SLOTS, rank)
        fisher = normal(SLOTS, rank) * (RANK / rank) ** 0.5
        share = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
        parts = (share, rate * gradient, share, fisher, rate * fisher, decay)
        found.append(Visits(*(part.to(dtype) for part in parts)))
    return found


def back(
    some: list[Visits], transport: Propagator, *, first: int = 0, damping: float = 0.0
) -> dict[int, Tensor]:
    """Run the recursion backwards; return the embeddings by step."""
    numbers = range(first + len(some) - 1, first - 1, -1)
    return {
        number: embed_step(
            visits,
            transport,
            weights=curvature_weights([visits], damping)[0],
            step=number,
            block="layer",
        )
        for number, visits in zip(numbers, reversed(some), strict=True)
    }


def assert_close(found: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Assert that two tensors agree to their precision's tolerance, relative to the largest."""
    assert found.dtype == dtype
    assert (found.double() - truth).abs().max() <= TOLERANCE[dtype] * truth.abs().max()


@each_precision
@each_size
@each_damping
def test_embeddings_and_transport_are_the_explicit_products(
    rank: int, dtype: torch.dtype, damping: float
) -> None:
    """The embeddings and P = I - M of the paper are the oracle's products of matrices."""
    some = steps(rank, dtype)
    transport = Propagator(some[0].decay)
    found = back(some, transport, damping=damping)
    for number, truth in enumerate(value_embeddings(some, damping)):
        assert_close(found[number], truth, dtype)
    assert_close(transport.matrix(), products(some, damping)[0], dtype)


@each_size
def test_transposed_transport_is_the_transpose(rank: int) -> None:
    """The transposed propagator is the transpose, stored as rows or as a matrix."""
    some = steps(rank, torch.float64)
    transport = Propagator(torch.zeros(rank, dtype=torch.float64))
    back(some, transport)
    one = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(transport.transposed(one), transport.matrix())
    torch.testing.assert_close(transport(one), transport.matrix().T)


def test_rows_and_matrix_are_the_same() -> None:
    """The propagator as rows and as a matrix gives the same embeddings."""
    few = steps(RANK, torch.float64)
    wide = [
        Visits(
            v.share,
            pad(v.moved, (0, 100)),
            v.fisher_share,
            pad(v.fisher, (0, 100)),
            pad(v.fisher_moved, (0, 100)),
            pad(v.decay, (0, 100), value=1.0),
        )
        for v in few
    ]
    as_matrix = Propagator(few[0].decay)
    as_rows = Propagator(wide[0].decay)
    matrix = back(few, as_matrix)
    rows = back(wide, as_rows)
    for number in matrix:
        torch.testing.assert_close(rows[number][:, :RANK], matrix[number], rtol=1e-12, atol=1e-12)
        assert (rows[number][:, RANK:] == 0).all()
    torch.testing.assert_close(
        as_rows.matrix()[:RANK, :RANK], as_matrix.matrix(), rtol=1e-12, atol=1e-12
    )


@each_precision
@each_size
def test_segments_give_what_the_whole_gives(rank: int, dtype: torch.dtype) -> None:
    """Segments that begin with the identity and are then joined give the whole's embeddings."""
    some = steps(rank, dtype)
    cuts = [(0, 4), (4, 7), (7, 9)]
    whole = back(some, Propagator(some[0].decay))
    transports = [Propagator(some[0].decay) for _ in cuts]
    parts = [
        back(some[first:last], transport, first=first)
        for (first, last), transport in zip(cuts, transports, strict=True)
    ]
    for place, part in enumerate(parts):
        for number, rows in part.items():
            for later in transports[place + 1 :]:
                rows = later(rows)  # noqa: PLW2901 - carried on
            assert_close(rows, whole[number].double(), dtype)


def test_growth_beyond_all_measure_is_an_error() -> None:
    """Growth is an error that names step, block, factor and remedy; damping prevents it."""
    some = steps(RANK, torch.float32, size=40.0)
    with pytest.raises(
        EmbeddingGrew, match=r"At step \d the embeddings of 'layer' are .* times .*damping=0\.5"
    ):
        back(some, Propagator(some[0].decay))
    symmetric = [Visits(v.share, v.moved, v.share, v.fisher, 40 * v.fisher, v.decay) for v in some]
    with pytest.raises(EmbeddingGrew):
        back(symmetric, Propagator(some[0].decay))
    found = back(symmetric, Propagator(some[0].decay), damping=0.5)
    for number, rows in found.items():
        assert (rows.norm(dim=1) <= some[number].moved.norm(dim=1)).all()


def test_what_is_not_finite_is_an_error() -> None:
    """A NaN in a step's rows is an error that names the step."""
    some = steps(RANK, torch.float32)
    some[4].moved[1, 2] = torch.nan
    with pytest.raises(EmbeddingGrew, match=r"At step 4 .* are not finite"):
        back(some, Propagator(some[0].decay))
