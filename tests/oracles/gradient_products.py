"""Inner products of gradients by plain PyTorch: one sample, one query, one parameter at a time."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.cases import Case, loader, rows, steps

Read = Callable[[nn.Module], Tensor]  # from a model to its queries, [query]
# From a step and an observed state to the state at which both gradients are taken.
GradientState = Callable[[int, int], int]


@dataclass(frozen=True)
class Trained:
    """A training as it went.

    Attributes:
        models: The model at every state, from state 0 on.
        rates: The learning rate of every step, by name of the parameter.
    """

    models: list[nn.Module]
    rates: list[dict[str, float]]


def trained(case: Case) -> Trained:
    """Train a case by its plain loop, and copy the model after every step."""
    model = case.built()
    model.train()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = case.optimizer(model)
    models = [copy.deepcopy(model)]
    rates: list[dict[str, float]] = []

    # A scheduler changes the rates after a step, so they are read before it.
    def read_rates(*_: object) -> None:
        of_step: dict[str, float] = {}
        for group in optimizer.param_groups:
            # With maximize=True the step goes up the gradient.
            rate = -group["lr"] if group.get("maximize") else group["lr"]
            for parameter in group["params"]:
                of_step[names[id(parameter)]] = rate
        rates.append(of_step)

    optimizer.register_step_pre_hook(read_rates)
    for _ in steps(case, model, optimizer, iter(loader(case, rows())), None):
        models.append(copy.deepcopy(model))
    return Trained(models, rates)


def gradient_products(
    case: Case, read: Read, observed_at: Sequence[int], gradient_state: GradientState
) -> np.ndarray:
    """Return the influence of every slot without curvature, `[query, observed_at, step, slot]`.

    I[q, tau, t, b] = rate_t * c_{t,b} * <grad q(theta), grad loss_b(theta)> for t < tau, with both
    gradients at the state theta that `gradient_state(t, tau)` names.
    """
    training = trained(case)
    queries = len(query_gradients(training.models[0], read))
    counts = []
    for group in case.groups:
        counts.append(sum(len(batch) for batch in group))
    influence = np.zeros((queries, len(observed_at), len(counts), max(counts)))
    for column, observed in enumerate(observed_at):
        for step in range(min(observed, len(counts))):
            model = training.models[gradient_state(step, observed)]
            of_queries = query_gradients(model, read)
            of_slots = slot_gradients(case, model, step)
            for query, of_query in enumerate(of_queries):
                for slot, of_slot in enumerate(of_slots):
                    total = 0.0
                    for name, rate in training.rates[step].items():
                        # A parameter that does not learn has a rate and no gradient.
                        if name in of_slot:
                            total += rate * float((of_query[name] * of_slot[name]).sum())
                    influence[query, column, step, slot] = total
    return influence


def query_gradients(model: nn.Module, read: Read) -> list[dict[str, Tensor]]:
    """Return the gradient of every query, with the model in eval mode."""
    evaluated = copy.deepcopy(model).eval()
    return [gradient(evaluated, query) for query in read(evaluated)]


def slot_gradients(case: Case, model: nn.Module, step: int) -> list[dict[str, Tensor]]:
    """Return the gradient of c times the loss of every slot, in train mode and in its batch."""
    gradients = []
    for batch in case.groups[step]:
        # A copy for every batch, as BatchNorm's statistics change in the forward pass.
        training = copy.deepcopy(model).train()
        inputs, labels = rows()[list(batch)]
        losses = cross_entropy(training(inputs), labels, reduction="none")
        c = 1 / (case.accumulate * len(batch))
        for loss in losses:
            gradients.append(gradient(training, loss * c))
    return gradients


def gradient(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    """Return the gradient of a number by every parameter that learns, zero where it has none."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        (found,) = torch.autograd.grad(value, parameter, retain_graph=True, allow_unused=True)
        gradients[name] = torch.zeros_like(parameter) if found is None else found
    return gradients
