"""A tiny recorded and attributed training, with its task file, for the tests of the CLI."""

import pytest

from backtrail import cli
from backtrail.cli.reference import _load
from tests.cli.attributed_run import AttributedRun

TASK_FILE = """
import torch
from torch.utils.data import DataLoader, TensorDataset
import backtrail

draw = torch.Generator().manual_seed(0)
data = TensorDataset(torch.randn(12, 3, generator=draw), torch.randint(2, (12,), generator=draw))

def make(seed=0):
    torch.manual_seed(seed)
    layers = torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    return backtrail.classification(torch.nn.Sequential(*layers), data)

task = make()
queries = backtrail.Loss(data, samples=[0, 3])
number = 3

def task_maker() -> backtrail.Task:
    return make()

def broken():
    return 1 / 0

def train(folder):
    made = make()
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.3)
    with backtrail.Recorder(folder, made, optimizer, checkpoints=backtrail.Every(4)) as recorder:
        for _ in range(3):
            for inputs, labels in recorder.watch(DataLoader(data, 4)):
                torch.nn.functional.cross_entropy(made.model(inputs), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
"""


@pytest.fixture(scope="session")
def attributed(tmp_path_factory: pytest.TempPathFactory) -> AttributedRun:
    """A run of nine steps in three epochs of twelve samples, and its influence on two losses."""
    attributed = AttributedRun(tmp_path_factory.mktemp("cli"))
    task_file = attributed.folder / "my_file.py"
    task_file.write_text(TASK_FILE)
    _load(task_file).train(attributed.run)
    words = ["attribute", attributed.run, *attributed.references]
    words += ["--observed-at", "epochs", "--out", attributed.influence]
    assert cli.main(words) == 0
    return attributed
