"""One measurement of bench.table, made in a process of its own.

It is a row of a table, or "truth": the recording, and the retrainings that all rows are compared
with. Costs are processor time, on one thread, in units of plain training in this same process,
before and after; each the least of a few repeats. So other work on the machine hardly counts.
Memory is the peak of the process above that of plain training in it. Fidelity is the mean over
queries of the correlation with retraining in float64, with a bootstrap interval over the removals.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import backtrail
from backtrail import stats
from bench.cases import CASES, Case, TrainedCase
from bench.memory import MIB, forget_peak, resident
from bench.peers import METHODS, Method

REPEATS, PATIENCE = 3, 3.0  # at most so often, and no repeat after so many seconds
SHARE = 20  # groups are a 20th of the samples

Found = dict[str, Any]


def home(case: str, *, quick: bool) -> Path:
    """Where a case's recording and ground truth lie."""
    return Path("runs") / ("bench-quick" if quick else "bench") / case


def results(case: str, *, quick: bool) -> Path:
    """Where a case's figures go."""
    return (Path("runs/bench-quick/results") if quick else Path("bench/results/table")) / case


def find_case(name: str, *, quick: bool) -> Case:
    """A case by its name."""
    case = next(case for case in CASES if case.name == name)
    return case.quick() if quick else case


def least(work: Callable[[], float], repeats: int = REPEATS) -> float:
    """The least time of a few repeats; fewer where one takes long."""
    begun, times = time.perf_counter(), [work()]
    while len(times) < repeats and time.perf_counter() - begun < PATIENCE:
        times.append(work())
    return min(times)


def processor_seconds(work: Callable[[], object]) -> float:
    """Processor time of one call."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def truth(case: Case, folder: Path) -> Found:
    """Record the run and train it again without single samples and without groups."""
    if (folder / "run").exists():
        rmtree(folder / "run")
    trained = TrainedCase(case, folder / "run")
    unit = least(lambda: case.train_plainly(trained.train))
    recording = case.record(trained.train, folder / "run")
    verified = trained.run.verify()
    draw = np.random.default_rng(0)
    ones = draw.choice(len(trained.train), case.removals, replace=False)
    size = max(1, len(trained.train) // SHARE)
    groups = np.stack(
        [draw.choice(len(trained.train), size, replace=False) for _ in range(case.groups)]
    )
    queries = backtrail.Loss(trained.queries(case.queries))
    begun = time.process_time()
    alone = backtrail.leave_one_out(trained.run, queries, samples=ones.tolist())
    together = backtrail.retrain(trained.run, queries, groups.tolist())
    spent = time.process_time() - begun
    np.savez(
        folder / "truth.npz", ones=ones, alone=alone, groups=groups, together=together.change[:, 0]
    )
    return {
        "about": case.about,
        "data": trained.split[2],
        "samples": len(trained.train),
        "steps": trained.run.steps,
        "parameters": sum(p.numel() for p in trained.trained.parameters()),
        "queries": case.queries,
        "removals": case.removals,
        "groups": case.groups,
        "threads": torch.get_num_threads(),
        "training_s": unit,
        "without_loader": least(lambda: case.train_ready(trained.train)) / unit,
        "recording": recording / unit,
        "retraining": spent / unit / (case.removals + case.groups),
        "replay_difference": verified.difference,
        "mean_loss": float(together.base.mean()),
        "noise": float(together.noise.max()),
    }


def measured(case: Case, method: Method, folder: Path) -> Found:
    """Cost, memory and fidelity of one method on one case."""
    trained, score = TrainedCase(case, folder / "run"), method.load()
    assert trained.checkpoints  # read from the recording before the clock runs
    scores = np.zeros(0)
    forget_peak()
    unit, base = least(lambda: case.train_plainly(trained.train)), resident("VmHWM")
    figures: Found = {"cost": {}, "memory_mib": {}}
    for count in method.asked(case):
        asked, found = trained.queries(count), []
        forget_peak()
        spent = least(lambda: processor_seconds(lambda: found.append(score(trained, asked))))  # noqa: B023
        figures["cost"][count] = spent
        figures["memory_mib"][count] = round(max(0.0, (resident("VmHWM") - base) / MIB), 1)
        scores = found[0] if count == case.queries else scores
    unit = min(unit, least(lambda: case.train_plainly(trained.train)))
    figures["cost"] = {count: round(spent / unit, 3) for count, spent in figures["cost"].items()}
    np.save(folder / f"{method.name}.npy", scores)
    return {"training_s": unit, **figures, "note": method.note(case), **fidelity(scores, folder)}


def fidelity(scores: np.ndarray, folder: Path) -> Found:
    """Agreement with the retrainings; nothing where a score is no number."""
    if not np.isfinite(scores).all():
        return {"not_numbers": int((~np.isfinite(scores)).sum())}
    with np.load(folder / "truth.npz") as file:
        ones, alone, groups, together = (
            file[name] for name in ("ones", "alone", "groups", "together")
        )
    predicted = scores[:, ones].astype(np.float64)
    summed = stats.group_sums(scores.astype(np.float64), list(groups))
    return {
        "spearman": asdict_of(stats.bootstrap(stats.spearman, predicted, alone)),
        "pearson": asdict_of(stats.bootstrap(stats.pearson, predicted, alone)),
        "lds": asdict_of(stats.bootstrap(stats.spearman, summed, together)),
    }


def asdict_of(interval: stats.Interval) -> dict[str, float]:
    """As JSON has it."""
    return {name: round(value, 4) for name, value in asdict(interval).items()}


def measure(name: str, what: str, *, quick: bool) -> float:
    """Write the figures of one row of a case, or its truth, to a file; return processor seconds."""
    torch.set_num_threads(1)
    case, folder, out = (
        find_case(name, quick=quick),
        home(name, quick=quick),
        results(name, quick=quick),
    )
    for place in (folder, out):
        place.mkdir(parents=True, exist_ok=True)
    # Second derivatives and vmap need attention written out; every method gets the same.
    with sdpa_kernel(SDPBackend.MATH):
        if what == "truth":
            found = truth(case, folder)
        else:
            found = measured(
                case, next(method for method in METHODS if method.name == what), folder
            )
    (out / f"{what}.json").write_text(json.dumps(found, indent=1) + "\n")
    return time.process_time()
