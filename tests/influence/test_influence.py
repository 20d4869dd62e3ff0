"""Sums, windows, visits and tables of an influence against loops over all entries."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from backtrail import errors
from backtrail.influence.influence import Influence, open_influence
from backtrail.influence.tables import Order
from backtrail.influence.writer import from_arrays
from tests.influence.made import (
    OBSERVED,
    QUERIES,
    SAMPLES,
    STEPS,
    description,
    losses,
    made,
    numbers,
    slots,
    summed,
)

Case = tuple[Callable[[Influence], object], type[Exception], list[str]]
ORDERS: dict[Order, Callable[[float], float]] = {
    "harmful": lambda x: x,
    "helpful": lambda x: -x,
    "absolute": lambda x: -abs(x),
}


@pytest.fixture(params=["memory", "folder"])
def influence(request: pytest.FixtureRequest, tmp_path: Path) -> Influence:
    """Return the same influence, in memory and opened from a folder."""
    if request.param == "memory":
        return made()
    made(tmp_path / "influence")
    return open_influence(tmp_path / "influence")


def test_total_is_the_sum_over_visits(influence: Influence) -> None:
    """The total is the sum by loops over query, state, step and slot."""
    np.testing.assert_allclose(influence.total(), summed(), rtol=1e-14, atol=1e-15)


def test_unseen_samples_have_exactly_zero(influence: Influence) -> None:
    """Samples that are in no batch have exactly zero."""
    assert (influence.total()[:, :, 7:] == 0).all()
    assert (influence.window(3, 10)[:, 7:] == 0).all()
    assert (influence.visits(2, 9)[:, 7:] == 0).all()


def test_total_of_one_query_keeps_its_axis(influence: Influence) -> None:
    """One query by name has its row of the total, bit for bit."""
    np.testing.assert_array_equal(influence.total(query="loss b"), influence.total()[1:2])


def test_total_into_a_file_is_the_same(influence: Influence, tmp_path: Path) -> None:
    """A total written to a .npy file is memory-mapped and equal; no other file is left."""
    target = tmp_path / "totals" / "total.npy"
    target.parent.mkdir()
    mapped = influence.total(out=target)
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, influence.total())
    np.testing.assert_array_equal(np.load(target), mapped)
    assert [file.name for file in target.parent.iterdir()] == ["total.npy"]


def test_padding_adds_nothing_whatever_stands_there() -> None:
    """NaN in the padding is in no sum."""
    values = np.where(slots() >= 0, numbers(), np.nan)
    total = from_arrays(description(), values, sample=slots()).total()
    np.testing.assert_allclose(total, summed(), rtol=1e-14, atol=1e-15)


def test_sums_of_float32_are_made_in_float64() -> None:
    """Influence stored in float32 is summed in float64."""
    total = made(dtype="float32").total()
    assert total.dtype == np.float64
    np.testing.assert_allclose(total, summed(), atol=1e-6)


@pytest.mark.parametrize(("a", "b"), [(0, 3), (0, 10), (3, 7), (3, 10), (7, 7), (0, 0)])
def test_window_is_the_difference_of_totals(influence: Influence, a: int, b: int) -> None:
    """A window is the difference of the totals at its two states, zero at state 0."""
    expected = summed()[:, OBSERVED.index(b)] - summed()[:, OBSERVED.index(a)]
    np.testing.assert_allclose(influence.window(a, b), expected, rtol=1e-13, atol=1e-14)


def test_window_may_begin_at_state_0_unobserved() -> None:
    """A window may begin at state 0 without observing it."""
    about = description(observed_at=(3, 10))
    influence = from_arrays(about, numbers()[:, [1, 3]], sample=slots())
    np.testing.assert_array_equal(influence.window(0, 3), influence.total()[:, 0])


def test_windows_add_up_to_the_whole(influence: Influence) -> None:
    """Consecutive windows, and consecutive ranges of visits, add up to the total."""
    total = influence.total()[:, -1]
    windows = sum(influence.window(a, b) for a, b in ((0, 3), (3, 7), (7, 10)))
    visits = sum(influence.visits(a, b) for a, b in ((0, 1), (1, 6), (6, STEPS)))
    np.testing.assert_allclose(windows, total, atol=1e-14)
    np.testing.assert_allclose(visits, total, atol=1e-14)


@pytest.mark.parametrize("observed_at", [3, 7, "end"])
@pytest.mark.parametrize("steps", [(0, STEPS), (2, 9), (5, 6), (4, 4)])
def test_visits_sum_some_steps(
    influence: Influence, steps: tuple[int, int], observed_at: int | str
) -> None:
    """Visits are summed over the steps [a, b), at one observed state, by default the last."""
    column = -1 if observed_at == "end" else OBSERVED.index(int(observed_at))
    found = influence.visits(*steps, observed_at=observed_at)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, summed(*steps)[:, column], rtol=1e-14, atol=1e-15)


def test_window_and_visits_are_different_questions(influence: Influence) -> None:
    """A window differs from the visits in the same steps."""
    assert not np.allclose(influence.window(3, 10), influence.visits(3, 10))


def test_same_question_same_bits(influence: Influence) -> None:
    """The same sum is equal bit for bit, by whichever call."""
    np.testing.assert_array_equal(influence.total(), influence.total())
    np.testing.assert_array_equal(influence.window(0, 7), influence.total()[:, 2])


@pytest.mark.parametrize("query", [1, "loss b"])
def test_curve_is_the_total_by_state(influence: Influence, query: int | str) -> None:
    """A curve has the totals of a sample at all observed states."""
    table = influence.curve(sample=5, query=query)
    assert table.columns == ["observed_at", "influence"]
    assert table["observed_at"].to_list() == list(OBSERVED)
    np.testing.assert_array_equal(table["influence"], influence.total()[1, :, 5])


def test_curve_begins_at_state_0_unobserved() -> None:
    """A curve begins with zero at state 0, though that was not observed."""
    about = description(observed_at=(3, 10))
    influence = from_arrays(about, numbers()[:, [1, 3]], sample=slots())
    assert influence.curve(sample=5)["observed_at"].to_list() == [0, 3, 10]
    assert influence.curve(sample=5)["influence"][0] == 0.0


@pytest.mark.parametrize("state", [3, "end"])
def test_visits_curve_has_one_row_per_visit(influence: Influence, state: int | str) -> None:
    """Every visit before the state has a row, two where the batch holds the sample twice."""
    until = 10 if state == "end" else int(state)
    column = OBSERVED.index(until)
    expected = [
        (t, b, numbers()[2, column, t, b], losses()[t, b])
        for t in range(until)
        for b in range(slots().shape[1])
        if slots()[t, b] == 5
    ]
    table = influence.visits_curve(sample=5, query=2, observed_at=state)  # type: ignore[arg-type]
    assert table.columns == ["step", "slot", "influence", "loss"]
    np.testing.assert_array_equal(np.array(table.rows()), np.array(expected))


def test_an_unseen_sample_is_refused(influence: Influence) -> None:
    """A sample that is in no batch has no influence to look up, and the error says why."""
    for look_up in (influence.curve, influence.visits_curve):
        with pytest.raises(errors.NeverTrainedOn, match="Sample 8 was never trained on"):
            look_up(sample=8)


@pytest.mark.parametrize("order", ORDERS)
def test_top_sorts_the_totals(influence: Influence, order: Order) -> None:
    """The top samples are the first of all, sorted by total."""
    scores = influence.total()[1, -1]
    expected = sorted(range(SAMPLES), key=lambda j: ORDERS[order](scores[j]))[:4]
    table = influence.top(4, query="loss b", order=order)
    assert table.columns == ["rank", "sample", "influence"]
    assert table["rank"].to_list() == [1, 2, 3, 4]
    assert table["sample"].to_list() == expected
    np.testing.assert_array_equal(table["influence"], scores[expected])


def test_top_of_a_window_and_of_a_state(influence: Influence) -> None:
    """The ranking may be of a window, or of an earlier state."""
    window = influence.top(SAMPLES, window=(3, 7))
    np.testing.assert_array_equal(window["influence"], np.sort(influence.window(3, 7)[0]))
    early = influence.top(SAMPLES, observed_at=3)
    np.testing.assert_array_equal(early["influence"], np.sort(influence.total()[0, 1]))


def test_top_breaks_ties_by_row_and_takes_any_length(influence: Influence) -> None:
    """Ties are in the order of samples, and a larger k than samples gives all."""
    assert influence.top(99, observed_at=0)["sample"].to_list() == list(range(SAMPLES))
    with pytest.raises(errors.BadSetting, match="Invalid k=0: expected a positive integer"):
        influence.top(0)


def test_attributes_tell_what_it_is(influence: Influence) -> None:
    """Names, sizes, unit, sign and settings are those given."""
    assert (influence.queries, influence.observed_at) == (QUERIES, OBSERVED)
    assert (influence.steps, influence.slots, influence.samples) == (STEPS, 4, SAMPLES)
    assert (influence.method, influence.unit, influence.run) == ("made", "nats", "run-1")
    assert influence.denominator == "keep"
    assert influence.settings == {"seed": 3, "curvature": "Hessian"}
    assert influence.sign.startswith("what the query gains when the sample is removed")
    assert "positive = helpful, negative = harmful" in repr(influence)
    assert "made (nats)" in repr(influence)


def test_arrays_come_back(influence: Influence) -> None:
    """Values, samples and losses are those written."""
    np.testing.assert_array_equal(influence.values(), numbers())
    np.testing.assert_array_equal(influence.values(3, 6), numbers()[:, :, 3:6])
    np.testing.assert_array_equal(influence.sample, slots())
    np.testing.assert_array_equal(influence.loss, losses())


def test_with_queries_remembers_the_query_object(influence: Influence) -> None:
    """`with_queries` returns a copy that has the query object."""
    query = object()
    assert influence.with_queries(query).query_object is query
    assert influence.query_object is None


def long_rows() -> list[tuple[str, int, int, int, int, float]]:
    """Return the rows of the long table by loops."""
    return [
        (name, state, t, b, int(slots()[t, b]), float(numbers()[q, o, t, b]))
        for q, name in enumerate(QUERIES)
        for o, state in enumerate(OBSERVED)
        for t in range(state)
        for b in range(slots().shape[1])
        if slots()[t, b] >= 0
    ]


def test_long_table_lists_every_real_number(influence: Influence) -> None:
    """The long table has all entries but padding and steps from the observed state on."""
    table = influence.to_polars()
    assert table.columns == ["query", "observed_at", "step", "slot", "sample", "influence"]
    assert sorted(table.rows()) == sorted(long_rows())


def test_parquet_holds_the_long_table(influence: Influence, tmp_path: Path) -> None:
    """The Parquet file is the long table in the same order, and no other file is left."""
    target = tmp_path / "tables" / "long.parquet"
    target.parent.mkdir()
    influence.to_parquet(target)
    assert pl.read_parquet(target).equals(influence.to_polars())
    assert [file.name for file in target.parent.iterdir()] == ["long.parquet"]


@pytest.mark.parametrize(
    "case",
    [
        (
            lambda i: i.window(3, 5),
            errors.NotObserved,
            ["State 5", "0, 3, 7, 10", "attribute again"],
        ),
        (lambda i: i.visits(0, 4, observed_at=9), errors.NotObserved, ["State 9"]),
        (lambda i: i.window(7, 3), errors.ImpossibleWindow, ["(7, 3)", "<= 11"]),
        (lambda i: i.visits(-1, 3), errors.ImpossibleWindow, ["(-1, 3)"]),
        (lambda i: i.visits(0, 12), errors.ImpossibleWindow, ["(0, 12)", "11"]),
        (lambda i: i.top(query="loss"), errors.UnknownQuery, ["'loss'", "'loss a', 'loss b'"]),
        (lambda i: i.top(query=3), errors.UnknownQuery, ["no query 3", "0 to 2"]),
        (lambda i: i.top(query=-1), errors.UnknownQuery, ["no query -1"]),
        (lambda i: i.curve(sample=9), errors.UnknownSample, ["no sample 9", "9 rows", "0 to 8"]),
        (lambda i: i.visits_curve(sample=-1), errors.UnknownSample, ["no sample -1"]),
        (
            lambda i: i.top(window=(3, 7), observed_at=10),
            errors.TwoViewpoints,
            ["window=(3, 7)", "observed_at=10", "visits(3, 7, observed_at=10)"],
        ),
    ],
)
def test_errors_say_what_is_there(influence: Influence, case: Case) -> None:
    """Every error names what was asked for, what there is, and what to do."""
    ask, error, words = case
    with pytest.raises(error) as caught:
        ask(influence)
    assert [word for word in words if word not in str(caught.value)] == []
