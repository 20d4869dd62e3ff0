"""Record a loop with gradient accumulation, clipping, a penalty and a learning rate schedule.

The recorder detects batches and steps by itself. The task has to declare what the loop does to the
loss and the gradient: how it averages (`reduce`), what it adds (`penalty`), how it clips (`clip`).
If a declaration is missing, the recorder stops at the first step with an error, because a replay
could not reproduce the gradients.
"""

import tempfile

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail import BacktrailError

MICRO_BATCHES = 4
STRENGTH = 1e-3  # of the penalty
LARGEST = 0.5  # norm of a gradient after clipping

torch.manual_seed(0)
inputs = torch.randn(96, 6)
train_set = TensorDataset(inputs, inputs[:, :1] * inputs[:, 1:2])
loader = DataLoader(train_set, batch_size=8)


def ridge(params: dict[str, Tensor]) -> Tensor:
    """The regularizer that the loop adds to its loss."""
    return STRENGTH * torch.stack([tensor.square().sum() for tensor in params.values()]).sum()


def train(task: backtrail.Task, folder: str) -> None:
    """An ordinary loop with four micro-batches per step."""
    model = task.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
    with backtrail.Recorder(folder, task, optimizer) as recorder:
        for _ in range(10):
            for number, (x, y) in enumerate(recorder.watch(loader), 1):
                loss = (model(x) - y).square().mean() / MICRO_BATCHES
                loss.backward()
                if number % MICRO_BATCHES == 0:
                    ridge(dict(model.named_parameters())).backward()
                    nn.utils.clip_grad_norm_(model.parameters(), LARGEST)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()


def network() -> nn.Module:
    """A small regression network."""
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 1))


# Clipping is not declared here, so the gradients of the task are not those of the loop.
try:
    train(backtrail.regression(network(), train_set, penalty=ridge), tempfile.mkdtemp())
except BacktrailError as error:
    print(f"Without clip=..., the recorder stops:\n  {error}\n")

folder = tempfile.mkdtemp()
task = backtrail.regression(
    network(), train_set, reduce="mean", penalty=ridge, clip=backtrail.ClipNorm(LARGEST)
)
train(task, folder)
run = backtrail.open_run(folder, task)
print(run)
print(run.verify())
influence = backtrail.DIT().attribute(run, backtrail.Loss(train_set, aggregate="mean"))
print(backtrail.trust(run, influence, removals=16))
