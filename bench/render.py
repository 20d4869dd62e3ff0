"""The tables and pictures of bench.table, made of the files that its measurements left."""

import json
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.peers import METHODS, Method

Found = dict[str, Any]
IMAGES = Path("docs/images")
FIGURES = "spearman", "pearson", "lds"


def write(case: Case, folder: Path) -> str:
    """Write a case's table beside its figures, and its picture; the table."""
    text = table(case, folder)
    (folder / "table.md").write_text(text + "\n")
    quick = folder.parts[0] == "runs"
    picture(case, folder, (folder if quick else IMAGES) / f"bench-{case.name}.png")
    return text


def read(path: Path) -> Found:
    """One file of figures; empty if it is not there."""
    found: Found = json.loads(path.read_text()) if path.exists() else {}
    return found


def table(case: Case, folder: Path) -> str:
    """A case as markdown: what it is, and a row per method."""
    about = read(folder / "truth.json")
    counts = sorted(
        {count for method in METHODS for count in costs(read(folder / f"{method.name}.json"))}
    )
    # The first measurements did not time a training without a loader.
    loader = ""
    if "without_loader" in about:
        loader = f"the same without a loader {about['without_loader']:.2f} x, "
    lines = [
        f"**{case.name}**: {about['about']}; {about['data']}, {about['samples']} samples, "
        f"{about['steps']} steps of {case.slots}, {about['parameters']:,} parameters; "
        f"{about['queries']} queries, {about['removals']} single removals, "
        f"{about['groups']} groups of 5 %. Plain training {about['training_s']:.2f} s on "
        f"{about['threads']} thread; {loader}recording {about['recording']:.2f} x, each retraining "
        f"for the ground truth {about['retraining']:.2f} x of that.",
        "",
        f"| method | cost ÷ training: {' / '.join(map(str, counts))} queries | "
        "memory MiB: the same | Spearman [95 %] | Pearson | LDS | |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(
        lines + [row(case, method, folder=folder, counts=counts) for method in METHODS]
    )


def costs(found: Found) -> dict[int, float]:
    """Cost by number of queries."""
    return {int(count): cost for count, cost in found.get("cost", {}).items()}


def row(case: Case, method: Method, *, folder: Path, counts: list[int]) -> str:
    """One method's row; an empty one with the reason where there are no figures."""
    found = read(folder / f"{method.name}.json")
    if "cost" not in found:
        install = "" if method.installed else "not installed: make bench-env"
        reason = method.refusal(case) or found.get("failed") or install or "not measured"
        return f"| {method.label} | | | | | | {reason.replace('|', '/')} |"
    cost = " / ".join(short(found["cost"].get(str(count))) for count in counts)
    memory = " / ".join(short(found["memory_mib"].get(str(count))) for count in counts)
    note = found["note"]
    if "not_numbers" in found:
        note = "; ".join(filter(None, (f"{found['not_numbers']} scores are not finite", note)))
    figures = " | ".join(told(found.get(name)) for name in FIGURES)
    return f"| {method.label} | {cost} | {memory} | {figures} | {note} |"


def short(number: float | None) -> str:
    """Two digits, or a dash."""
    return "-" if number is None else f"{number:.1f}" if number < 10 else f"{number:.0f}"


def told(interval: dict[str, float] | None) -> str:
    """An estimate with its interval."""
    return "{estimate:.2f} [{low:.2f}, {high:.2f}]".format(**interval) if interval else "-"


def picture(case: Case, folder: Path, path: Path) -> None:
    """Fidelity against the cost of all queries; numbers stand for methods."""
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter  # noqa: PLC0415

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = [(method, read(folder / f"{method.name}.json")) for method in METHODS]
    for number, (method, found) in enumerate([row for row in rows if "spearman" in row[1]], 1):
        place = costs(found)[case.queries], found["spearman"]["estimate"]
        low, high = (abs(place[1] - found["spearman"][end]) for end in ("low", "high"))
        mark, color = ("o", "tab:blue") if method.library == "backtrail" else ("s", "tab:gray")
        label = f"{number}  {method.label}"
        axes.errorbar(
            *place, yerr=[[low], [high]], fmt=mark, color=color, elinewidth=0.7, label=label
        )
        axes.annotate(str(number), place, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set(
        xscale="log", xlabel=f"cost of {case.queries} queries ÷ plain training", title=case.about
    )
    axes.set_ylabel("Spearman with leave-one-out")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axhline(0, color="lightgray", linewidth=0.7, zorder=0)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
