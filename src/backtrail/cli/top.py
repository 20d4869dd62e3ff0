"""`backtrail top`: the most influential samples."""

from typing import Literal

from backtrail.cli import show
from backtrail.cli.arguments import Form, InfluenceFolder, Window


def top(
    influence: InfluenceFolder,
    *,
    k: int = 10,
    query: int | str = 0,
    order: Literal["harmful", "helpful", "absolute"] = "harmful",
    window: Window = None,
    form: Form = "table",
) -> None:
    """List the training samples that moved a query most.

    Example: backtrail top runs/digits/dit --k 20 --order helpful --window 0 200

    Args:
        influence: Folder written by `backtrail attribute`.
        k: How many samples.
        query: Which query, by number or name.
        order: Most negative, most positive, or largest first.
        window: Count what a sample did to the change of the query between two observed states (or
            0).
        form: How to print.
    """
    from backtrail.influence.influence import open_influence

    found = open_influence(influence)
    table = found.top(k, query=query, order=order, window=window)
    a, b = window or (0, found.observed_at[-1])
    name = query if isinstance(query, str) else found.queries[query]
    show.table(
        table, form, caption=f"{name}, states {a} to {b}\ninfluence ({found.unit}) = {found.sign}"
    )
    sample = table["sample"][0] if len(table) else 0
    show.next_command(
        "curve", influence, "--sample", sample, *(("--query", query) if query else ()), form=form
    )
