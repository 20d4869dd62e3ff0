"""What a compiled sweep costs, in units of plain training: python -m bench.compiled [chunk].

The GPT of bench.sweep, 16 queries, so many pulled at once (8 by default). The cost of a step is the difference of two
sweeps of different length, so what is paid once, compilation above all, is told apart.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import whence
from bench.sweep import plain, seconds, swept_run

SHORT, LONG, QUERIES = 4, 16, 16


def main() -> None:
    """Print the table."""
    chunk = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    runs = {steps: swept_run(Path(tempfile.mkdtemp()) / "run", steps) for steps in (SHORT, LONG)}
    asked = {steps: whence.Loss(run.task.data, samples=range(QUERIES)) for steps, run in runs.items()}
    print(f"policy        compiled  {QUERIES} queries  once, s   (queries in plain trainings)")
    for policy in (whence.Hessian(), whence.GaussNewton()):
        for compiled in ("never", "always"):
            attribute = whence.DIT(curvature=policy, compiled=compiled, chunk=chunk).attribute
            unit = min(plain(LONG) for _ in range(3)) / LONG
            times = {steps: seconds(partial(attribute, run, asked[steps])) for steps, run in runs.items()}
            again = {steps: min(times[steps], seconds(partial(attribute, runs[steps], asked[steps]))) for steps in runs}
            unit = min(unit, min(plain(LONG) for _ in range(3)) / LONG)
            step = (again[LONG] - again[SHORT]) / (LONG - SHORT)
            once = times[SHORT] - SHORT * step
            print(f"{type(policy).__name__:13} {compiled:8} {step / unit:10.1f} {once:9.0f}", flush=True)


if __name__ == "__main__":
    main()
