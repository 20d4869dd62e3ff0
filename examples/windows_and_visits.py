"""Compare the influence of a window with that of the visits in the same steps.

window(a, b) is the effect of removing a sample from the whole training on the *change of the query*
from state a to state b. visits(a, b) is the effect of removing it from the steps a to b only on the
query at the *end*. Both are compared with retraining.
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
actual_window = backtrail.leave_one_out(run, queries, samples=samples, window=(12, 24))[0]
actual_visits = backtrail.leave_one_out(run, queries, samples=samples, steps=(12, 24))[0]
print("correlation with retraining without each of 12 samples")
print(f"  window(12, 24): {np.corrcoef(window, actual_window)[0, 1]:.4f}")
print(f"  visits(12, 24): {np.corrcoef(visits, actual_visits)[0, 1]:.4f}")
print(f"correlation of the two with each other: {np.corrcoef(window, visits)[0, 1]:.4f}")

# One sample over time: its total influence at every observed state, and the influence of each visit
# on the final state.
most = influence.top(1, order="absolute")["sample"][0]
print(influence.curve(sample=most))
print(influence.visits_curve(sample=most))
