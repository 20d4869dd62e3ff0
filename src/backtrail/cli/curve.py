"""`backtrail curve`: the influence of one sample over time."""

from backtrail.cli import show
from backtrail.cli.arguments import Form, InfluenceFolder


def curve(
    influence: InfluenceFolder, *, sample: int, query: int | str = 0, form: Form = "table"
) -> None:
    """Show the total influence of one training sample on a query, at every observed state.

    Example: backtrail curve runs/digits/dit --sample 12

    Args:
        influence: Folder written by `backtrail attribute`.
        sample: Row of the training set.
        query: Index or name of the query.
        form: Output format.
    """
    from backtrail.influence.influence import open_influence

    opened = open_influence(influence)
    table = opened.curve(sample=sample, query=query)
    name = query if isinstance(query, str) else opened.queries[query]
    caption = f"sample {sample} on {name}\ninfluence ({opened.unit}) = {opened.sign}"
    show.table(table, form, caption=caption)
    show.next_command("patterns", influence, form=form)
