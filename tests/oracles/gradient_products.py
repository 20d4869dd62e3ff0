"""Gradient products by plain PyTorch: one sample, one query, one parameter group at a time."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.cases import Case, loader, rows, steps

Read = Callable[[nn.Module], Tensor]  # the queries of a model, [query]
Look = Callable[
    [int, int], int
]  # step, observed state -> the state at which both gradients are taken


@dataclass(frozen=True)
class Trained:
    """A training as it went: the model at every state, and what every step used as rates, by parameter name."""

    models: list[nn.Module]
    rates: list[dict[str, float]]


def trained(case: Case) -> Trained:
    """Train by the plain loop, and look over its shoulder."""
    model = case.built()
    model.train()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = case.optimizer(model)
    found = Trained([copy.deepcopy(model)], [])

    def note(*_: object) -> None:
        of_step: dict[str, float] = {}
        for group in optimizer.param_groups:
            rate = -group["lr"] if group.get("maximize") else group["lr"]
            of_step |= {names[id(parameter)]: rate for parameter in group["params"]}
        found.rates.append(of_step)

    optimizer.register_step_pre_hook(note)
    for _ in steps(case, model, optimizer, iter(loader(case, rows())), None):
        found.models.append(copy.deepcopy(model))
    return found


def gradient_products(case: Case, read: Read, observed_at: Sequence[int], look: Look) -> np.ndarray:
    """Rate times c times the product of the gradients, [query, observed_at, step, slot]."""
    training = trained(case)
    counts = [sum(len(batch) for batch in group) for group in case.groups]
    queries = len(query_gradients(training.models[0], read))
    found = np.zeros((queries, len(observed_at), len(counts), max(counts)))
    for step, rates in enumerate(training.rates):
        for column, observed in enumerate(observed_at):
            if step >= observed:
                continue
            model = training.models[look(step, observed)]
            asked = query_gradients(model, read)
            for slot, sample in enumerate(slot_gradients(case, model, step)):
                for query, slope in enumerate(asked):
                    products = {name: float((slope[name] * sample[name]).sum()) for name in sample}
                    found[query, column, step, slot] = sum(
                        rates[name] * products[name] for name in products
                    )
    return found


def query_gradients(model: nn.Module, read: Read) -> list[dict[str, Tensor]]:
    """Of every query, in eval mode."""
    asked = copy.deepcopy(model).eval()
    return [gradient(asked, number) for number in read(asked)]


def slot_gradients(case: Case, model: nn.Module, step: int) -> list[dict[str, Tensor]]:
    """Of c times the loss of every slot, in train mode, in its micro-batch."""
    found = []
    for batch in case.groups[step]:
        training = copy.deepcopy(model).train()
        inputs, labels = rows()[list(batch)]
        losses = cross_entropy(training(inputs), labels, reduction="none")
        found += [gradient(training, loss / (case.accumulate * len(batch))) for loss in losses]
    return found


def gradient(model: nn.Module, number: Tensor) -> dict[str, Tensor]:
    """By every parameter that learns; zero where the number does not depend on it."""
    learning = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    found = torch.autograd.grad(
        number, list(learning.values()), retain_graph=True, allow_unused=True
    )
    return {
        name: torch.zeros_like(parameter) if slope is None else slope
        for (name, parameter), slope in zip(learning.items(), found, strict=True)
    }
