"""Ten lines of recording and attribution: which handwritten digits shaped what the model says of three others?

Needs scikit-learn for the data: pip install 'backtrail[demo]'.
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

# Record: the loop is yours; two lines of it are new.
task = backtrail.classification(model, train_set)
with backtrail.Recorder(f"{folder}/run", task, optimizer) as recorder:
    for _ in range(5):
        for inputs, targets in recorder.watch(loader):
            torch.nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()

# Ask: the losses of three digits that the model has not seen.
run = backtrail.open_run(f"{folder}/run", task)
queries = backtrail.Loss(digits, samples=[1003, 1017, 1040])
influence = backtrail.DIT().attribute(run, queries, observed_at="epochs", out=f"{folder}/influence")

# Look: negative = harmful, that is, without the sample the loss would be lower.
print(influence)
print(influence.top(5, query="loss[1017]", order="helpful"))
