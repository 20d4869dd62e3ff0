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
    """Diff-In of a case, for T steps, N samples and m states t with learning rates eta_t.

    Published: the term of a state is - t eta_t^2 / (m N) * (H_B G_z + H_z G_B), and is paired with
    gradients at that state. Corrected: it is T / (m N) * eta_t * (G_z - t H_B eta_t G_z), and is
    paired with gradients at the end. G_z and H_z are gradient and Hessian of a sample's loss, G_B
    and H_B those of the mean loss of the proxy batch, with the penalty. eta_t is a number for
    every entry of the parameters.

    Attributes:
        case: The training.
        states: The states t.
        proxy: The samples of the proxy batch B.
        seen: The number N of samples that the training has seen.
        form: "published" or "corrected".
        known: G_B and H_B by state, filled in as they are needed.
    """

    case: Case
    states: Sequence[int]
    proxy: Sequence[int]
    seen: int
    form: str
    known: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def term(self, training: Trained, state: int, sample: int) -> Tensor:
        """Return a state's term of a sample, a change of the flat parameters `[entry]`."""
        model = copy.deepcopy(training.models[state]).eval()
        eta = flat_rates(model, training, state)
        m_times_n = len(self.states) * self.seen
        g_z = flat_gradient(model, [sample])
        g_b, h_b = self.of_proxy(model, state)
        h_b_g_z = h_b @ (eta * g_z)
        if self.form == "corrected":
            steps = len(training.rates)
            return steps / m_times_n * eta * (g_z - state * h_b_g_z)
        h_z = flat_hessian(model, [sample])
        h_z_g_b = h_z @ (eta * g_b)
        return -state / m_times_n * eta * (h_b_g_z + h_z_g_b)

    def of_proxy(self, model: nn.Module, state: int) -> tuple[Tensor, Tensor]:
        """Return G_B `[entry]` and H_B `[entry, entry]` at a state, penalty included."""
        if state not in self.known:
            gradient = flat_gradient(model, self.proxy)
            hessian = flat_hessian(model, self.proxy)
            if self.case.penalty is not None:
                penalty = self.case.penalty(dict(model.named_parameters()))
                gradient = gradient + gradient_of(penalty, model)
                hessian = hessian + hessian_of(penalty, model)
            self.known[state] = (gradient, hessian)
        return self.known[state]

    def paired_model(self, training: Trained, state: int) -> nn.Module:
        """Return the model, in eval mode, whose gradients a state's term is paired with."""
        model = training.models[-1] if self.form == "corrected" else training.models[state]
        return copy.deepcopy(model).eval()

    def of_queries(self, read: Read) -> np.ndarray:
        """Return the terms paired with the queries' gradients, `[query, state, sample]`."""
        training = trained(self.case)
        by_state = []
        for state in self.states:
            jacobian = flat_jacobian(self.paired_model(training, state), read)
            by_sample = []
            for sample in range(self.seen):
                by_sample.append(jacobian @ self.term(training, state, sample))
            by_state.append(torch.stack(by_sample, 1))
        return torch.stack(by_state, 1).numpy()

    def of_themselves(self, samples: Sequence[int]) -> np.ndarray:
        """Return the sums of terms paired with the gradients of the own losses, `[sample]`."""
        training = trained(self.case)
        totals = []
        for sample in samples:
            total = 0.0
            for state in self.states:
                g_z = flat_gradient(self.paired_model(training, state), [sample])
                total += float(g_z @ self.term(training, state, sample))
            totals.append(total)
        return np.array(totals)

    def of_removal(self, samples: Sequence[int]) -> Tensor:
        """Return the sum of all terms of some samples, the change of the parameters `[entry]`."""
        training = trained(self.case)
        terms = []
        for state in self.states:
            for sample in samples:
                terms.append(self.term(training, state, sample))
        return torch.stack(terms).sum(0)


def flat_rates(model: nn.Module, training: Trained, state: int) -> Tensor:
    """Return the learning rate of every entry in the step from a state on, `[entry]`."""
    # The last state has no step: it counts with the rates of the last one.
    step = min(state, len(training.rates) - 1)
    rates = []
    for name, parameter in model.named_parameters():
        rates.append(torch.full((parameter.numel(),), training.rates[step][name]).double())
    return torch.cat(rates)


def mean_loss(model: nn.Module, samples: Sequence[int]) -> Tensor:
    """Return the mean loss of samples."""
    inputs, labels = rows()[list(samples)]
    return cross_entropy(model(inputs), labels)


def flat_gradient(model: nn.Module, samples: Sequence[int]) -> Tensor:
    """Return the gradient of the mean loss of samples, `[entry]`."""
    return gradient_of(mean_loss(model, samples), model)


def flat_hessian(model: nn.Module, samples: Sequence[int]) -> Tensor:
    """Return the dense Hessian of the mean loss of samples, `[entry, entry]`."""
    return hessian_of(mean_loss(model, samples), model)


def flat_jacobian(model: nn.Module, read: Read) -> Tensor:
    """Return the gradients of all queries, `[query, entry]`."""
    return torch.stack([gradient_of(query, model) for query in read(model)])


def gradient_of(value: Tensor, model: nn.Module) -> Tensor:
    """Return the gradient of a number by all parameters of a model, `[entry]`."""
    gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def hessian_of(value: Tensor, model: nn.Module) -> Tensor:
    """Return the second derivatives of a number by all parameters of a model, `[entry, entry]`."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(value, parameters, create_graph=True)
    gradient = torch.cat([each.flatten() for each in gradients])
    return torch.stack([gradient_of(entry, model) for entry in gradient])
