"""Attribute other scalars than a loss: one weight, one hidden unit, or a function of your own.

Every query is a named scalar; influence is the change of that scalar when a sample is removed.
"""

import tempfile

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import backtrail

torch.manual_seed(0)
inputs = torch.randn(80, 4)
train_set = TensorDataset(inputs, (inputs.sum(1) > 0).long())
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
task = backtrail.classification(model, train_set)
folder = tempfile.mkdtemp()

with backtrail.Recorder(folder, task, optimizer) as recorder:
    for _ in range(4):
        for batch in recorder.watch(DataLoader(train_set, batch_size=16, shuffle=True)):
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
            optimizer.zero_grad()


def unfairness(model: nn.Module) -> Tensor:
    """Difference of the mean scores of two groups: a scalar of your own."""
    scores: Tensor = model(train_set.tensors[0]).softmax(1)[:, 1]
    group = train_set.tensors[0][:, 3] > 0
    return scores[group].mean() - scores[~group].mean()


run = backtrail.open_run(folder, task)
for queries in (
    backtrail.Parameter("2.weight", [(0, 0), (1, 0)]),
    backtrail.Feature(train_set, samples=[5], layer="1", unit=3),
    backtrail.Custom(unfairness, labels=["score gap of the groups"], unit="probability"),
):
    influence = backtrail.DIT().attribute(run, queries)
    for name in influence.queries:
        first = influence.top(1, query=name, order="absolute").row(0, named=True)
        print(
            f"{name}: most influential sample {first['sample']}, "
            f"whose removal changes it by {first['influence']:+.5f} {influence.unit}"
        )
