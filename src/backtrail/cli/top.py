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
    """List the training samples with the most influence on a query.

    Example: backtrail top runs/digits/dit --k 20 --order helpful --window 0 200

    Args:
        influence: Folder written by `backtrail attribute`.
        k: Number of samples.
        query: Index or name of the query.
        order: Most negative, most positive, or largest absolute influence first.
        window: Rank by the influence on the change of the query between two observed states (or 0).
        form: Output format.
    """
    from backtrail.influence.influence import open_influence

    opened = open_influence(influence)
    table = opened.top(k, query=query, order=order, window=window)
    a, b = window or (0, opened.observed_at[-1])
    name = query if isinstance(query, str) else opened.queries[query]
    caption = f"{name}, states {a} to {b}\ninfluence ({opened.unit}) = {opened.sign}"
    show.table(table, form, caption=caption)
    sample = table["sample"][0] if len(table) else 0
    words: list[object] = ["curve", influence, "--sample", sample]
    if query:  # 0 is the default
        words += ["--query", query]
    show.next_command(*words, form=form)
