"""Data Value Embedding on MNIST, visits of the last epoch alone: python -m bench.papers.b1_last.

The "fast" training of bench.papers.b1, where 60 removals do not tell the methods apart. These
re-runs are short: here are 400. Beside each figure: how far our embeddings are ahead of it, with 95
% intervals over the removals.
"""

from pathlib import Path

import numpy as np
import torch

import backtrail
from backtrail.methods.retrain.retrain import perturb
from backtrail.stats import bootstrap, spearman
from bench.cases import TrainedCase
from bench.papers.b1 import METHODS, SETTINGS, SINGLE, TEST, Visit, left_out, of_last_epoch

REMOVALS, TOGETHER, DRAWS = 400, 50, 2000
OURS = "embedding, true, rank 256"
OTHERS = (
    "embedding, empirical, rank 256",
    "dattri DVEmb, Kronecker 512",
    "dattri DVEmb, Kronecker 768",
    "gradient-dot",
    "exact sweep (DIT)",
)


def drawn(run: backtrail.Run) -> list[Visit]:
    """Visits of the last epoch."""
    last = of_last_epoch(run)
    picked = np.random.default_rng(1).choice(len(last), REMOVALS, replace=False)
    return [last[place] for place in sorted(picked)]


def truth(trained: TrainedCase, visits: list[Visit]) -> np.ndarray:
    """How leaving out each changes the mean test loss and some single ones, `[1 + loss, visit]`."""
    run, losses = trained.run, backtrail.Loss(trained.queries(TEST))
    change = perturb(
        run, losses, left_out(run, visits), observed_at=(run.steps,), batch=TOGETHER
    ).change[:, 0]
    return np.concatenate([change.mean(0, keepdims=True), change[:SINGLE]])


def ahead(ours: np.ndarray, other: np.ndarray, actual: np.ndarray) -> str:
    """By how much the correlation with the truth is higher, with its interval."""
    draw, gained = np.random.default_rng(0), []
    for _ in range(DRAWS):
        some = draw.integers(0, REMOVALS, REMOVALS)
        gained.append(spearman(ours[some], actual[some]) - spearman(other[some], actual[some]))
    low, high = np.quantile(gained, [0.025, 0.975])
    return f"{np.mean(gained):.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    """Print the table."""
    trained = TrainedCase(SETTINGS["fast"], Path("runs/papers/b1/fast/run"))
    if not trained.folder.exists():
        trained.case.record(trained.train, trained.folder)
    visits = drawn(trained.run)
    steps, slots = [step for step, _ in visits], [slot for _, slot in visits]
    predicted = {name: METHODS[name](trained)[:, steps, slots] for name in (OURS, *OTHERS)}
    actual = truth(trained, visits)
    print(f"{'':34}{'mean loss [95 %]':24}{'single':8}{OURS} is ahead by")
    for name, found in predicted.items():
        mean, single = (
            bootstrap(spearman, found[0], actual[0]),
            spearman(found[1:], actual[1:]).mean(),
        )
        print(
            f"{name:34}{mean!s:24}{single:5.2f}   {ahead(predicted[OURS][0], found[0], actual[0])}"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
