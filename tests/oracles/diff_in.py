"""Diff-In by plain PyTorch: one sample, one state, one dense Hessian at a time."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.cases import Case, rows
from tests.oracles.gradient_products import Read, Trained, trained


@dataclass(frozen=True)
class Oracle:
    """The sums of METHODS, term by term, for a training with the proxy batch `proxy`."""

    case: Case
    states: Sequence[int]
    proxy: Sequence[int]
    seen: int
    form: str
    known: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def term(self, training: Trained, state: int, sample: int) -> tuple[nn.Module, Tensor]:
        """The model at a state, and the change of its parameters, flat, that the state's term of a sample is."""
        model = copy.deepcopy(training.models[state]).eval()
        rates, steps = flat_rates(model, training, state), len(training.rates)
        if state not in self.known:
            hessian = flat_hessian(self.case, model, self.proxy, penalty="with")
            self.known[state] = flat_gradient(model, self.proxy) + self.penalty(model), hessian
        own, (theirs, hessian) = flat_gradient(model, [sample]), self.known[state]
        bent = hessian @ (rates * own)
        if self.form == "corrected":
            return model, steps / (len(self.states) * self.seen) * rates * (own - state * bent)
        crossed = flat_hessian(self.case, model, [sample], penalty="without") @ (rates * theirs)
        return model, -state / (len(self.states) * self.seen) * rates * (bent + crossed)

    def penalty(self, model: nn.Module) -> Tensor:
        """The gradient of the penalty, flat."""
        named: dict[str, Tensor] = dict(model.named_parameters())
        if self.case.penalty is None:
            return torch.zeros(sum(p.numel() for p in named.values()), dtype=torch.float64)
        return torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(self.case.penalty(named), list(named.values()))
            ]
        )

    def of_queries(self, read: Read) -> np.ndarray:
        """The terms paired with queries, [query, state, sample]."""
        training, found = trained(self.case), []
        for state in self.states:
            terms = [self.term(training, state, sample) for sample in range(self.seen)]
            asked = training.models[-1] if self.form == "corrected" else training.models[state]
            slopes = flat_jacobian(copy.deepcopy(asked).eval(), read)
            found.append(torch.stack([slopes @ change for _, change in terms], 1))
        return torch.stack(found, 1).numpy()

    def of_themselves(self, samples: Sequence[int]) -> np.ndarray:
        """The sums paired with the samples' own losses."""
        training = trained(self.case)
        end, found = copy.deepcopy(training.models[-1]).eval(), []
        for sample in samples:
            total = 0.0
            for state in self.states:
                model, change = self.term(training, state, sample)
                total += float(
                    flat_gradient(end if self.form == "corrected" else model, [sample]) @ change
                )
            found.append(total)
        return np.array(found)

    def of_removal(self, samples: Sequence[int]) -> Tensor:
        """The change of the parameters, flat."""
        training = trained(self.case)
        changes = [
            self.term(training, state, sample)[1] for state in self.states for sample in samples
        ]
        return torch.stack(changes).sum(0)


def flat_rates(model: nn.Module, training: Trained, state: int) -> Tensor:
    """The rate of every entry, as the step from the state used it."""
    by_name = training.rates[min(state, len(training.rates) - 1)]
    return torch.cat(
        [torch.full((p.numel(),), by_name[name]).double() for name, p in model.named_parameters()]
    )


def loss(model: nn.Module, samples: Sequence[int]) -> Tensor:
    """Mean over samples."""
    inputs, labels = rows()[list(samples)]
    return cross_entropy(model(inputs), labels)


def flat_gradient(model: nn.Module, samples: Sequence[int]) -> Tensor:
    """Of the mean loss of samples."""
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss(model, samples), list(model.parameters()))]
    )


def flat_jacobian(model: nn.Module, read: Read) -> Tensor:
    """Of queries, [query, entry]."""
    slopes = [
        torch.autograd.grad(number, list(model.parameters()), retain_graph=True)
        for number in read(model)
    ]
    return torch.stack([torch.cat([g.flatten() for g in slope]) for slope in slopes])


def flat_hessian(case: Case, model: nn.Module, samples: Sequence[int], *, penalty: str) -> Tensor:
    """Second derivatives of the mean loss of samples, dense."""
    parameters, total = list(model.parameters()), loss(model, samples)
    if case.penalty is not None and penalty == "with":
        total = total + case.penalty(dict(model.named_parameters()))
    slopes = torch.cat(
        [g.flatten() for g in torch.autograd.grad(total, parameters, create_graph=True)]
    )
    columns = [torch.autograd.grad(slope, parameters, retain_graph=True) for slope in slopes]
    return torch.stack([torch.cat([g.flatten() for g in column]) for column in columns])
