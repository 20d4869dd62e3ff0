"""Record a training on handwritten digits and attribute the losses of three test digits to it.

Needs scikit-learn for the data: `pip install '.[demo]'` in a checkout.
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import backtrail

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
digits = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
train_set = torch.utils.data.Subset(digits, range(1000))
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = DataLoader(train_set, batch_size=50, shuffle=True)
folder = tempfile.mkdtemp()

# Record: two lines of the loop are new.
task = backtrail.classification(model, train_set)
with backtrail.Recorder(f"{folder}/run", task, optimizer) as recorder:
    for _ in range(5):
        for inputs, targets in recorder.watch(loader):
            torch.nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()

# Attribute: the queries are the losses of three digits that are not in the training set.
run = backtrail.open_run(f"{folder}/run", task)
queries = backtrail.Loss(digits, samples=[1003, 1017, 1040])
influence = backtrail.DIT().attribute(run, queries, observed_at="epochs", out=f"{folder}/influence")

# Read: negative = harmful, that is, the loss would be lower without the sample.
print(influence)
print(influence.top(5, query="loss[1017]", order="helpful"))
