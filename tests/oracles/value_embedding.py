"""Data Value Embedding of a training under AdamW by plain PyTorch: full matrices, slot by slot."""

import torch
from torch import Tensor

from tests.cases import Case
from tests.oracles.gradient_products import slot_gradients, trained

BETA1 = 0.9
BETA2 = 0.999
EPSILON = 1e-8


def adamw_embeddings(case: Case, *, lr: float, decay: float) -> list[Tensor]:
    """Return the embeddings of every step, `[slot, entry]`, without projection.

    E_t = (P_{t+1} diag(eta_t) g_b)_b with P_t = prod over k >= t of ((1 - lr * decay) I - H_k),
    later steps on the left. H_k = sum over slots b of n c_b^2 (eta_k grad_b) grad_b^T is the
    empirical Fisher matrix of a batch of n with c = 1 / n, preconditioned by AdamW's rates eta_k.
    """
    training = trained(case)
    steps = len(training.models) - 1
    sizes = [parameter.numel() for parameter in case.built().parameters()]
    gradients = []
    for step in range(steps):
        gradients.append(_flat(slot_gradients(case, training.models[step], step)))
    batch_gradients = [of_slots.sum(0) for of_slots in gradients]
    rates = []
    for rate, gradient in zip(adam_rates(batch_gradients, lr), batch_gradients, strict=True):
        rates.append(_at_most_median(rate, gradient, sizes))
    identity = torch.eye(sum(sizes), dtype=torch.float64)
    propagator = identity
    embeddings: list[Tensor] = []
    for step in reversed(range(steps)):
        rate = rates[step]
        of_step = []
        fisher = torch.zeros_like(identity)
        for gradient in gradients[step]:
            of_step.append(propagator @ (rate * gradient))
            # These gradients hold c = 1 / n, so their products hold it twice: n puts one back.
            fisher += len(gradients[step]) * torch.outer(rate * gradient, gradient)
        embeddings.insert(0, torch.stack(of_step))
        propagator = propagator @ ((1 - lr * decay) * identity - fisher)
    return embeddings


def adam_rates(gradients: list[Tensor], lr: float) -> list[Tensor]:
    """Return the factor of the gradient in Adam's step at every step t = 1, 2, ...

    eta_t = lr / (1 - beta1^t) / (sqrt(v_t / (1 - beta2^t)) + eps), with
    v_t = beta2 v_{t-1} + (1 - beta2) g_t^2. There is no factor 1 - beta1: a lasting change of the
    gradient changes the mean of gradients by as much in the end.
    """
    v = torch.zeros_like(gradients[0])
    rates = []
    for t, gradient in enumerate(gradients, start=1):
        v = BETA2 * v + (1 - BETA2) * gradient.square()
        root = (v / (1 - BETA2**t)).sqrt()
        rates.append(lr / (1 - BETA1**t) / (root + EPSILON))
    return rates


def _at_most_median(rates: Tensor, gradient: Tensor, sizes: list[int]) -> Tensor:
    """Limit every parameter's rates to the (lower) median of those of entries with a gradient."""
    limited = []
    for rate, own_gradient in zip(rates.split(sizes), gradient.split(sizes), strict=True):
        used = sorted(rate[own_gradient != 0].tolist())
        limit = used[(len(used) - 1) // 2] if used else float("inf")
        limited.append(rate.clamp_max(limit))
    return torch.cat(limited)


def _flat(gradients: list[dict[str, Tensor]]) -> Tensor:
    """Return gradients as vectors in the order of the model's parameters, `[slot, entry]`."""
    vectors = []
    for gradient in gradients:
        vectors.append(torch.cat([tensor.flatten() for tensor in gradient.values()]))
    return torch.stack(vectors)
