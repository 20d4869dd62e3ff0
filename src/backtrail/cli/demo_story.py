"""The steps of `backtrail demo`: record, verify, attribute, look at the result, check it."""

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


def run_demo(folder: Path) -> None:
    """Run the demo in an empty folder, and print every step."""
    run = _train(folder)
    _verify(run)
    influence = _attribute(run, folder / "influence")
    _show_harmful(run, influence)
    _show_patterns(influence)
    statement = _check(run, influence)
    draw(folder / "plots", influence, statement.removal)
    _suggest_commands(folder, influence)


def _train(folder: Path) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(demo_task.__file__, folder / "task.py")
    learner = demo_task.task()
    tested = len(digits().test)
    show.heading("1. The training")
    show.paragraph(
        f"{TRAINING} real handwritten digits; {WRONG} of them have a wrong label, on purpose. "
        f"A small network (64-128-128-10, GELU) is trained on them for {EPOCHS} epochs with "
        "AdamW, while backtrail records the training."
    )
    demo_task.fit(learner, folder / "run")
    run = backtrail.open_run(folder / "run", learner)
    show.finding(f"accuracy on {tested} test digits: {accuracy(learner):.1%}")
    show.paragraph("A good model in spite of the wrong labels. Which samples made it worse?")
    _show_overhead(overhead(run.steps))
    return run


def _show_overhead(measured: Overhead) -> None:
    plain = 1e3 * measured.plain / measured.steps
    recorded = 1e3 * measured.recorded / measured.steps
    show.finding(
        f"recording: {recorded:.2f} ms per step with it, {plain:.2f} ms without "
        f"(+{recorded / plain - 1:.0%})"
    )
    weights = "the same weights, bit for bit"
    if not measured.identical:
        weights = "DIFFERENT weights, which is a bug"
    show.paragraph(
        f"Medians of {measured.repeats} trainings each. Steps this short are the worst case: the "
        f"longer a step, the smaller the share. Both trainings end in {weights}."
    )


def _verify(run: Run) -> None:
    show.heading("2. The recording")
    show.finding(f"replay: {run.verify()}")
    show.paragraph(
        "The training was replayed from the files and reached every recorded state, so it can be "
        "analysed at any later time."
    )


def _attribute(run: Run, folder: Path) -> Influence:
    show.heading("3. Which samples hurt?")
    show.paragraph(
        f"Influence is the change of the mean loss on {VALIDATION} validation digits when a sample "
        "is left out of the training: negative = harmful."
    )
    start = perf_counter()
    influence = backtrail.DIT().attribute(
        run, demo_task.queries(), observed_at="epochs", out=folder
    )
    seconds = perf_counter() - start
    show.finding(
        f"{TRAINING} samples x {run.steps} steps x {EPOCHS} windows: one sweep, {seconds:.1f} s"
    )
    return influence


def _show_harmful(run: Run, influence: Influence) -> None:
    test_loss, table = rankings(run, influence)
    show.say()
    show.table(table, indent=3)
    show.say()
    by_influence, _, by_loss, *_ = table["wrong labels among them"]
    show.paragraph(
        f"The test loss was {test_loss:.4f}, on digits that neither the training nor the query has "
        f"seen. The training loss, the usual way to look for wrong labels, finds {by_loss} of "
        f"them; influence finds {by_influence}. But influence measures harm, not wrong labels: "
        "compare the last column. It also shows which query a sample hurt, and when, which the "
        "loss cannot. Influence on the last epoch alone misses most of the harm, which is done "
        "over the whole training."
    )
    show.say()
    show.table(most_harmful(influence), indent=3)
    show.say()
    show.paragraph("The ten most harmful samples, and the epoch in which each did most harm.")


def _show_patterns(influence: Influence) -> None:
    show.heading("4. When does a sample matter?")
    show.table(counts(backtrail.patterns(influence)), indent=3)
    show.say()
    show.paragraph(
        "Early = mostly in the first third of the training, late = mostly in the last, stable = "
        "throughout, fluctuating = of changing sign or in bursts; largest = the sample of that "
        "pattern with the largest influence. Here the learning rate falls to a tenth, so most "
        "influence is early."
    )
    show.finding(
        "Kendall's tau between the rankings of the first epoch and of the last: "
        f"{early_late(influence):+.2f}"
    )
    show.paragraph(
        "1 = the same order, 0 = unrelated. One number per sample for the whole training hides "
        "this."
    )


def _check(run: Run, influence: Influence) -> Trust:
    show.heading("5. How certain is this?")
    statement = trust(run, influence)
    for line in str(statement).splitlines():
        # The statement is aligned in columns; here it is wrapped again.
        show.finding(" ".join(line.split()))
    show.say()
    show.paragraph(
        "Replay: do the files reproduce the training? Derivative: is the sweep computed correctly? "
        "Removal: random samples are left out, each in a training of its own; does the query "
        "change as predicted? In brackets: 95 % intervals."
    )
    return statement


def _suggest_commands(folder: Path, influence: Influence) -> None:
    show.heading("6. What to try next")
    show.paragraph(f"In {folder}: task.py (the training), run, influence, plots. Try:")
    run = folder / "run"
    results = folder / "influence"
    task = f"{folder / 'task.py'}:task"
    queries = f"{folder / 'task.py'}:queries"
    most_harmful_sample = influence.top(1)["sample"][0]
    show.say()
    commands: list[tuple[object, ...]] = [
        ("info", run),
        ("top", results, "--order", "helpful"),
        ("curve", results, "--sample", most_harmful_sample),
        ("patterns", results, "--form", "json"),
        ("trust", run, results, "--task", task, "--queries", queries, "--removals", 100),
    ]
    for words in commands:
        show.say(f"   {show.command(*words)}")
    show.next_command("verify", run, "--task", task)
