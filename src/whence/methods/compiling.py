"""Whether a sweep is worth compiling: by the steps ahead, and what one of them takes."""

import logging
import time
from collections import Counter
from dataclasses import replace
from typing import Literal, get_args

from whence.errors import BadSetting
from whence.replay.linearised import free
from whence.replay.programs import Programs, drawn
from whence.replay.reverse import Rules, pull_back, start
from whence.run.run import Run

log = logging.getLogger(__name__)
Compiled = Literal["never", "long", "always"]

SECONDS, GAIN = 90.0, 0.3  # what compilation takes, and the least share of a sweep that it saves
TOGETHER = 8  # queries at once, with which a program gains most
RARE = 20  # a kind of batch with fewer visits is never worth its own compilation


def check_compiled(compiled: str) -> None:
    """Refuse a setting that is none.

    Raises:
        BadSetting: names the setting, and what it may be.
    """
    if compiled not in get_args(Compiled):
        raise BadSetting("compiled", compiled, "'never', 'long' or 'always'")


def programs(run: Run, rules: Rules, rows: int, *, chunk: int, ordinary: int, compiled: Compiled) -> Programs | None:
    """Programs for a sweep with so many cotangents, or None: not wanted, the training too short, or no faster.

    Args:
        run: the training.
        rules: how derivatives are taken.
        rows: how many cotangents.
        chunk: how many a program takes at once.
        ordinary: how many are pulled at once without one.
        compiled: what is wanted.
    """
    if compiled == "never" or rules.curvature.product != "autograd":
        return None
    sizes = Counter(len(fed.samples) for step in run.log for fed in step.fed if fed.counted)
    many = frozenset(size for size, visits in sizes.items() if visits >= RARE or compiled == "always")
    made = Programs(min(rows, chunk), many)
    if compiled == "always":
        return made
    usual = [step.index for step in run.log if many.issuperset(len(fed.samples) for fed in step.fed)]
    plain = seconds_of_a_step(run, rules, rows, chunk=ordinary, step=usual[-1]) if usual else 0.0
    gained = GAIN * plain * len(usual)
    log.info("compiling would save about %.0f s and take %.0f s", gained, SECONDS)
    if gained < SECONDS:
        return None
    found = seconds_of_a_step(run, replace(rules, programs=made), rows, chunk=chunk, step=usual[-1])
    log.info("compiled, a step takes %.2f s, and otherwise %.2f s", found, plain)
    return made if found < plain else None


def seconds_of_a_step(run: Run, rules: Rules, rows: int, *, chunk: int, step: int) -> float:
    """The faster of two pulls through a step, by random cotangents."""
    before, after, transition = run.state(step, replay=True), run.state(step + 1, replay=True), run.transition(step)
    trained, running = free(transition.pieces()[0], after.params, after.buffers)
    times = []
    for _ in range(2):
        # Every pull overwrites its cotangents.
        cotangent, begun = start(after, drawn(trained, rows), drawn(running, rows)), time.perf_counter()
        pull_back(transition, before, cotangent, rules=rules, chunk=chunk)
        times.append(time.perf_counter() - begun)
    return min(times)
