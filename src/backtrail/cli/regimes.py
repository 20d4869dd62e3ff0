"""`backtrail regimes`: when data matters at all."""

from backtrail.cli import show
from backtrail.cli.arguments import Form, InfluenceFolder, RunFolder


def regimes(
    run: RunFolder,
    influence: InfluenceFolder,
    *,
    query: int | str | None = None,
    form: Form = "table",
) -> None:
    """Tell when data matters: influence ÷ learning rate by step, as a start, a basin and an end, if it has them.

    Example: backtrail regimes runs/digits runs/digits/dit

    Needs no task: of the run it reads the manifest and the step log alone.

    Args:
        run: Folder of a recorded training.
        influence: Folder written by `backtrail attribute` from this run.
        query: Which query, by number or name; by default the mean over all.
        form: How to print.

    Raises:
        OtherRun: The influence is of another run.
    """
    from backtrail.apply.select_by_regime import learning_rates
    from backtrail.errors import OtherRun
    from backtrail.influence.analysis.regimes import of_rates
    from backtrail.influence.influence import open_influence
    from backtrail.run.manifest import read_manifest
    from backtrail.run.store import Store

    found, manifest = open_influence(influence), read_manifest(run)
    if found.run != manifest.id:
        raise OtherRun(found.path, found.run, run=run, given=manifest.id)
    rates = learning_rates(manifest, Store(run, manifest).log())
    told = of_rates(found, rates, query=query)
    show.table(told.table(), form, caption=told.summary)
    show.next_command("top", influence, form=form)
