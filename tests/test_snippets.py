"""The first Python block of a page runs as it is printed, on a small training."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from tests.pages import ROOT, code_blocks

# Pages whose first block records a training itself.
RECORDING = ("README.md", "docs/index.md", "docs/recording.md")
# Pages whose first block reads the training of the fixture.
READING = (
    "docs/queries.md",
    "docs/reading.md",
    "docs/patterns.md",
    "docs/trust.md",
    "docs/evaluation.md",
    "docs/cleaning.md",
    "docs/diff-in.md",
    "docs/forgetting.md",
    "docs/coreset.md",
    "docs/how-it-works.md",
    "docs/memory.md",
    "docs/acceleration.md",
    "docs/threads.md",
)
# Pages whose first blocks need nothing.
ALONE = {"docs/quickstart.md": None, "docs/embeddings.md": 1}  # page: how many, None for all

pytestmark = pytest.mark.slow


def per_sample_loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    """Loss of each row: `[slot]`."""
    return cross_entropy(outputs, batch[1], reduction="none")


def training() -> dict[str, Any]:
    """Make the objects that the pages assume: a model, its data, its optimizer and its loader."""
    torch.manual_seed(0)
    inputs = torch.randn(300, 4)
    rows = TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())
    train_set = torch.utils.data.Subset(rows, range(240))
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    return {
        "backtrail": backtrail,
        "torch": torch,
        "model": model,
        "train_set": train_set,
        "test_set": torch.utils.data.Subset(rows, range(240, 300)),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "loader": DataLoader(train_set, batch_size=24, shuffle=True),
        "criterion": cross_entropy,
        "per_sample_loss": per_sample_loss,
    }


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of 60 steps, its influence, and checkpoints."""
    folder = tmp_path_factory.mktemp("snippets")
    names = training()
    model, optimizer = names["model"], names["optimizer"]
    task = backtrail.classification(model, names["train_set"])
    with backtrail.Recorder(folder / "runs" / "digits", task, optimizer) as recorder:
        for _ in range(6):
            for inputs, labels in recorder.watch(names["loader"]):
                cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    run = backtrail.open_run(folder / "runs" / "digits", task)
    queries = backtrail.Loss(names["test_set"], samples=[3, 17, 40])
    backtrail.DIT().attribute(
        run, queries, observed_at="epochs", out=folder / "runs" / "digits" / "dit"
    )
    (folder / "checkpoints").mkdir()
    for step in (2500, 5000):
        torch.save(model.state_dict(), folder / "checkpoints" / f"step{step}.pt")
    return folder


@pytest.fixture(scope="module")
def names(recorded: Path) -> dict[str, Any]:
    """What the pages have computed before: the run, its influence, and other methods."""
    found = training()
    task = backtrail.classification(found["model"], found["train_set"])
    run = backtrail.open_run(recorded / "runs" / "digits", task)
    queries = backtrail.Loss(found["test_set"], samples=[3, 17, 40])
    at_the_end = backtrail.DIT().attribute(run, queries)
    state = {name: tensor.clone() for name, tensor in found["model"].state_dict().items()}
    return found | {
        "task": task,
        "run": run,
        "queries": queries,
        "influence": backtrail.open_influence(recorded / "runs" / "digits" / "dit"),
        "dit": at_the_end,
        "tracin": backtrail.TracIn().attribute(run, queries),
        "scores": at_the_end.total()[:, -1],
        "mislabelled": [3, 17],
        "state_dict": state,
        "other": state,
    }


def run_blocks(page: str, names: dict[str, Any], *, count: int | None = 1) -> None:
    """Run the first blocks of a page, one after the other, with the same names."""
    for number, block in enumerate(code_blocks(ROOT / page, "python")[:count], 1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", RECORDING)
def test_a_page_that_records(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs no more than a model, data, an optimizer and a loader."""
    monkeypatch.chdir(tmp_path)
    run_blocks(page, training())


@pytest.mark.parametrize("page", READING)
def test_a_page_that_reads(
    page: str,
    recorded: Path,
    names: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It needs a run, and what was computed from it before."""
    monkeypatch.chdir(shutil.copytree(recorded, tmp_path / "work"))
    run_blocks(page, dict(names))


@pytest.mark.parametrize("page", ALONE)
def test_a_page_that_stands_alone(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes everything itself."""
    monkeypatch.chdir(tmp_path)
    run_blocks(page, {}, count=ALONE[page])
