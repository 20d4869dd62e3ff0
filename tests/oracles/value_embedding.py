"""Data Value Embedding of a training under AdamW by plain PyTorch: whole matrices, one slot after the other."""

import torch
from torch import Tensor

from tests.cases import Case
from tests.oracles.gradient_products import slot_gradients, trained


def adamw_embeddings(case: Case, *, lr: float, decay: float) -> list[Tensor]:
    """Vectors of all parameters towards the end, `[slot, entry]` by step, with the empirical Fisher matrix."""
    training = trained(case)
    count = len(training.models) - 1
    gradients = [_flat(slot_gradients(case, training.models[step], step)) for step in range(count)]
    sizes = [parameter.numel() for parameter in case.built().parameters()]
    means = [slots.sum(0) for slots in gradients]
    rates = [
        _at_most_median(*pair, sizes) for pair in zip(adam_rates(means, lr), means, strict=True)
    ]
    one = torch.eye(len(rates[0]), dtype=torch.float64)
    found, transport = [], one
    for slots, rate in zip(gradients[::-1], rates[::-1], strict=True):
        found.append(rate * slots @ transport.T)
        # The oracle's gradients have c = 1 / n in them, so their products have it squared.
        curved = len(slots) * torch.stack([torch.outer(rate * slot, slot) for slot in slots]).sum(0)
        transport = transport @ ((1 - lr * decay) * one - curved)
    return found[::-1]


def adam_rates(gradients: list[Tensor], lr: float) -> list[Tensor]:
    """What every step multiplies the mean gradient by, from the textbook."""
    squares, found = torch.zeros_like(gradients[0]), []
    for step, gradient in enumerate(gradients, start=1):
        squares = 0.999 * squares + 0.001 * gradient.square()
        root = (squares / (1 - 0.999**step)).sqrt()
        found.append(lr / (1 - 0.9**step) / (root + 1e-8))
    return found


def _at_most_median(rates: Tensor, mean: Tensor, sizes: list[int]) -> Tensor:
    """Parameter by parameter, of the entries with a gradient; of an even number, the lower one in the middle."""
    found = []
    for rate, gradient in zip(rates.split(sizes), mean.split(sizes), strict=True):
        alive = sorted(rate[gradient != 0].tolist())
        found.append(rate.clamp_max(alive[(len(alive) - 1) // 2]) if alive else rate)
    return torch.cat(found)


def _flat(gradients: list[dict[str, Tensor]]) -> Tensor:
    """In the order of the model's parameters."""
    return torch.stack(
        [torch.cat([tensor.flatten() for tensor in one.values()]) for one in gradients]
    )
