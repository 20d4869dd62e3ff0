"""Which training rows does a wrong answer come from? python -m bench.culprits [--rows 0 1 2 3].

Twelve query rows with a wrong label, and two noisy copies of each with that label among 1,000
training rows. For every training and method:

* recall@2: share of each query's two culprits among the two rows of largest influence, mean;
* Pearson with leaving out every culprit and every 25th row, one at a time, in float64, mean over
  queries;
* own: median influence of a query's first culprit on it, beside the true one of leaving it out.

BACKTRAIL_DATA names a folder with mnist/; without it the data are scikit-learn's digits.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

import backtrail
from backtrail.run.run import Run
from bench.culprits.training import CLEAN, COPIES, QUERIES, Culprits, planted, recorded

# Epochs, learning rate, momentum of SGD.
TRAININGS = ((40, 0.05, 0.9), (10, 0.05, 0.9), (40, 0.05, 0.0), (40, 0.01, 0.9))
EVERY = 25  # one of so many clean rows is left out too


def methods(runs: int, seed: int) -> dict[str, backtrail.Method]:
    """What is compared."""
    newton = backtrail.DIT(curvature=backtrail.GaussNewton())
    return {
        "DIT": backtrail.DIT(),
        "DIT, Gauss-Newton": newton,
        "PathIntegrated": backtrail.PathIntegrated(runs=runs, seed=seed),
        "PathIntegrated, Gauss-Newton": backtrail.PathIntegrated(base=newton, runs=runs, seed=seed),
    }


def measured(run: Run, data: Culprits, *, runs: int, seed: int) -> list[str]:
    """One line for the truth, and one for every method."""
    queries = backtrail.Loss(data.asked)
    removed = [*range(0, CLEAN, EVERY), *data.all_culprits]
    truth = backtrail.leave_one_out(run, queries, samples=removed)  # [query, removal]
    first_culprit = [removed.index(CLEAN + query * COPIES) for query in range(QUERIES)]
    own = truth[np.arange(QUERIES), first_culprit]
    lines = [f"{'leave-one-out':30s} own {np.median(own):8.4f}"]
    for name, method in methods(runs, seed).items():
        began = time.process_time()
        total = method.attribute(run, queries).total()[:, -1]  # [query, sample]
        seconds = time.process_time() - began
        found = []
        for query, scores in enumerate(total):
            largest = np.argsort(-scores)[:COPIES].tolist()
            found.append(len(data.of_query(query).intersection(largest)) / COPIES)
        correlations = []
        for scores, actual in zip(total, truth, strict=True):
            correlations.append(np.corrcoef(scores[removed], actual)[0, 1])
        of_own = total[:, removed][np.arange(QUERIES), first_culprit]
        lines.append(
            f"{name:30s} own {np.median(of_own):8.4f}  recall@2 {np.mean(found):.3f}  "
            f"Pearson {np.mean(correlations):.3f}  CPU s {seconds:.0f}"
        )
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.culprits")
    everything = list(range(len(TRAININGS)))
    parser.add_argument("--rows", type=int, nargs="*", default=everything, help="which trainings")
    parser.add_argument("--runs", type=int, default=4, help="re-runs of PathIntegrated")
    parser.add_argument("--seed", type=int, default=0, help="of its weights")
    given = parser.parse_args()
    data = planted()
    for row in given.rows:
        epochs, lr, momentum = TRAININGS[row]
        with tempfile.TemporaryDirectory() as folder:
            run = recorded(data, Path(folder) / "run", epochs=epochs, lr=lr, momentum=momentum)
            print(f"{data.about}: {epochs} epochs, lr {lr}, momentum {momentum}", flush=True)
            for line in measured(run, data, runs=given.runs, seed=given.seed):
                print(f"  {line}", flush=True)


if __name__ == "__main__":
    main()
