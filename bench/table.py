"""`backtrail` beside other libraries, training by training: python -m bench.table [options].

Every row is measured in a process of its own (bench.measure) and kept in a file; what is there is
not measured again. The tables and pictures are made of the files. `make bench-env` installs the
other libraries into .venv-bench; run without them, their rows say so.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from bench import render
from bench.cases import CASES, Case
from bench.measure import measure, results
from bench.peers import METHODS, Method

QUIET = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.table", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "cases", nargs="*", help=f"which of {', '.join(case.name for case in CASES)}; default all"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny settings, to see whether everything works"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--method", default="", help="only rows whose name has this in it")
    parser.add_argument(
        "--jobs", type=int, default=2, help="measurements at a time, each on one thread; default 2"
    )
    parser.add_argument(
        "--show", action="store_true", help="measure nothing; only make the tables and pictures"
    )
    return parser.parse_args()


def wanted(case: Case, method: Method, chosen: argparse.Namespace) -> bool:
    """Whether a row is still to be measured; what failed is tried again."""
    there = "cost" in render.read(results(case.name, quick=chosen.quick) / f"{method.name}.json")
    possible = method.function and method.installed and not method.refusal(case)
    return bool(possible) and chosen.method in method.name and (chosen.fresh or not there)


def processes(jobs: int) -> ProcessPoolExecutor:
    """A new process per measurement, forked from one that has done the imports and nothing else."""
    os.environ.update(QUIET)
    context = get_context("forkserver")
    context.set_forkserver_preload(["bench.measure"])
    return ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1)


def fill(case: Case, chosen: argparse.Namespace) -> None:
    """Measure everything of one case that is not there."""
    folder = results(case.name, quick=chosen.quick)
    if not (folder / "truth.json").exists() or (chosen.fresh and not chosen.method):
        measure_each(case, ["truth"], chosen=chosen, folder=folder)
    measure_each(
        case,
        [row.name for row in METHODS if wanted(case, row, chosen)],
        chosen=chosen,
        folder=folder,
    )


def measure_each(
    case: Case, rows: Sequence[str], *, chosen: argparse.Namespace, folder: Path
) -> None:
    """Measure some rows, saying how long each took."""
    begun = time.perf_counter()
    with processes(chosen.jobs) as pool:
        futures = {pool.submit(measure, case.name, row, quick=chosen.quick): row for row in rows}
        for future in as_completed(futures):
            outcome = keep(future, folder / f"{futures[future]}.json")
            seconds = time.perf_counter() - begun
            print(f"{seconds:6.0f} s  {case.name:14} {futures[future]:36} {outcome}", flush=True)


def keep(future: "Future[float]", path: Path) -> str:
    """How a measurement went; a refusal is a result, a process that was killed is none."""
    error = future.exception()
    if error is None:
        return f"{future.result():.0f} s of a processor"
    told = f"{type(error).__name__}: {error}".splitlines()[0]
    if path.stem == "truth":
        raise error
    if not isinstance(error, BrokenProcessPool):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"failed": told}, indent=1) + "\n")
    return told


def main() -> None:
    """Measure what is missing, then write and print the tables."""
    chosen = arguments()
    cases = [
        case.quick() if chosen.quick else case
        for case in CASES
        if case.name in (chosen.cases or [case.name])
    ]
    missing = sorted({method.library for method in METHODS if not method.installed})
    if missing:
        print(
            f"not installed, so left out: {', '.join(missing)}; "
            "`make bench-env` installs them into .venv-bench"
        )
    for case in cases:
        if not chosen.show:
            fill(case, chosen)
        folder = results(case.name, quick=chosen.quick)
        if (folder / "truth.json").exists():
            print(f"\n{render.write(case, folder)}\n", flush=True)


if __name__ == "__main__":
    main()
