"""`backtrail patterns`: when samples matter."""

from typing import TYPE_CHECKING

from backtrail.cli import show
from backtrail.cli.arguments import Form, InfluenceFolder

if TYPE_CHECKING:
    import polars as pl


def patterns(influence: InfluenceFolder, *, query: int | str = 0, form: Form = "table") -> None:
    """Count the samples whose influence is early, late, stable or fluctuating over the training.

    Example: backtrail patterns runs/digits/dit --form csv

    Needs at least three windows between observed states: attribute with --observed-at epochs.

    Args:
        influence: Folder written by `backtrail attribute`.
        query: Index or name of the query.
        form: Output format.
    """
    from backtrail.influence.analysis.patterns import patterns as find_patterns
    from backtrail.influence.influence import open_influence

    table = find_patterns(open_influence(influence), query=query)
    show.table(counts(table), form)
    references = ("--task", "FILE.py:task", "--queries", "FILE.py:queries")
    show.next_command("trust", "RUN", influence, *references, form=form)


def counts(table: "pl.DataFrame") -> "pl.DataFrame":
    """One row per pattern: pattern, samples, share, largest.

    `largest` is the sample with the largest absolute total influence among those of the pattern.

    Args:
        table: A table of `backtrail.patterns`.
    """
    import polars as pl

    from backtrail.influence.analysis.patterns import PATTERNS

    largest = pl.col("sample").sort_by(pl.col("total").abs()).last().alias("largest")
    per_pattern = table.group_by("pattern").agg(pl.len().alias("samples"), largest)
    # A pattern that no sample has gets a row, too.
    every_pattern = pl.DataFrame({"pattern": PATTERNS})
    joined = every_pattern.join(per_pattern, on="pattern", how="left", maintain_order="left")
    samples = pl.col("samples").fill_null(0)
    share = (samples / max(len(table), 1)).alias("share")
    return joined.select("pattern", samples, share, "largest")
