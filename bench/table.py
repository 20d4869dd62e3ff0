"""`whence` beside the libraries that users would pick instead, training by training: python -m bench.table [options].

Every figure is measured in a process of its own (bench.measure) and kept in a file; what is there is not measured
again. The tables and pictures are made of the files. `make bench-env` installs the other libraries into .venv-bench;
run without them, their rows say so.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from bench import render
from bench.cases import CASES, Case
from bench.measure import results
from bench.peers import METHODS, Method

LIMIT = 900  # seconds that one measurement may take


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"which of {', '.join(case.name for case in CASES)}; default all")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to see whether everything works")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--method", default="", help="only rows whose name has this in it")
    parser.add_argument("--show", action="store_true", help="measure nothing; only make the tables and pictures")
    return parser.parse_args()


def run(case: Case, what: str, *, quick: bool) -> str:
    """Measure in a new process; empty, or why it failed."""
    command = [sys.executable, "-m", "bench.measure", case.name, what, *(["--quick"] if quick else [])]
    quiet = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            command, env=os.environ | quiet, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"took more than {LIMIT} s"
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return "" if done.returncode == 0 else lines[-1]


def wanted(case: Case, method: Method, chosen: argparse.Namespace) -> bool:
    """Whether a row is still to be measured."""
    there = (results(case.name, quick=chosen.quick) / f"{method.name}.json").exists()
    possible = method.function and method.installed and not method.refusal(case)
    return bool(possible) and chosen.method in method.name and (chosen.fresh or not there)


def measure(case: Case, chosen: argparse.Namespace) -> None:
    """Everything of one case that is not there."""
    folder = results(case.name, quick=chosen.quick)
    if not (folder / "truth.json").exists() or (chosen.fresh and not chosen.method):
        tell(case, "truth", chosen=chosen, folder=folder)
    for method in METHODS:
        if wanted(case, method, chosen):
            tell(case, method.name, chosen=chosen, folder=folder)


def tell(case: Case, what: str, *, chosen: argparse.Namespace, folder: Path) -> None:
    """Measure one thing, say how long it took, and keep a failure as a result.

    Raises:
        SystemExit: the run that all methods are told of is not to be had.
    """
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    failure = run(case, what, quick=chosen.quick)
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    took = f"{time.perf_counter() - begun:6.1f} s ({used:.0f} s of a processor)"
    print(f"{case.name:14} {what:36} {took}  {failure}", flush=True)
    if failure and what == "truth":
        raise SystemExit(f"{case.name}: the run itself failed: {failure}")
    if failure:
        (folder / f"{what}.json").write_text(json.dumps({"failed": failure}, indent=1) + "\n")


def main() -> None:
    """Measure what is missing, then write and print the tables."""
    chosen = arguments()
    cases = [case.quick() if chosen.quick else case for case in CASES if case.name in (chosen.cases or [case.name])]
    missing = sorted({method.library for method in METHODS if not method.installed})
    if missing:
        print(f"not installed, so left out: {', '.join(missing)}; `make bench-env` installs them into .venv-bench")
    for case in cases:
        if not chosen.show:
            measure(case, chosen)
        folder = results(case.name, quick=chosen.quick)
        if (folder / "truth.json").exists():
            print(f"\n{render.write(case, folder)}\n", flush=True)


if __name__ == "__main__":
    main()
