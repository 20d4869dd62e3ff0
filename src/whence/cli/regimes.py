"""`whence regimes`: when data matters at all."""

from whence.cli import show
from whence.cli.arguments import Form, InfluenceFolder, RunFolder


def regimes(
    run: RunFolder, influence: InfluenceFolder, *, query: int | str | None = None, form: Form = "table"
) -> None:
    """Tell when data matters: influence ÷ learning rate by step, as a start, a basin and an end, if it has them.

    Example: whence regimes runs/digits runs/digits/dit

    Needs no task: of the run it reads the manifest and the step log alone.

    Args:
        run: Folder of a recorded training.
        influence: Folder written by `whence attribute` from this run.
        query: Which query, by number or name; by default the mean over all.
        form: How to print.

    Raises:
        OtherRun: The influence is of another run.
    """
    from whence.apply.timing import learning_rates
    from whence.errors import OtherRun
    from whence.influence.influence import open_influence
    from whence.influence.regimes import of_rates
    from whence.run.manifest import read_manifest
    from whence.run.store import Store

    found, manifest = open_influence(influence), read_manifest(run)
    if found.run != manifest.id:
        raise OtherRun(found.path, found.run, run=run, given=manifest.id)
    rates = learning_rates(manifest, Store(run, manifest).log())
    told = of_rates(found, rates, query=query)
    show.table(told.table(), form, caption=told.summary)
    show.next_command("top", influence, form=form)
