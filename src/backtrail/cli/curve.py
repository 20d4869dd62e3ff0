"""`backtrail curve`: the influence of one sample over time."""

from backtrail.cli import show
from backtrail.cli.arguments import Form, InfluenceFolder


def curve(
    influence: InfluenceFolder, *, sample: int, query: int | str = 0, form: Form = "table"
) -> None:
    """Follow one training sample: its total influence on a query at every observed state.

    Example: backtrail curve runs/digits/dit --sample 12

    Args:
        influence: Folder written by `backtrail attribute`.
        sample: Row of the training set.
        query: Which query, by number or name.
        form: How to print.
    """
    from backtrail.influence.influence import open_influence

    found = open_influence(influence)
    table = found.curve(sample=sample, query=query)
    name = query if isinstance(query, str) else found.queries[query]
    show.table(
        table, form, caption=f"sample {sample} on {name}\ninfluence ({found.unit}) = {found.sign}"
    )
    show.next_command("patterns", influence, form=form)
