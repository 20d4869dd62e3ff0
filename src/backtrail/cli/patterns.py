"""`backtrail patterns`: when samples matter."""

from typing import TYPE_CHECKING

from backtrail.cli import show
from backtrail.cli.arguments import Form, InfluenceFolder

if TYPE_CHECKING:
    import polars as pl


def patterns(influence: InfluenceFolder, *, query: int | str = 0, form: Form = "table") -> None:
    """Count the samples that matter early, late, all along (stable), or now one way and now the other (fluctuating).

    Example: backtrail patterns runs/digits/dit --form csv

    Needs at least three windows between observed states: attribute with --observed-at epochs.

    Args:
        influence: Folder written by `backtrail attribute`.
        query: Which query, by number or name.
        form: How to print.
    """
    from backtrail.influence.analysis import patterns as rule
    from backtrail.influence.influence import open_influence

    found = open_influence(influence)
    show.table(counts(rule.patterns(found, query=query)), form)
    files = ("--task", "FILE.py:task", "--queries", "FILE.py:queries")
    show.next_command("trust", "RUN", influence, *files, form=form)


def counts(table: "pl.DataFrame") -> "pl.DataFrame":
    """Number and share of the samples of each pattern, and the sample with the largest total influence in it."""
    import polars as pl

    from backtrail.influence.analysis.patterns import PATTERNS

    largest = pl.col("sample").sort_by(pl.col("total").abs()).last().alias("largest")
    found = table.group_by("pattern").agg(pl.len().alias("samples"), largest)
    every = pl.DataFrame({"pattern": PATTERNS}).join(
        found, on="pattern", how="left", maintain_order="left"
    )
    samples = pl.col("samples").fill_null(0)
    return every.select(
        "pattern", samples, (samples / max(len(table), 1)).alias("share"), "largest"
    )
