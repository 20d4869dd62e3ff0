"""How well each curvature policy predicts, smooth or not, and its cost.

python -m bench.policies [seeds [name ...]]

Fidelity: digits, 64-128-128-10, AdamW, 200 steps of 50, with GELU and with ReLU, and with ReLU
under the milder recipe of bench.fidelity (lr 3.5e-4, warm-up, decay) and on standardised pixels;
Pearson with 60 single removals, and the linear datamodelling score (LDS: Spearman of predicted and
actual change) of 60 random groups of 5 %; retrained in float64; mean test loss. Two columns compare
the removals with what training really does when the same samples count half or twice: how far it
answers in proportion, which every score takes for granted. The last predicts the groups by what
removing each of their samples alone really does: how far effects add up, which an LDS takes for
granted, too. Cost: the GPT of bench.sweep, in units of plain training, with the name "costs".
"""

import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail import stats
from bench import fidelity as recipes
from bench.models import digits, mlp
from bench.sweep import plain, seconds, swept_run

POLICIES = (
    backtrail.Hessian(),
    backtrail.GaussNewton(),
    backtrail.EmpiricalFisher(),
    backtrail.Zero(),
)
SWEEPS = {
    **{type(policy).__name__: backtrail.DIT(curvature=policy) for policy in POLICIES},
    "Hessian, secant": backtrail.DIT(slope=backtrail.Secant()),
    "GaussN., secant": backtrail.DIT(curvature=backtrail.GaussNewton(), slope=backtrail.Secant()),
}
TRULY = {"counted half": 0.5, "counted twice": 2.0}  # weights
STEPS, REPEATS, QUERIES = 8, 2, (1, 16)
EPOCHS, SLOTS, REMOVALS = 7, 50, 60


def costs() -> None:
    """Print the time of a sweep for every policy and product."""
    run = swept_run(Path(tempfile.mkdtemp()) / "run", STEPS)
    queries = {count: backtrail.Loss(run.task.data, samples=range(count)) for count in QUERIES}
    print("policy           product     1 query  16 queries   (units of plain training)")
    for policy, way in product(POLICIES, ("autograd", "difference")):
        dit = backtrail.DIT(curvature=replace(policy, product=way))  # type: ignore[type-var]
        unit = min(plain(STEPS) for _ in range(REPEATS + 1))
        one, many = (
            min(seconds(partial(dit.attribute, run, query)) for _ in range(REPEATS)) / unit
            for query in queries.values()
        )
        print(f"{type(policy).__name__:16} {way:10} {one:8.2f}  {many:10.1f}", flush=True)


def train(
    activation: type[nn.Module], seed: int, *, standardised: bool = False
) -> tuple[backtrail.Run, TensorDataset]:
    """Record one training."""
    torch.manual_seed(seed)
    model, (data, test) = mlp(activation), digits(standardised=standardised)
    task = backtrail.classification(model, data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    folder = Path(tempfile.mkdtemp()) / "run"
    with backtrail.Recorder(folder, task, optimizer) as recorder:
        loader = DataLoader(data, batch_size=SLOTS, shuffle=True)
        for _ in range(EPOCHS):
            for inputs, labels in recorder.watch(loader):
                cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    return backtrail.open_run(folder, task), test


def train_mildly(activation: type[nn.Module], seed: int) -> tuple[backtrail.Run, TensorDataset]:
    """Record one that answers more smoothly."""
    return recipes.train("AdamW, warm-up, decay", seed, activation)[:2]


def fidelity(run: backtrail.Run, test: TensorDataset, seed: int) -> list[tuple[float, float]]:
    """Pearson and LDS for every kind of sweep; at last, of half, twice, and sums."""
    query = backtrail.Loss(test, aggregate="mean")
    draw = np.random.default_rng(seed)
    ones = draw.choice(run.samples, REMOVALS, replace=False)
    groups = [draw.choice(run.samples, run.samples // 20, replace=False) for _ in range(REMOVALS)]
    left_out = [[int(one)] for one in ones] + [group.tolist() for group in groups]
    actual = backtrail.retrain(run, query, left_out).change[0]
    each = backtrail.retrain(run, query, [[sample] for sample in range(run.samples)]).change[0]
    found = []
    for dit in SWEEPS.values():
        total = dit.attribute(run, query).total()[0]
        single = stats.pearson(total[:, ones], actual[:, :REMOVALS])
        found.append(
            (float(single.item()), float(stats.lds(total, groups, actual[:, REMOVALS:]).item()))
        )
    for weight in TRULY.values():
        change = (1 - weight) * backtrail.retrain(run, query, left_out, weight=weight).change[0]
        pairs = [
            (change[:, part], actual[:, part]) for part in (slice(REMOVALS), slice(REMOVALS, None))
        ]
        found.append(
            (
                float(stats.pearson(*pairs[0]).item()),
                float(stats.spearman(*pairs[1]).item()),
            )
        )
    found.append((1.0, float(stats.lds(each, groups, actual[:, REMOVALS:]).item())))
    return found


TRAININGS = {
    "ReLU": (train, nn.ReLU),
    "GELU": (train, nn.GELU),
    "ReLU, mild": (train_mildly, nn.ReLU),
    "ReLU, standard": (partial(train, standardised=True), nn.ReLU),
}
COSTS = "costs"


def line(training: str, name: str, figures: Iterable[Iterable[float]]) -> str:
    """One row of the table."""
    return f"{training:14}  {name:>4}  " + "  ".join(
        f"{pearson:7.2f} {lds:7.2f}" for pearson, lds in figures
    )


def main() -> None:
    """Print both tables, or what is named of them."""
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    chosen = sys.argv[2:] or [*TRAININGS, COSTS]
    names = [*SWEEPS, *TRULY, "each alone"]
    print(
        "network         seed  " + "  ".join(f"{name:>15}" for name in names) + "   (Pearson, LDS)",
        flush=True,
    )
    for training, (begin, activation) in TRAININGS.items():
        if training not in chosen:
            continue
        rows = []  # [seed, policy, figure]
        for seed in range(seeds):
            rows.append(fidelity(*begin(activation, seed), seed))
            print(line(training, str(seed), rows[-1]), flush=True)
        print(line(training, "mean", np.mean(rows, 0)), flush=True)
    if COSTS in chosen:
        costs()


if __name__ == "__main__":
    main()
