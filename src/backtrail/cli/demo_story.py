"""What `backtrail demo` tells, in the order of a first use: record, verify, attribute, look, check."""

import shutil
from pathlib import Path
from time import perf_counter

import backtrail
from backtrail.apply.trust import Trust, trust
from backtrail.cli import demo_task, show
from backtrail.cli.demo_measure import (
    Overhead,
    accuracy,
    early_late,
    most_harmful,
    overhead,
    rankings,
)
from backtrail.cli.demo_plots import draw
from backtrail.cli.demo_task import EPOCHS, TRAINING, VALIDATION, WRONG, digits
from backtrail.cli.patterns import counts
from backtrail.influence.influence import Influence
from backtrail.run.run import Run


def tell(folder: Path) -> None:
    """Do everything, into an empty folder, and tell it."""
    run = _train(folder)
    _verify(run)
    influence = _attribute(run, folder / "influence")
    _who(run, influence)
    _when(influence)
    statement = _believe(run, influence)
    draw(folder / "plots", influence, statement.removal)
    _next(folder, influence)


def _train(folder: Path) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(demo_task.__file__, folder / "task.py")
    learner, tested = demo_task.task(), len(digits().test)
    show.heading("1. The training")
    show.paragraph(
        f"{TRAINING} real handwritten digits; {WRONG} of them have a wrong label, on purpose. A small network "
        f"(64-128-128-10, GELU) learns them for {EPOCHS} epochs with AdamW, while backtrail records beside the loop."
    )
    demo_task.fit(learner, folder / "run")
    run = backtrail.open_run(folder / "run", learner)
    show.finding(f"accuracy on {tested} test digits: {accuracy(learner):.1%}")
    show.paragraph("A good model, in spite of the wrong labels. Who held it back?")
    _cost(overhead(run.steps))
    return run


def _cost(found: Overhead) -> None:
    plain, recorded = (1e3 * seconds / found.steps for seconds in (found.plain, found.recorded))
    show.finding(
        f"recording: {recorded:.2f} ms a step with it, {plain:.2f} ms without (+{recorded / plain - 1:.0%})"
    )
    weights = (
        "the same weights, bit for bit"
        if found.identical
        else "DIFFERENT weights, which should not be"
    )
    show.paragraph(
        f"Medians of {found.repeats} trainings each. Steps this short are the worst case: the share falls as steps get "
        f"longer. Both ways the training ends in {weights}."
    )


def _verify(run: Run) -> None:
    show.heading("2. The recording")
    show.finding(f"replay: {run.verify()}")
    show.paragraph(
        "The training was run again from the files and met every recorded state, so that any question can be put to it "
        "afterwards."
    )


def _attribute(run: Run, folder: Path) -> Influence:
    show.heading("3. Who did harm?")
    show.paragraph(
        f"Influence is what the mean loss on {VALIDATION} validation digits gains when a sample is left out of the "
        "training: negative = harmful."
    )
    start = perf_counter()
    influence = backtrail.DIT().attribute(
        run, demo_task.queries(), observed_at="epochs", out=folder
    )
    show.finding(
        f"{TRAINING} samples x {run.steps} steps x {EPOCHS} windows: one sweep, {perf_counter() - start:.1f} s"
    )
    return influence


def _who(run: Run, influence: Influence) -> None:
    before, table = rankings(run, influence)
    show.say()
    show.table(table, indent=3)
    show.say()
    by_influence, _, by_loss, *_ = table["wrong labels among them"]
    show.paragraph(
        f"The test loss was {before:.4f}, on digits that neither the training nor the query has seen. Plain loss, the "
        f"obvious way to look for wrong labels, finds {by_loss} of them, influence {by_influence}. But influence looks "
        "for harm, not for labels: the last column is its measure. And it can say whom a sample harmed, and when; loss "
        "cannot. The last epoch alone is a poor witness: harm is done all along the way."
    )
    show.say()
    show.table(most_harmful(influence), indent=3)
    show.say()
    show.paragraph("The ten most harmful samples, and the epoch in which each did most harm.")


def _when(influence: Influence) -> None:
    show.heading("4. When does a sample matter?")
    show.table(counts(backtrail.patterns(influence)), indent=3)
    show.say()
    show.paragraph(
        "Early = mostly in the first third of the training, late = in the last, stable = all along, fluctuating = now "
        "for better and now for worse; largest = the sample of that kind that moved the query most. Here the learning "
        "rate falls to a tenth, and most is settled early."
    )
    show.finding(
        f"Kendall's tau between the first epoch's ranking and the last one's: {early_late(influence):+.2f}"
    )
    show.paragraph(
        "1 = the same order, 0 = unrelated. One number a sample for a whole training hides this."
    )


def _believe(run: Run, influence: Influence) -> Trust:
    show.heading("5. Can this be believed?")
    statement = trust(run, influence)
    for line in str(statement).splitlines():
        show.finding(" ".join(line.split()))
    show.say()
    show.paragraph(
        "Replay: do the files explain the training? Derivative: is the arithmetic of the sweep right? Removal: samples "
        "drawn at random are really left out, each in a training of its own; does the query change as predicted? In "
        "brackets the 95 % intervals."
    )
    return statement


def _next(folder: Path, influence: Influence) -> None:
    show.heading("6. Your turn")
    show.paragraph(f"In {folder}: task.py (the training), run, influence, plots. Try:")
    run, found = folder / "run", folder / "influence"
    task, queries = (f"{folder / 'task.py'}:{name}" for name in ("task", "queries"))
    show.say()
    for words in (
        ("info", run),
        ("top", found, "--order", "helpful"),
        ("curve", found, "--sample", influence.top(1)["sample"][0]),
        ("patterns", found, "--form", "json"),
        ("trust", run, found, "--task", task, "--queries", queries, "--removals", 100),
    ):
        show.say(f"   {show.command(*words)}")
    show.next_command("verify", run, "--task", task)
