"""Training on a chosen part of the data: python -m bench.papers.c4_coreset [seed ...].

A training on 2,000 rows is recorded, parts of 10 to 50 % are chosen, and a new model (other first
weights, other batches) is trained on each part by an ordinary loop: for as many epochs as
everything was, and, of MNIST, for as many steps. "MNIST": 784-64-10, SGD with momentum. "CIFAR":
two convolutions at 16 x 16, AdamW. Each with its own labels and with a fifth of them wrong.
Accuracy is that on 4,000 other rows; its difference from the mean of three random parts of the same
training has a 95 % t interval over the seeds. BACKTRAIL_DATA names a folder with the data; without
it, scikit-learn's digits. What was found is kept in runs/papers/c4_coreset.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import avg_pool2d, cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.queries import Query
from bench import data

FRACTIONS, WRONG, SEEDS = (0.1, 0.2, 0.3, 0.5), (0.0, 0.2), (0, 1, 2, 3, 4)
TRAIN, VALIDATION, TEST, EPOCHS, SLOTS = 2000, 200, 4000, 10, 64
RANDOM = "random", "random, again", "random, once more"
Pair = tuple[Tensor, Tensor]


def digits() -> Pair:
    """scikit-learn's, as rows of 64."""
    both = data.digits()[:2]
    return torch.cat([part.tensors[0] for part in both]), torch.cat(
        [part.tensors[1] for part in both]
    )


def mnist() -> Pair:
    """Images as rows of 784; digits where it is not at hand."""
    place = data.folder("mnist")
    if place is None:
        return digits()
    images, labels = data.unpacked(place)
    return images.flatten(1) / 255, labels


def cifar() -> Pair:
    """Pictures [3, 16, 16]; digits [1, 8, 8] where it is not at hand."""
    place = data.folder("cifar10")
    if place is None:
        rows, labels = digits()
        return rows.view(-1, 1, 8, 8), labels
    with np.load(place / "cifar10_12k.npz") as file:
        images, labels = file["x_train"], file["y_train"]
    pictures = torch.tensor(images.transpose(0, 3, 1, 2))
    return avg_pool2d(pictures / 255, 2) - 0.5, torch.tensor(labels.astype(np.int64).ravel())


def mlp(shape: torch.Size) -> nn.Module:
    """One hidden layer."""
    return nn.Sequential(nn.Linear(shape[0], 64), nn.GELU(), nn.Linear(64, 10))


def cnn(shape: torch.Size) -> nn.Module:
    """Two convolutions that halve the picture, and a head."""
    first = nn.Conv2d(shape[0], 16, 3, stride=2, padding=1), nn.GELU()
    second = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GELU()
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(2 * shape[1] * shape[2], 10))


@dataclass(frozen=True)
class Setting:
    """One training."""

    name: str
    load: Callable[[], Pair]
    build: Callable[[torch.Size], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]


SETTINGS = (
    Setting("MNIST", mnist, mlp, lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9)),
    Setting("CIFAR", cifar, cnn, lambda params: torch.optim.AdamW(params, lr=2e-3)),
)


JUDGES = {
    "epochs": (SETTINGS, FRACTIONS),
    "steps": (SETTINGS[:1], (0.1, 0.3)),
}  # what is affordable


@dataclass(frozen=True)
class Trial:
    """One training with one seed, which draws rows, wrong labels, weights and batches."""

    setting: Setting
    wrong: float
    seed: int

    @property
    def folder(self) -> Path:
        """Where everything of it is kept."""
        return Path("runs/papers/c4_coreset") / f"{self.setting.name}-{self.wrong:g}-{self.seed}"

    @cached_property
    def parts(self) -> list[Pair]:
        """Rows to train on, to ask about, and to judge by."""
        inputs, labels = self.setting.load()
        draw = torch.Generator().manual_seed(self.seed)
        sizes = (
            [TRAIN, VALIDATION]
            if len(inputs) > TRAIN + VALIDATION
            else [len(inputs) // 2, len(inputs) // 10]
        )
        order = torch.randperm(len(inputs), generator=draw)[: sum(sizes) + TEST]
        parts = [
            (inputs[some], labels[some]) for some in order.split([*sizes, len(order) - sum(sizes)])
        ]
        rows, right = parts[0]
        bad = torch.randperm(len(rows), generator=draw)[: int(self.wrong * len(rows))]
        right[bad] = (right[bad] + torch.randint(1, 10, (len(bad),), generator=draw)) % 10
        return [(rows, right), *parts[1:]]

    @cached_property
    def run(self) -> backtrail.Run:
        """The recorded training on everything."""
        train = TensorDataset(*self.parts[0])
        torch.manual_seed(self.seed)
        model = self.setting.build(train.tensors[0].shape[1:])
        task, optimizer = (
            backtrail.classification(model, train),
            self.setting.optimizer(model.parameters()),
        )
        if not (self.folder / "run").exists():
            begun = self.folder / "begun"
            rmtree(begun, ignore_errors=True)
            with backtrail.Recorder(
                begun, task, optimizer, checkpoints=backtrail.Epochs()
            ) as recorder:
                loader = DataLoader(train, SLOTS, shuffle=True)
                for _ in range(EPOCHS):
                    for inputs, labels in recorder.watch(loader):
                        cross_entropy(model(inputs), labels).backward()
                        optimizer.step()
                        optimizer.zero_grad()
            begun.rename(self.folder / "run")
        return backtrail.open_run(self.folder / "run", task)

    @property
    def queries(self) -> Query:
        """The loss of every validation row."""
        return backtrail.Loss(TensorDataset(*self.parts[1]))

    @cached_property
    def embeddings(self) -> backtrail.Embeddings:
        """Data value embeddings with their defaults."""
        return backtrail.DataValueEmbedding().embed(self.run, out=self.folder / "embeddings")

    @cached_property
    def influence(self) -> backtrail.Influence:
        """Influence on the validation losses, by the embeddings."""
        return self.embeddings.attribute(self.queries)

    @cached_property
    def learned(self) -> Any:
        """The four fifths of every class with the least loss at the end."""
        return backtrail.select_coreset(self.run, 0.8, method="loss")

    def select(self, fraction: float, method: Any, **options: Any) -> list[int]:
        """Samples kept by the library."""
        found: list[int] = backtrail.select_coreset(self.run, fraction, method=method, **options)[
            "sample"
        ].to_list()
        return found

    def easiest(self, fraction: float) -> list[int]:
        """The other end of EL2N's order."""
        order = self.select(1.0, "el2n")
        return order[::-1][: round(fraction * len(order))]

    def most_helpful(self, fraction: float) -> list[int]:
        """Those with the largest influence on the mean validation loss, balanced by class."""
        found = self.influence.total()[:, -1].mean(axis=0)
        labels = self.parts[0][1].numpy()
        ranks = np.zeros(len(found))
        for label in np.unique(labels):
            of_class = np.flatnonzero(labels == label)
            ranks[of_class[np.argsort(-found[of_class])]] = (np.arange(len(of_class)) + 0.5) / len(
                of_class
            )
        return np.argsort(ranks, kind="stable")[: round(fraction * len(found))].tolist()

    def train(self, chosen: list[list[int]], steps: int) -> list[float]:
        """Train a new model on each of some parts of one size, all in one stack; the accuracies."""
        torch.manual_seed(1000 + self.seed)
        (inputs, labels), (tests, truth) = self.parts[0], self.parts[2]
        model, rows = self.setting.build(inputs.shape[1:]), torch.tensor(chosen)
        start = {name: value.detach() for name, value in model.named_parameters()}
        stack = {
            name: torch.stack([value] * len(rows)).requires_grad_() for name, value in start.items()
        }
        optimizer = self.setting.optimizer(list(stack.values()))
        outputs = vmap(lambda params, batch: functional_call(model, params, (batch,)))
        for place in batches(rows.shape[1], steps):
            batch = rows[:, place]
            losses = cross_entropy(
                outputs(stack, inputs[batch]).flatten(0, 1),
                labels[batch].flatten(),
                reduction="none",
            )
            losses.view(len(rows), -1).mean(1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained = [
            {name: value[place].detach() for name, value in stack.items()}
            for place in range(len(rows))
        ]
        found = [functional_call(model, params, (tests,)).argmax(1) == truth for params in trained]
        return [float(right.float().mean()) for right in found]


def batches(size: int, steps: int) -> Iterator[Tensor]:
    """Places of so many shuffled batches."""
    while steps > 0:
        for place in torch.randperm(size).split(SLOTS)[:steps]:
            yield place
            steps -= 1


ROWS: dict[str, Callable[[Trial, float], list[int]]] = {
    "random": lambda trial, fraction: trial.select(fraction, "random", balanced=False, seed=1),
    "random, again": lambda trial, fraction: trial.select(
        fraction, "random", balanced=False, seed=2
    ),
    "random, once more": lambda trial, fraction: trial.select(
        fraction, "random", balanced=False, seed=3
    ),
    "random, balanced": lambda trial, fraction: trial.select(fraction, "random"),
    "EL2N, largest": lambda trial, fraction: trial.select(fraction, "el2n"),
    "EL2N, smallest": lambda trial, fraction: trial.easiest(fraction),
    "loss, smallest": lambda trial, fraction: trial.select(fraction, "loss"),
    "herding of features": lambda trial, fraction: trial.select(fraction, "herding"),
    "influence alone": lambda trial, fraction: trial.most_helpful(fraction),
    "embeddings": lambda trial, fraction: trial.select(fraction, trial.embeddings),
    "embeddings, not balanced": lambda trial, fraction: trial.select(
        fraction, trial.embeddings, balanced=False
    ),
    "embeddings, learned": lambda trial, fraction: trial.select(
        fraction, trial.embeddings, among=trial.learned
    ),
    "validation": lambda trial, fraction: trial.select(fraction, trial.influence),
    "validation, not balanced": lambda trial, fraction: trial.select(
        fraction, trial.influence, balanced=False
    ),
}


def accuracies(trial: Trial, judge: str, fraction: float) -> dict[str, float]:
    """Of every row; kept in a file."""
    place = trial.folder / f"{judge}-{fraction:g}.json"
    known: dict[str, float] = json.loads(place.read_text()) if place.exists() else {}
    missing = [name for name in ROWS if name not in known]
    if missing:
        chosen = [sorted(ROWS[name](trial, fraction)) for name in missing]
        steps = trial.run.steps if judge == "steps" else EPOCHS * -(-len(chosen[0]) // SLOTS)
        known |= dict(zip(missing, trial.train(chosen, steps), strict=True))
        place.write_text(json.dumps(known))
    return known


def everything(trial: Trial) -> float:
    """The accuracy of a new training on all rows."""
    place = trial.folder / "everything.json"
    if not place.exists():
        found = trial.train([list(range(trial.run.samples))], trial.run.steps)
        place.write_text(json.dumps(found[0]))
    return float(json.loads(place.read_text()))


def table(setting: Setting, wrong: float, *, judge: str, seeds: list[int]) -> None:
    """Print one."""
    trials = [Trial(setting, wrong, seed) for seed in seeds]
    full = 100 * np.mean([everything(trial) for trial in trials])
    fractions = JUDGES[judge][1]
    found = {
        fraction: [accuracies(trial, judge, fraction) for trial in trials] for fraction in fractions
    }
    print(
        f"\n{setting.name}, {wrong:.0%} of the labels wrong, as many {judge}; "
        f"on everything {full:.1f}\n"
    )
    print("| kept | " + " | ".join(f"{fraction:.0%}" for fraction in fractions) + " |")
    print("|---|" + "---|" * len(fractions))
    for name in [name for name in ROWS if name not in RANDOM[1:]]:
        print(
            f"| {name} | "
            + " | ".join(cell(name, found[fraction]) for fraction in fractions)
            + " |",
            flush=True,
        )


def cell(name: str, found: list[dict[str, float]]) -> str:
    """Mean accuracy, and its gain over random with a 95 % t interval."""
    chance = 100 * np.array([np.mean([trial[one] for one in RANDOM]) for trial in found])
    if name == "random":
        return f"{chance.mean():.1f}"
    mine = 100 * np.array([trial[name] for trial in found])
    gain = mine - chance
    half = (
        student.ppf(0.975, len(gain) - 1) * gain.std(ddof=1) / len(gain) ** 0.5
        if len(gain) > 1
        else np.nan
    )
    return f"{mine.mean():.1f} ({gain.mean():+.1f} ± {half:.1f})"


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = [int(seed) for seed in sys.argv[1:]] or list(SEEDS)
    for judge, (settings, _) in JUDGES.items():
        for setting in settings:
            for wrong in WRONG:
                table(setting, wrong, judge=judge, seeds=wanted)
