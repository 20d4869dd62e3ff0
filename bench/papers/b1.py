"""Data Value Embedding on MNIST, and leaving a visit out: python -m bench.papers.b1 [slow] [fast].

784-128-64-10 with GELU, 5,000 images, plain SGD in batches of 64: "slow" with a rate of 1e-3 for 3
epochs (published), "fast" with 0.05 for 10. Truth: the training run again in float64 without one
visit of one sample (of the last epoch, or of any), or without all visits of one. Figures: Spearman
correlation with it, on the mean loss of 200 test images, and the mean of that on each of 8 test
losses. BACKTRAIL_DATA names a folder with MNIST. `make bench-env` installs dattri; with
`PYTHONPATH=src:. .venv-bench/bin/python` its rows are filled. What was found is kept in
runs/papers/b1.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

import backtrail
from backtrail.methods.retrain.retrain import perturb
from backtrail.methods.retrain.weights import Removal
from backtrail.stats import Interval, bootstrap, spearman
from bench import data
from bench.cases import Case, TrainedCase

REMOVALS, TEST, SINGLE = 60, 200, 8
COLUMNS = ("last epoch", "any epoch", "all visits")
Visit = tuple[int, int]  # step and slot


def network() -> nn.Module:
    """784-128-64-10; the first number is 64 without MNIST."""
    width = data.mnist_rows(1, 1)[0].tensors[0].shape[1]
    return nn.Sequential(
        nn.Linear(width, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 10)
    )


def case(name: str, rate: float, epochs: int) -> Case:
    """One of the two trainings."""
    return Case(
        name=name,
        about=f"SGD, lr {rate:g}, {epochs} epochs",
        kind="mlp",
        build=network,
        load=partial(data.mnist_rows, 5000, TEST),
        optimizer=partial(torch.optim.SGD, lr=rate),
        rule="plain",
        epochs=epochs,
    )


SETTINGS = {"slow": case("slow", 1e-3, 3), "fast": case("fast", 0.05, 10)}


@dataclass(frozen=True)
class Drawn:
    """Removals of each kind, drawn with a fixed seed.

    Attributes:
        last: visits of the last epoch.
        anywhere: visits of any epoch.
        samples: rows of the training set.
    """

    last: list[Visit]
    anywhere: list[Visit]
    samples: list[int]

    @staticmethod
    def of(run: backtrail.Run) -> "Drawn":
        """The draw."""
        draw = np.random.default_rng(0)
        visits = [
            (step, slot) for step in range(run.steps) for slot in range(len(run.log[step].samples))
        ]
        last = of_last_epoch(run)
        some = [sorted(draw.choice(len(pool), REMOVALS, replace=False)) for pool in (last, visits)]
        samples = draw.choice(run.samples, REMOVALS, replace=False).tolist()
        return Drawn(
            [last[place] for place in some[0]], [visits[place] for place in some[1]], samples
        )

    def removals(self, run: backtrail.Run) -> list[Removal]:
        """All of them, kind by kind."""
        return left_out(run, self.last + self.anywhere) + [
            Removal(frozenset({sample}), (0, run.steps)) for sample in self.samples
        ]

    def predicted(self, run: backtrail.Run, values: np.ndarray) -> np.ndarray:
        """What an influence [query, step, slot] says of them, `[query, kind, removal]`."""
        slots = np.full(values.shape[1:], -1)
        for step, logged in enumerate(run.log):
            slots[step, : len(logged.samples)] = logged.samples
        one = [
            values[:, [t for t, _ in visits], [b for _, b in visits]]
            for visits in (self.last, self.anywhere)
        ]
        total = np.stack(
            [np.where(slots == sample, values, 0.0).sum((1, 2)) for sample in self.samples], 1
        )
        return np.stack([*one, total], 1)


def of_last_epoch(run: backtrail.Run) -> list[Visit]:
    """Its visits, in order."""
    final = run.log[run.steps - 1].fed[-1].epoch
    steps = (step for step in run.log if step.fed[-1].epoch == final)
    return [(step.index, slot) for step in steps for slot in range(len(step.samples))]


def left_out(run: backtrail.Run, visits: list[Visit]) -> list[Removal]:
    """The training again without each."""
    return [
        Removal(frozenset({run.log[step].samples[slot]}), (step, step + 1)) for step, slot in visits
    ]


def asked(trained: TrainedCase) -> list[Any]:
    """The mean test loss, and single ones."""
    test = trained.queries(TEST)
    return [backtrail.Loss(test, aggregate="mean"), backtrail.Loss(test, samples=range(SINGLE))]


def truth(trained: TrainedCase, place: Path) -> np.ndarray:
    """What the removals do, `[query, kind, removal]`; kept in a file."""
    if not place.exists():
        run = trained.run
        losses = backtrail.Loss(trained.queries(TEST))
        found = perturb(
            run, losses, Drawn.of(run).removals(run), observed_at=(run.steps,), batch=REMOVALS
        )
        change = found.change[:, 0].reshape(TEST, len(COLUMNS), REMOVALS)
        np.save(place, np.concatenate([change.mean(0, keepdims=True), change[:SINGLE]]))
    return np.load(place)


def ours(method: Any, trained: TrainedCase) -> np.ndarray:
    """The influence of every visit by one of our methods, `[query, step, slot]`."""
    source = method.embed(trained.run) if isinstance(method, backtrail.DataValueEmbedding) else None
    ask = partial(method.attribute, trained.run) if source is None else source.attribute
    return np.concatenate([ask(queries).values()[:, 0] for queries in asked(trained)])


def dattri(trained: TrainedCase, factors: str, dimensions: int) -> np.ndarray:
    """The same by dattri's embeddings, summed over the visits of an epoch: here there is one."""
    from bench.peers.dattri import embedded  # noqa: PLC0415

    attributor = embedded(trained, factors=factors, dimensions=dimensions)
    run, test = trained.run, DataLoader(trained.queries(TEST), batch_size=TEST)
    epochs = [step.fed[-1].epoch for step in run.log]
    scores = {
        epoch: attributor.attribute(test, epoch=epoch).detach().numpy() for epoch in set(epochs)
    }
    found = np.zeros((1 + SINGLE, run.steps, trained.case.slots))
    for step, (logged, epoch) in enumerate(zip(run.log, epochs, strict=True)):
        rows = scores[epoch][list(logged.samples)].T  # [query, slot]
        found[:, step, : rows.shape[1]] = np.concatenate(
            [rows.mean(0, keepdims=True), rows[:SINGLE]]
        )
    return found


def embedding(rank: int, **settings: Any) -> Callable[[TrainedCase], np.ndarray]:
    """Our embeddings."""
    return partial(ours, backtrail.DataValueEmbedding(rank=rank, **settings))


METHODS: dict[str, Callable[[TrainedCase], np.ndarray]] = {
    "embedding, empirical, rank 256": embedding(256, fisher="empirical"),
    "embedding, true, rank 256": embedding(256, fisher="true"),
    "embedding, true, rank 256, together": embedding(256, layers="together"),
    "gradient-dot": partial(ours, backtrail.GradientDot()),
    "dattri DVEmb, Kronecker 512": partial(dattri, factors="kronecker", dimensions=512),
    "dattri DVEmb, Kronecker 768": partial(dattri, factors="kronecker", dimensions=768),
    "exact sweep (DIT)": partial(ours, backtrail.DIT()),
    "embedding, empirical, rank 64": embedding(64, fisher="empirical"),
    "embedding, true, rank 64": embedding(64, fisher="true"),
    "TracIn": partial(ours, backtrail.TracIn()),
    "sweep, Gauss-Newton": partial(ours, backtrail.DIT(curvature=backtrail.GaussNewton())),
    "sweep, empirical Fisher": partial(ours, backtrail.DIT(curvature=backtrail.EmpiricalFisher())),
    "dattri DVEmb, projection 512": partial(dattri, factors="none", dimensions=512),
}


def predictions(trained: TrainedCase, folder: Path) -> Iterator[tuple[str, np.ndarray | None]]:
    """What every method says of the removals; kept in files. None: dattri is not installed."""
    drawn = Drawn.of(trained.run)
    for name, method in METHODS.items():
        place = folder / f"{''.join(letter if letter.isalnum() else '-' for letter in name)}.npy"
        if not place.exists():
            if name.startswith("dattri") and find_spec("dattri") is None:
                yield name, None
                continue
            np.save(place, drawn.predicted(trained.run, method(trained)))
        yield name, np.load(place)


def figures(predicted: np.ndarray, actual: np.ndarray) -> Iterator[str]:
    """By kind of removal: of the mean loss, with its interval over removals; of single losses."""
    for kind in range(len(COLUMNS)):
        mean: Interval = bootstrap(spearman, predicted[0, kind], actual[0, kind])
        single = spearman(predicted[1:, kind], actual[1:, kind]).mean()
        yield f"{mean!s:20} {single:5.2f}"


def measure(chosen: Case) -> None:
    """Print the table of one training."""
    folder = Path("runs/papers/b1") / chosen.name
    trained = TrainedCase(chosen, folder / "run")
    if not trained.folder.exists():
        chosen.record(trained.train, trained.folder)
    actual = truth(trained, folder / "truth.npy")
    model, (inputs, labels) = trained.model(), trained.queries(TEST).tensors
    accuracy = float((model(inputs).argmax(1) == labels).float().mean())
    print(
        f"\n{trained.split[2]}, {len(trained.train)} samples, {chosen.about}, "
        f"test accuracy {accuracy:.2f}"
    )
    print(
        f"{'Spearman: mean loss [95 %], single':32}" + "".join(f"{column:29}" for column in COLUMNS)
    )
    for name, predicted in predictions(trained, folder):
        told = "not installed" if predicted is None else "   ".join(figures(predicted, actual))
        print(f"{name:34}{told}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for wanted in sys.argv[1:] or SETTINGS:
        measure(SETTINGS[wanted])
