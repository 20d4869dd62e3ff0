"""What Diff-In costs: `python -m bench.diff_in`, processor time on one thread.

The unit is m passes over the samples that do nothing but take the gradient of each by torch.func, m
being the number of states looked at.
"""

import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import TensorDataset

import backtrail

STATES, CHUNK, REPEATS = 5, 256, 3


def digits(number: int) -> TensorDataset:
    """Handwritten digits, repeated with noise up to a number."""
    inputs, labels = load_digits(return_X_y=True)
    torch.manual_seed(0)
    rows = torch.arange(number) % len(inputs)
    pictures = torch.tensor(inputs / 16, dtype=torch.float32)[rows]
    return TensorDataset(pictures + 0.05 * torch.randn_like(pictures), torch.tensor(labels)[rows])


def perceptron() -> nn.Module:
    """9,610 parameters."""
    return nn.Sequential(
        nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)
    )


def convolutions() -> nn.Module:
    """19,658 parameters."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.GELU(),
        nn.Conv2d(32, 48, 3, padding=1, stride=2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(192, 4),
        nn.Linear(4, 10),
    )


def passed(model: nn.Module, data: TensorDataset) -> None:
    """The gradient of every row, and nothing else."""
    params = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], inputs: Tensor, label: Tensor) -> Tensor:
        outputs: Tensor = functional_call(model, parameters, (inputs[None],))
        return nn.functional.cross_entropy(outputs, label[None])

    for first in range(0, len(data), CHUNK):
        inputs, labels = data[first : first + CHUNK]
        with torch.no_grad():
            vmap(grad(loss), in_dims=(None, 0, 0))(params, inputs, labels)


def seconds(work: Callable[[], object]) -> float:
    """The least processor time of a few repeats."""
    times = []
    for _ in range(REPEATS):
        begun = time.process_time()
        work()
        times.append(time.process_time() - begun)
    return min(times)


def measure(build: Callable[[], nn.Module], number: int) -> None:
    """One line a method."""
    model, data = build(), digits(number)
    task = backtrail.classification(model, data)
    checkpoints = backtrail.Checkpoints(
        task, [(t, model.state_dict(), 0.01) for t in range(20, 101, 20)], steps=100
    )
    unit = STATES * seconds(lambda: passed(model, data))
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{build.__name__}, {count} parameters, {number} samples: unit {unit:.2f} s")
    for form in ("corrected", "published"):
        made = backtrail.DiffIn(STATES, form)  # type: ignore[arg-type]
        for rows in (1, 10):
            query = backtrail.Loss(data, samples=range(rows))
            cost = seconds(lambda made=made, query=query: made.attribute(checkpoints, query)) / unit
            print(f"  {form}, attribute, {rows} queries: {cost:.2f}")
        cost = seconds(lambda made=made: made.self_influence(checkpoints)) / unit
        print(f"  {form}, self_influence: {cost:.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for build in (perceptron, convolutions):
        measure(build, 5000)
