"""Does the influence predict what leaving a sample out does? python -m bench.fidelity [seeds].

Digits, MLP 64-128-128-10 with GELU, 200 steps of 50, 60 samples left out one at a time, mean test
loss; Pearson of the prediction with retraining in float64.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.apply.trust import draw_visited, removal_check
from bench.models import digits, mlp

STEPS, SLOTS, SAMPLES = 200, 50, 60
TRAININGS: dict[
    str, tuple[type[torch.optim.Optimizer], dict[str, float], bool]
] = {  # the last: warm-up and decay
    "SGD, momentum 0.9": (torch.optim.SGD, {"lr": 0.002, "momentum": 0.9}, False),
    "AdamW, warm-up, decay": (torch.optim.AdamW, {"lr": 3.5e-4}, True),
}


def warm_up_and_decay(step: int) -> float:
    """Twenty steps up, then linearly down."""
    return min(1.0, (step + 1) / 20) * (1 - step / STEPS)


def constant(step: int) -> float:
    """The same rate throughout."""
    del step
    return 1.0


def train(
    name: str, seed: int, activation: type[nn.Module] = nn.GELU
) -> tuple[backtrail.Run, TensorDataset, float]:
    """Record one training; the run, the test set, and the accuracy on it."""
    kind, settings, scheduled = TRAININGS[name]
    torch.manual_seed(seed)
    model, (data, test) = mlp(activation), digits()
    task = backtrail.classification(model, data)
    optimizer = kind(model.parameters(), **settings)  # type: ignore[arg-type]
    scheduler = LambdaLR(optimizer, warm_up_and_decay if scheduled else constant)
    loader = DataLoader(data, batch_size=SLOTS, shuffle=True)
    folder = Path(tempfile.mkdtemp()) / "run"
    with backtrail.Recorder(folder, task, optimizer) as recorder:
        done = 0
        while done < STEPS:
            for inputs, labels in recorder.watch(loader):
                cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                done += 1
                if done == STEPS:
                    break
    accuracy = (model(test.tensors[0]).argmax(1) == test.tensors[1]).float().mean()
    return backtrail.open_run(folder, task), test, float(accuracy)


def main() -> None:
    """Print the table."""
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(
        "training              seed  accuracy  update   Pearson  interval            "
        "Spearman            slope"
    )
    for name in TRAININGS:
        for seed in range(seeds):
            run, test, accuracy = train(name, seed)
            queries = backtrail.Loss(test, aggregate="mean")
            for slope in (backtrail.Tangent(), backtrail.Secant()):
                influence = backtrail.DIT(slope=slope).attribute(run, queries)
                check, _ = removal_check(
                    run, influence, queries, samples=draw_visited(run, SAMPLES, seed=seed)
                )
                print(
                    f"{name:21} {seed:4}  {accuracy:8.3f}  {type(slope).__name__:7}  "
                    f"{check.pearson.estimate:.4f}   "
                    f"{check.pearson}   {check.spearman}   {check.slope:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
