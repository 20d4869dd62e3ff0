"""`backtrail regimes`: when data matters."""

from backtrail.cli import show
from backtrail.cli.arguments import Form, InfluenceFolder, RunFolder


def regimes(
    run: RunFolder,
    influence: InfluenceFolder,
    *,
    query: int | str | None = None,
    form: Form = "table",
) -> None:
    """Show when data matters: influence ÷ learning rate by step, as a start, a basin and an end.

    Example: backtrail regimes runs/digits runs/digits/dit

    Says so if the training has no such regimes. Needs no task: of the run, only the manifest and
    the step log are read.

    Args:
        run: Folder of a recorded training.
        influence: Folder written by `backtrail attribute` from this run.
        query: Index or name of the query; by default the mean over all.
        form: Output format.

    Raises:
        OtherRun: The influence was computed from another run.
    """
    from backtrail.apply.select_by_regime import learning_rates
    from backtrail.errors import OtherRun
    from backtrail.influence.analysis.regimes import regimes_from_rates
    from backtrail.influence.influence import open_influence
    from backtrail.run.manifest import read_manifest
    from backtrail.run.store import Store

    opened = open_influence(influence)
    manifest = read_manifest(run)
    if opened.run != manifest.id:
        raise OtherRun(opened.path, opened.run, run=run, given=manifest.id)
    rates = learning_rates(manifest, Store(run, manifest).log())
    found = regimes_from_rates(opened, rates, query=query)
    show.table(found.table(), form, caption=found.summary)
    show.next_command("top", influence, form=form)
