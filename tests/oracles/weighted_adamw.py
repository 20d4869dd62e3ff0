"""AdamW on a network with BatchNorm written out, so that autograd differentiates all of it.

For the case "batchnorm, adamw" of `tests.cases`, where differences of trainings are too coarse for
small weights. Nothing here is an optimizer or a module of torch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu

from tests.cases import BATCHES, CASES_BY_NAME, CLASSES, rows
from tests.standard_queries import HELD_OUT

LR = 0.003
DECAY = 0.01
BETAS = (0.9, 0.999)
EPS = 1e-8


def queries_after(steps: int, weights: Sequence[Tensor]) -> Tensor:
    """Train, and return the standard queries with the running statistics, `[query]`.

    Args:
        steps: Number of steps.
        weights: Factors of the losses of the slots of each step, `[slot]`.
    """
    model = CASES_BY_NAME["batchnorm, adamw"].built()
    params = [parameter.detach().requires_grad_() for parameter in model.parameters()]
    first = [torch.zeros_like(parameter) for parameter in params]
    second = [torch.zeros_like(parameter) for parameter in params]
    running_mean = torch.zeros(5).double()
    running_variance = torch.ones(5).double()
    inputs, labels = rows().tensors
    for step in range(steps):
        batch = BATCHES[step]
        hidden = inputs[batch] @ params[0].T
        mean = hidden.mean(0)
        variance = hidden.var(0, unbiased=False)
        running_mean = 0.9 * running_mean + 0.1 * mean
        running_variance = 0.9 * running_variance + 0.1 * hidden.var(0)
        losses = cross_entropy(
            logits(params, hidden, mean, variance), labels[batch], reduction="none"
        )
        total = (losses * weights[step]).sum() / len(batch)
        grads = torch.autograd.grad(total, params, create_graph=True)
        for place, grad in enumerate(grads):
            first[place] = BETAS[0] * first[place] + (1 - BETAS[0]) * grad
            second[place] = BETAS[1] * second[place] + (1 - BETAS[1]) * grad.square()
            # The root of an entry that never had a gradient has no derivative, and no effect.
            dead = second[place] == 0
            corrected = torch.where(dead, 1.0, second[place]) / (1 - BETAS[1] ** (step + 1))
            direction = first[place] / (1 - BETAS[0] ** (step + 1)) / (corrected.sqrt() + EPS)
            moved = params[place] * (1 - LR * DECAY) - LR * torch.where(dead, 0.0, direction)
            params[place] = moved
    hidden = HELD_OUT.tensors[0] @ params[0].T
    outputs = logits(params, hidden, running_mean, running_variance)
    losses = cross_entropy(outputs, HELD_OUT.tensors[1], reduction="none")
    return torch.stack([losses[0], losses[2], losses.mean()])


def logits(params: Sequence[Tensor], hidden: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Normalise the first layer's outputs `[row, 5]`, and return the logits `[row, class]`."""
    normal = (hidden - mean) / (variance + 1e-5).sqrt()
    found: Tensor = gelu(normal * params[1] + params[2]) @ params[3].T + params[4]
    assert found.shape[1] == CLASSES
    return found
