"""Two questions that sound alike: what happened during a window, and what did the visits in it do?

window(a, b) asks how a sample, had it never been there, would have changed the *change of the
query* from state a to state b. visits(a, b) asks how the query at the *end* would be, had the
sample been left out in the steps a to b alone. Both are checked against training again.
"""

import tempfile

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

import backtrail

torch.manual_seed(0)
inputs = torch.randn(60, 5)
train_set = TensorDataset(inputs, (inputs[:, 0] * inputs[:, 1] > 0).long())
test_set = TensorDataset(inputs + 0.1 * torch.randn(60, 5), train_set.tensors[1])
model = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
task = backtrail.classification(model, train_set)
folder = tempfile.mkdtemp()

with backtrail.Recorder(folder, task, optimizer, checkpoints=backtrail.Epochs()) as recorder:
    for _ in range(6):
        for batch in recorder.watch(DataLoader(train_set, batch_size=10, shuffle=True)):
            torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
            optimizer.zero_grad()

run = backtrail.open_run(folder, task)
queries = backtrail.Loss(test_set, aggregate="mean")
influence = backtrail.DIT().attribute(run, queries, observed_at="epochs")  # states 6, 12, ... 36

samples = list(range(12))
window = influence.window(12, 24)[0, samples]
visits = influence.visits(12, 24)[0, samples]
print("correlation with training again without each of 12 samples")
for name, predicted, actual in (
    (
        "window(12, 24)",
        window,
        backtrail.leave_one_out(run, queries, samples=samples, window=(12, 24))[0],
    ),
    (
        "visits(12, 24)",
        visits,
        backtrail.leave_one_out(run, queries, samples=samples, steps=(12, 24))[0],
    ),
):
    print(f"  {name}: {np.corrcoef(predicted, actual)[0, 1]:.4f}")
print(f"correlation of the two with each other: {np.corrcoef(window, visits)[0, 1]:.4f}")

# One sample over time: its total influence at every observed state, and each visit seen from the
# end.
most = influence.top(1, order="absolute")["sample"][0]
print(influence.curve(sample=most))
print(influence.visits_curve(sample=most))
