"""Deletion beside retraining.

python -m bench.papers.c4_forgetting [digits-sgd] [digits-adamw] [letters] [seed ...]

1, 5 and 20 % of the training set are to be forgotten. Truth: the recorded training again in
float64, with weight 0 for them. Figures: distance from it in parameters, and divergence of
predictions on test rows (KL), both relative to those of the trained model, so 0 is perfect and 1 is
no deletion; mean and 95 % t interval over seeds. "digits": 500 of scikit-learn's digits, 64-64-10,
20 epochs in batches of 50, SGD (GELU, momentum) or AdamW (ReLU). "letters": a GPT of 34 k
parameters on 512 rows of 32 letters, 4 epochs under AdamW; Shakespeare from the folder
BACKTRAIL_DATA, else source code of torch. The gradient ascent is one step up the mean loss of the
samples; of its lengths the best is taken for every seed and figure, which takes the truth to know.
"GN and secant": Gauss-Newton curvature, and the optimizer's slope over the width of a sample (for
SGD the derivative). What was found is kept in runs/papers/c4.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.apply.unlearning import PROBES, forget
from backtrail.apply.unlearning_report import Forgotten, Judge
from backtrail.methods.retrain.removal import RemovedGroup, changed_state
from backtrail.sweep.rules import Rules
from bench import data
from bench.models import GPT
from bench.papers.seeds import half_width

FOLDER = Path("runs/papers/c4")
SHARES = (0.01, 0.05, 0.2)
LENGTHS = (
    0.0,
    *np.geomspace(0.01, 3, 9).tolist(),
)  # of the step up, over the distance between trained and retrained
State = dict[str, Tensor]
RULES = {
    Rules(backtrail.Hessian(), backtrail.Tangent()): "exact",
    Rules(backtrail.GaussNewton(), backtrail.Secant()): "GN and secant",
}


@dataclass(frozen=True)
class Setting:
    """One training."""

    about: str
    build: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    load: Callable[[], data.Split]
    epochs: int
    slots: int
    seeds: range

    def run(self, name: str, seed: int) -> backtrail.Run:
        """The recorded training; recorded first where it is not there yet."""
        torch.manual_seed(seed)
        model, (train, _, _), folder = self.build(), self.load(), FOLDER / name / f"seed-{seed}"
        task = (backtrail.language_model if name == "letters" else backtrail.classification)(
            model, train
        )
        if not folder.exists():
            optimizer = self.optimizer(model.parameters())
            with backtrail.Recorder(folder, task, optimizer) as recorder:
                for _ in range(self.epochs):
                    for inputs, targets in recorder.watch(
                        DataLoader(train, self.slots, shuffle=True)
                    ):
                        cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).backward()
                        optimizer.step()
                        optimizer.zero_grad()
        return backtrail.open_run(folder, task)


def mlp(activation: type[nn.Module]) -> nn.Module:
    """64-64-10."""
    return nn.Sequential(nn.Linear(64, 64), activation(), nn.Linear(64, 10))


SETTINGS = {
    "digits-sgd": Setting(
        "digits, 64-64-10 GELU, SGD lr 0.1, momentum 0.9",
        partial(mlp, nn.GELU),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(data.digits, 500, 500),
        epochs=20,
        slots=50,
        seeds=range(5),
    ),
    "digits-adamw": Setting(
        "digits, 64-64-10 ReLU, AdamW lr 1e-3",
        partial(mlp, nn.ReLU),
        partial(torch.optim.AdamW, lr=1e-3),
        partial(data.digits, 500, 500),
        epochs=20,
        slots=50,
        seeds=range(5),
    ),
    "letters": Setting(
        "GPT 34 k on letters, AdamW lr 3e-3",
        partial(GPT, 128, 32, layers=2, context=32),
        partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1),
        partial(data.letters, 512, 128),
        epochs=4,
        slots=32,
        seeds=range(3),
    ),
}


@dataclass(frozen=True)
class Deletion:
    """A run, samples to forget, and the truth."""

    run: backtrail.Run
    samples: list[int]
    judge: Judge
    test: TensorDataset

    def by_order(self, rules: Rules) -> dict[str, Any]:
        """First order, alone and before a replay of a tenth of the steps, from one sweep."""
        group, last, begun = (
            RemovedGroup.of(self.run, self.samples),
            self.run.steps,
            time.process_time(),
        )
        early, held, bends, before = last - last // 10, {}, [], None
        for number, now in group.sweep(last, rules):
            if before is not None and number % (last // PROBES) == 0:
                bends.append(group.linearity_gap(number - 1, before, now))
            if number in (early, last):
                held[number] = changed_state(now)
            before = now
        about = {
            "seconds": time.process_time() - begun,
            "bend": float(np.divide(*np.sum(bends, axis=0))),
        }
        return {
            "": (held[last], about),
            ", replay of 10 %": (group.replayed(early, held[early]), about),
        }

    def upwards(self) -> Iterator[State]:
        """One step up the loss of the samples, by length."""
        task, end = self.run.task, self.run.state(self.run.steps)
        task.binding.set_modes(None)

        def loss(params: State) -> Tensor:
            return task.losses(params, end.buffers, task.batch(self.samples))[0].mean()

        slopes = torch.func.grad(loss)(end.params)
        apart = {
            name: tensor - end.params[name] for name, tensor in self.judge.retrained.params.items()
        }
        far, steep = (
            sum(float(t.double().square().sum()) for t in tree.values()) ** 0.5
            for tree in (apart, slopes)
        )
        for length in LENGTHS:
            yield {
                name: tensor + length * far / steep * slopes[name]
                for name, tensor in end.params.items()
            }

    def ascent(self) -> dict[str, Any]:
        """The best step, figure by figure."""
        found = [self.judge(state, self.test) for state in self.upwards()]
        best = min(found, key=lambda one: one.predictions)
        return figures(best) | {"parameters": min(one.parameters for one in found)}


def figures(judged: Forgotten) -> dict[str, Any]:
    """What is kept of a judgement."""
    assert judged.agreement is not None
    return {
        "parameters": judged.parameters,
        "predictions": judged.predictions,
        "same class": judged.agreement[1],
        "membership": judged.membership and judged.membership[1],
    }


def deletion(name: str, seed: int, share: float) -> dict[str, Any]:
    """Every method's figures."""
    run, (train, test, _) = SETTINGS[name].run(name, seed), SETTINGS[name].load()
    samples = (
        np.random.default_rng(seed)
        .choice(len(train), round(share * len(train)), replace=False)
        .tolist()
    )
    case, without = (
        Deletion(run, samples, Judge.of(run, samples), test),
        partial(forget, run, samples),
    )
    ways: dict[str, Callable[[], State]] = {
        "no deletion": lambda: run.state(run.steps).params,
        "diff-in, published": partial(without, method=backtrail.DiffIn()),
        "diff-in, corrected": partial(without, method=backtrail.DiffIn(form="corrected")),
        "replay of 10 % alone": partial(without, method=None, replay=run.steps // 10),
        "retraining (float32)": partial(without, method=None, replay=run.steps),
    }
    found: dict[str, Any] = {"one step of ascent, best": case.ascent()}
    for label, way in ways.items():
        begun = time.process_time()
        state = way()
        found[label] = {"seconds": time.process_time() - begun} | figures(case.judge(state, test))
    for rules, kind in RULES.items():
        for label, (state, about) in case.by_order(rules).items():
            judged = case.judge(state.params, test)
            found[f"first order, {kind}{label}"] = figures(judged) | about
    return found


def measured(name: str, seed: int) -> dict[str, Any]:
    """All shares of one seed; kept in a file."""
    place, found = FOLDER / name / f"seed-{seed}.json", {}
    if place.exists():
        found = json.loads(place.read_text())
    for share in SHARES:
        if f"{share:.0%}" not in found:
            found[f"{share:.0%}"] = deletion(name, seed, share)
            place.write_text(json.dumps(found, indent=1))
    return found


def told(values: list[float], digits: int = 2) -> str:
    """Mean and half of the 95 % t interval."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {half_width(values):.{digits}f}"


ORDER = (
    "no deletion",
    "one step of ascent, best",
    "diff-in, published",
    "diff-in, corrected",
    "replay of 10 % alone",
    "first order, exact",
    "first order, exact, replay of 10 %",
    "first order, GN and secant",
    "first order, GN and secant, replay of 10 %",
    "retraining (float32)",
)


def figure(found: dict[str, Any], method: str, key: str) -> float:
    """One cell of one seed; membership as what it is above that of retraining."""
    base = found["retraining (float32)"][key] if key == "membership" else 0.0
    return float(found[method][key] - base)


def table(name: str, seeds: list[int]) -> None:
    """Print the table of one training."""
    found = [measured(name, seed) for seed in seeds]
    shares = list(found[0])
    print(f"\n**{SETTINGS[name].about}**, {len(seeds)} seeds\n")
    for key, digits in (
        ("parameters", 2),
        ("predictions", 2),
        ("same class", 3),
        ("membership", 3),
    ):
        print(f"| {key} | " + " | ".join(f"{share} forgotten" for share in shares) + " |")
        print("|---" * (1 + len(shares)) + "|")
        for method in ORDER:
            cells = [
                told([figure(one[share], method, key) for one in found], digits) for share in shares
            ]
            print(f"| {method} | " + " | ".join(cells) + " |")
        print()
    bends, errors, cost = [], [], []
    for one in (entry[share] for entry in found for share in shares):
        bends.append(one["first order, exact"]["bend"])
        errors.append(one["first order, exact"]["parameters"])
        cost.append(one["first order, exact"]["seconds"] / one["retraining (float32)"]["seconds"])
    rank = stats.spearmanr(bends, errors).statistic
    print(f"bend {min(bends):.2f} to {max(bends):.2f}; Spearman with the distance left {rank:.2f}")
    print(
        "bend, distance left: "
        + "; ".join(f"{b:.2f} {e:.2f}" for b, e in sorted(zip(bends, errors, strict=True)))
    )
    print(
        f"first order took {np.median(cost):.1f} times as long as retraining "
        "(processor time, median)",
        flush=True,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = [word for word in sys.argv[1:] if not word.isdigit()] or list(SETTINGS)
    chosen = [int(word) for word in sys.argv[1:] if word.isdigit()]
    for wanted in asked:
        table(wanted, chosen or list(SETTINGS[wanted].seeds))
