"""What a compiled sweep costs, in units of plain training: python -m bench.compiled [chunk].

The GPT of bench.sweep, 16 queries, so many pulled at once by a program (8 by default). The first step, which makes the
programs, is told apart; between any two of the others, steps of plain training are taken.
"""

import sys
import tempfile
import time
from pathlib import Path

import whence
from bench.beats import Beats, after_each
from bench.sweep import BEATS, stepping, swept_run
from whence.replay import reverse

QUERIES = 16


class Later(Beats):
    """Begins with the first call, and tells what was before it."""

    once: float | None = None

    def __call__(self) -> None:
        """Take some steps, after the first call."""
        if self.once is None:
            self.once, self._begun = self._clock() - self._begun, self._clock()
        else:
            super().__call__()


def measured(run: whence.Run, dit: whence.DIT) -> tuple[float, float]:
    """A sweep for all queries in plain trainings, and the seconds of its first step."""
    queries = whence.Loss(run.task.data, samples=range(QUERIES))
    beats = Later(stepping(), clock=time.perf_counter, each=BEATS)
    with after_each(reverse, "pull_back", beats):
        dit.attribute(run, queries)
    assert beats.once is not None
    return beats.ratio(run.steps - 1), beats.once


def main() -> None:
    """Print the table."""
    chunk = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    run = swept_run(Path(tempfile.mkdtemp()) / "run")
    print(f"policy        compiled  {QUERIES} queries  first step, s   (queries in plain trainings)")
    for policy in (whence.Hessian(), whence.GaussNewton()):
        for dit in (whence.DIT(curvature=policy), whence.DIT(curvature=policy, compiled="always", chunk=chunk)):
            ratio, once = measured(run, dit)
            print(f"{type(policy).__name__:13} {dit.compiled:8} {ratio:10.1f} {once:14.1f}", flush=True)


if __name__ == "__main__":
    main()
