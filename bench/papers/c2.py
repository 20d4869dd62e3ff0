"""Finding wrong labels: python -m bench.papers.c2 [setting ...] [seed ...].

MNIST and CIFAR-10 (at 16 x 16), 1,000 images each, and docstrings of six packages, 1,000 texts; a
share of the labels is replaced by another class, drawn evenly. A small network is trained until it
begins to know the wrong labels by heart. Figure: precision among as many first samples as there are
wrong labels. "dit" and "dve" are asked about the mean loss of 200 rows with right labels, and of
the training set; "left out" is the loss at the end plus the influence on it by embeddings of the
sample itself. Seeds below 100 are for reporting; rankings were chosen on others. BACKTRAIL_DATA
names a folder with MNIST and CIFAR-10; without it both are scikit-learn's digits. What was found is
kept in runs/papers/c2.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.apply import signals as scores
from backtrail.methods.diff_in.trajectory import chosen_states
from backtrail.stats import precision_at
from bench import data
from bench.papers import docstrings
from bench.papers.seeds import Figures, kept, line, told

FOLDER = Path("runs/papers/c2")
ROWS, RIGHT, SLOTS, SEEDS = 1000, 200, 50, range(5)
Rows = tuple[Tensor, Tensor]


def mnist() -> Rows:
    """Rows of 784."""
    whole = data.mnist_rows(10_000, 0)[0] if data.folder("mnist") else data.digits(1797, 0)[0]
    inputs, labels = whole.tensors
    return inputs, labels


def cifar() -> Rows:
    """Rows of 768."""
    inputs, labels = (
        data.cifar(10_000, 0)[0].tensors
        if data.folder("cifar10")
        else data.digits(1797, 0)[0].tensors
    )
    return inputs.flatten(1), labels


def mlp(load: Callable[[], Rows]) -> nn.Module:
    """One hidden layer of 64."""
    return nn.Sequential(nn.Linear(load()[0].shape[1], 64), nn.GELU(), nn.Linear(64, 10))


@dataclass(frozen=True)
class Setting:
    """A data set with a share of wrong labels, and how it is learned."""

    name: str
    load: Callable[[], Rows]
    build: Callable[[], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    epochs: int
    share: float


ADAMW = torch.optim.AdamW
KINDS: dict[str, tuple[Any, ...]] = {
    "mnist": (mnist, partial(mlp, mnist), partial(torch.optim.SGD, lr=0.1, momentum=0.9), 10),
    "cifar": (cifar, partial(mlp, cifar), partial(ADAMW, lr=1e-3), 12),
    "docstrings": (docstrings.rows, docstrings.Bag, partial(ADAMW, lr=1e-2), 8),
}
SHARES = {"mnist": (0.1, 0.3), "cifar": (0.1, 0.4), "docstrings": (0.1, 0.3)}
SETTINGS = {
    f"{kind}-{share * 100:.0f}": Setting(kind, *KINDS[kind], share)
    for kind, shares in SHARES.items()
    for share in shares
}


@dataclass(frozen=True)
class Trained:
    """A recorded training.

    Attributes:
        run: the recording.
        right: rows with right labels, of which none was trained on.
        wrong: which training labels are wrong.
        truth: the right ones.
    """

    run: backtrail.Run
    right: TensorDataset
    wrong: Bool[np.ndarray, " sample"]
    truth: np.ndarray

    @cached_property
    def embeddings(self) -> backtrail.Embeddings:
        """Of all visits."""
        return backtrail.DataValueEmbedding().embed(self.run)

    @cached_property
    def held_out(self) -> pl.DataFrame:
        """The table of re-runs, by sample."""
        return backtrail.find_mislabeled(self.run).sort("sample")

    @cached_property
    def by_loss(self) -> pl.DataFrame:
        """The table of the losses, by sample; what it suggests is by the checkpoints."""
        return backtrail.find_mislabeled(self.run, method="loss").sort("sample")


def flipped(labels: Tensor, share: float, seed: int) -> tuple[Tensor, np.ndarray]:
    """Labels with a share of them replaced by another class, and which."""
    draw, classes = np.random.default_rng(seed), int(labels.max()) + 1
    wrong = np.zeros(len(labels), dtype=bool)
    wrong[draw.permutation(len(labels))[: round(share * len(labels))]] = True
    other = (labels + torch.from_numpy(draw.integers(1, classes, len(labels)))) % classes
    return torch.where(torch.from_numpy(wrong), other, labels), wrong


def train(setting: Setting, seed: int, folder: Path) -> Trained:
    """Record one training."""
    inputs, labels = setting.load()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rows, rest = order[:ROWS], order[ROWS : ROWS + RIGHT]
    given, wrong = flipped(labels[rows], setting.share, seed)
    torch.manual_seed(seed)
    model, known = setting.build(), TensorDataset(inputs[rows], given)
    task, optimizer = backtrail.classification(model, known), setting.optimizer(model.parameters())
    with backtrail.Recorder(folder, task, optimizer, checkpoints=backtrail.Epochs()) as recorder:
        for _ in range(setting.epochs):
            for batch in recorder.watch(DataLoader(known, SLOTS, shuffle=True)):
                cross_entropy(model(batch[0]), batch[1]).backward()
                optimizer.step()
                optimizer.zero_grad()
    right = TensorDataset(inputs[rest], labels[rest])
    return Trained(backtrail.open_run(folder, task), right, wrong, labels[rows].numpy())


def by(method: Any, trained: Trained, **options: Any) -> np.ndarray:
    """The suspicion of every sample by `find_mislabeled`."""
    return (
        backtrail.find_mislabeled(trained.run, method=method, **options)
        .sort("sample")["score"]
        .to_numpy()
    )


def held_out(trained: Trained) -> np.ndarray:
    """The same by re-runs, which are made once."""
    return trained.held_out["score"].to_numpy()


def el2n_early(trained: Trained) -> np.ndarray:
    """EL2N over the first half of the checkpoints: nearer to its paper, on early training."""
    states = chosen_states(trained.run, 10)
    return scores.el2n(trained.run, states[: len(states) // 2])


def left_out(trained: Trained) -> np.ndarray:
    """To first order, the loss of a sample at the end of a training without it."""
    run = trained.run
    own = trained.embeddings.attribute(backtrail.Loss(run.task.data)).total()[:, -1].diagonal()
    return scores.losses(run, run.steps) + own


def swept(trained: Trained) -> np.ndarray:
    """Harm to the rows with right labels, exactly."""
    return by("dit", trained, validation=trained.right)


def embedded(trained: Trained, *, own: bool) -> np.ndarray:
    """Harm to the training set or to the rows with right labels, by embeddings made once."""
    rows = trained.run.task.data if own else trained.right
    return by(trained.embeddings.attribute(backtrail.Loss(rows, aggregate="mean")), trained)


OTHERS: Mapping[str, Callable[[Trained], np.ndarray]] = {
    "loss": partial(by, "loss"),
    "TracIn": partial(by, "tracin"),
    "EL2N": partial(by, "el2n"),
    "EL2N, first half": el2n_early,
}
OURS: Mapping[str, Callable[[Trained], np.ndarray]] = {
    "held-out": held_out,
    "mean-loss": partial(by, "mean-loss"),
    "margin": partial(by, "margin"),
    "Diff-In": partial(by, "self-influence", checkpoints=5),
    "left out (DVE)": left_out,
    "DIT, right rows": swept,
    "DVE, right rows": partial(embedded, own=False),
    "DVE, own rows": partial(embedded, own=True),
}
SUGGESTED = "suggested, held-out", "suggested, checkpoints"


def figures(setting: Setting, seed: int) -> Figures:
    """Precision of every ranking; and how often the suggested label of a wrong one is right."""
    with tempfile.TemporaryDirectory() as scratch:
        trained = train(setting, seed, Path(scratch) / "run")
        found = {
            name: precision_at(ranking(trained), trained.wrong)
            for name, ranking in {**OTHERS, **OURS}.items()
        }
        for name, table in zip(SUGGESTED, (trained.held_out, trained.by_loss), strict=True):
            found[name] = float(
                (table["suggested"].to_numpy() == trained.truth)[trained.wrong].mean()
            )
        state, (inputs, labels) = trained.run.state(trained.run.steps), trained.right.tensors
        outputs, _ = trained.run.task.outputs(state.params, state.buffers, (inputs, labels))
        return found | {"accuracy": float((outputs.argmax(1) == labels).double().mean())}


def main(settings: list[str], seeds: list[int]) -> None:
    """Print both tables."""
    columns = [name for names in (OTHERS, OURS) for name in names]
    print(
        line(
            [
                "setting",
                "accuracy",
                *columns,
                "held-out less the best of the first four",
                *SUGGESTED,
            ]
        )
    )
    print(line(["---"] * (len(columns) + 5)))
    for name in settings:
        found = [
            kept(FOLDER / f"{name}-{seed}.json", partial(figures, SETTINGS[name], seed))
            for seed in seeds
        ]
        best = max(OTHERS, key=lambda other: sum(one[other] for one in found))
        gains = [one["held-out"] - one[best] for one in found]
        cells = [told([one[column] for one in found]) for column in columns]
        ends = [told([one[column] for one in found]) for column in SUGGESTED]
        accuracy = f"{np.mean([one['accuracy'] for one in found]):.2f}"
        print(
            line([name, accuracy, *cells, f"{told(gains, signed=True)} ({best})", *ends]),
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(
        [word for word in sys.argv[1:] if not word.isdigit()] or list(SETTINGS),
        [int(word) for word in sys.argv[1:] if word.isdigit()] or list(SEEDS),
    )
