"""`whence curve`: the influence of one sample over time."""

from whence.cli import show
from whence.cli.arguments import Form, InfluenceFolder


def curve(influence: InfluenceFolder, *, sample: int, query: int | str = 0, form: Form = "table") -> None:
    """Follow one training sample: its total influence on a query at every observed state.

    Example: whence curve runs/digits/dit --sample 12

    Args:
        influence: Folder written by `whence attribute`.
        sample: Row of the training set.
        query: Which query, by number or name.
        form: How to print.
    """
    from whence.influence.influence import open_influence

    found = open_influence(influence)
    table = found.curve(sample=sample, query=query)
    name = query if isinstance(query, str) else found.queries[query]
    show.table(table, form, caption=f"sample {sample} on {name}\ninfluence ({found.unit}) = {found.sign}")
    show.next_command("patterns", influence, form=form)
