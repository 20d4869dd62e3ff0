"""Wrong labels among ones and sevens, by the tracker's paper: python -m bench.papers.a3 [seed ...].

The set-up is bench.papers.ones_and_sevens with the published rate, and trained; 4 to 30 % of the
training labels are turned round. "whole run" and "last epoch" rank by the exact influence on the
mean loss of 256 validation rows, the most harmful first; "own rows" asks about the mean loss of the
training set itself. Figures: precision among as many first samples as there are wrong labels, and
in brackets 1 - 2 misses / n, which flatters (with 4 % wrong, finding none gives .92). What was
found is kept in runs/papers/a3.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import backtrail
from backtrail.stats import detection_accuracy, precision_at
from bench.papers.ones_and_sevens import accuracy, recorded
from bench.papers.seeds import Figures, kept, line, told

FOLDER = Path("runs/papers/a3")
SHARES, SEEDS = (0.04, 0.08, 0.12, 0.16, 0.2, 0.3), range(5)
NAMES = ("whole run", "last epoch", "whole run, own rows", "loss", "mean-loss", "el2n", "held-out")


def figures(trained: bool, share: float, seed: int) -> Figures:  # noqa: FBT001
    """Precision and accuracy of every ranking on one training."""
    run, validation, wrong = recorded(seed, trained=trained, flipped=share)
    harm, own = (
        backtrail.DIT().attribute(
            run, backtrail.Loss(rows, aggregate="mean"), observed_at=run.epochs[-2:]
        )
        for rows in (validation, run.task.data)
    )
    asked: list[dict[str, Any]] = [
        {"method": harm},
        {"method": harm, "window": run.epochs[-2:]},
        {"method": own},
    ]
    asked += [{"method": name} for name in NAMES[3:]]
    found = {"accuracy": accuracy(run, validation)}
    for name, options in zip(NAMES, asked, strict=True):
        suspicion = backtrail.find_mislabeled(run, **options).sort("sample")["score"].to_numpy()
        found |= {
            name: precision_at(suspicion, wrong),
            f"{name}, sides": detection_accuracy(suspicion, wrong),
        }
    return found


def main(seeds: list[int]) -> None:
    """Print the table."""
    print(line(["training", "wrong", "accuracy", *NAMES]))
    print(line(["---"] * (len(NAMES) + 3)))
    for trained in (True, False):
        for share in SHARES:
            name = f"{'trained' if trained else 'published'}-{share:g}"
            found = [
                kept(FOLDER / f"{name}-{seed}.json", partial(figures, trained, share, seed))
                for seed in seeds
            ]
            sides = {name: np.mean([one[f"{name}, sides"] for one in found]) for name in NAMES}
            cells = [f"{told([one[name] for one in found])} ({sides[name]:.3f})" for name in NAMES]
            hits = np.mean([one["accuracy"] for one in found])
            print(line([name.partition("-")[0], f"{share:.0%}", f"{hits:.2f}", *cells]), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main([int(word) for word in sys.argv[1:]] or list(SEEDS))
