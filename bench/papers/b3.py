"""Repeated passages, and where data is worth selecting: python -m bench.papers.b3 [seed ...].

First, rows of the training set are asked about as they stand: where does each rank among all 4,096
by its own influence on its own loss? Then the harmful slots of every batch, by the exact influence
on the mean loss of 64 validation rows, are left out always, in regimes of the training, or never,
and the mean loss of 256 other rows is compared, beside as many slots left out at random. Published:
early and late together do about as well as always, and the first 4 % bring half of the gain. The
training is bench.papers.shakespeare.
"""

import sys

import numpy as np
import polars as pl

import backtrail
from bench.papers.shakespeare import influence, rows, run

PASSAGES = list(range(100, 4096, 700))  # rows of the training set
MANY = list(range(20, 4096, 64))  # where more cost nothing
DROPS = 0.5, 0.1  # shares of a batch


def ranks(found: backtrail.Influence, passages: list[int]) -> np.ndarray:
    """Place of every passage among all samples, the most helpful to its own loss first, from 1."""
    totals = found.total()[:, -1]
    own = totals[np.arange(len(passages)), passages]
    above: np.ndarray = 1 + (totals > own[:, None]).sum(axis=1)
    return above


def repeated(seed: int) -> None:
    """The table of ranks."""
    recorded, train = run(seed), rows()[0]
    for method, name, passages in (
        ("dit", "passages", PASSAGES),
        ("dve-adam", "passages", PASSAGES),
        ("dve-adam", "many", MANY),
        ("dve-adam-body", "many", MANY),
        ("dve-rate", "passages", PASSAGES),
        ("dve-rate", "many", MANY),
        ("dot", "passages", PASSAGES),
    ):
        found = influence(recorded, name, backtrail.Loss(train, samples=passages), method=method)
        place = ranks(found, passages)
        cells = f"{len(place)} | {np.mean(place == 1):.2f} | {np.median(place):g} | {place.max()}"
        print(f"| {seed} | {method} | {cells} |", flush=True)


def selecting(recorded: backtrail.Run, drop: float) -> pl.DataFrame:
    """The losses of selecting by the exact influence, kept."""
    kept = recorded.path / f"selecting-{drop:g}.csv"
    if not kept.exists():
        _, validation, test = rows()
        asked, judge = (backtrail.Loss(some, aggregate="mean") for some in (validation, test))
        found = influence(recorded, "validation", asked)
        backtrail.worth_selecting(recorded, found, judge, drop=drop).write_csv(kept)
    return pl.read_csv(kept)


def selected(seed: int) -> None:
    """The table of losses."""
    for drop in DROPS:
        for name, share, dropped, loss, change, by_chance in selecting(run(seed), drop).rows():
            cells = f"{share:.1%} | {dropped} | {loss:.4f} | {change:+.4f} | {by_chance:+.4f}"
            print(f"| {seed} | {drop:.0%} | {name} | {cells} |", flush=True)


def main(seeds: list[int]) -> None:
    """Print both tables."""
    print(
        "| seed | influence | passages | share of rank 1 | median rank | worst rank |\n"
        "|---|---|---|---|---|---|"
    )
    for seed in seeds:
        repeated(seed)
    print(
        "\n| seed | of a batch | select | share of steps | slots left out | test loss | change | "
        "at random |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for seed in seeds:
        selected(seed)


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [0])
