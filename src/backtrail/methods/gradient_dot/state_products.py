r"""What visits are worth at one state: the rate times the product of a query's gradient with a sample's, both there.

.. math:: \sum_g \eta_{t,g}\, c_{t,b}\, \langle \nabla_g q(\theta),\, \nabla_g \ell_b(\theta) \rangle

over the parameter groups g, with the rates and the reduction of the visit's own step t.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import msgspec
import numpy as np
import torch
from jaxtyping import Float

from backtrail.methods.gradient_dot.products import slot_products
from backtrail.methods.renormalize import coupled
from backtrail.methods.step_factors import rates, shares
from backtrail.queries import Query, gradients
from backtrail.run.run import Run
from backtrail.step.state import BatchRecord, State, Step
from backtrail.step.step import MicroBatch
from backtrail.tree import Tree, cast

Scores = Callable[
    [int], tuple[np.ndarray, np.ndarray]
]  # a step's scores [query, slot], and losses [slot]
Kind = tuple[
    tuple[str, ...], tuple[str, ...]
]  # of a step: which modules evaluate, which parameters rest


@final
@dataclass(frozen=True, slots=True)
class StateProducts:
    """A state, and the gradients of the queries there, `[query, ...]`."""

    run: Run
    state: State
    slopes: Tree
    chunk: int

    @staticmethod
    def at(run: Run, queries: Query, state: State, *, chunk: int) -> "StateProducts":
        """Take the gradients of the queries at a state."""
        _, slopes, _ = gradients(
            queries, run.task, params=state.params, buffers=state.buffers, trained=run.trained
        )
        return StateProducts(run, state, slopes, chunk)

    def in_batch(
        self, index: int
    ) -> tuple[Float[np.ndarray, "query slot"], Float[np.ndarray, " slot"]]:
        """The scores of a step's visits, and their losses, every sample in its batch of that visit."""
        transition = self.run.transition(index)
        directions = self.scaled(rates(transition.step.settings))
        found = slot_products(transition.micro_batches(), self.state, directions, chunk=self.chunk)
        scores, losses = (tensor.cpu().numpy() for tensor in found)
        return scores, losses

    def by_sample(
        self, like: Step, samples: Sequence[int], factors: Sequence[float]
    ) -> Float[np.ndarray, "query row"]:
        """Products with the given samples as a step like this one would train on them, factors by parameter group."""
        width, blocks = max(len(fed.samples) for step in self.run.log for fed in step.fed), []
        directions, transition = self.scaled(factors), self.run.transition(like.index)
        for first in range(0, len(samples), width):
            some = tuple(samples[first : first + width])
            step = msgspec.structs.replace(like, fed=(BatchRecord(some, 0, ""),))
            batch = cast(self.run.task.batch(some), None, self.run.task.device)
            micro_batch = MicroBatch(
                replace(transition, step=step, batches=(batch,)), 0, torch.ones(len(some))
            )
            blocks.append(
                slot_products([micro_batch], self.state, directions, chunk=self.chunk)[0]
                .cpu()
                .numpy()
            )
        return np.concatenate(blocks, axis=1)

    def scaled(self, factors: Sequence[float]) -> Tree:
        """The gradients of the queries, each parameter group times its factor."""
        groups = zip(self.run.manifest.groups, factors, strict=True)
        return {name: factor * self.slopes[name] for group, factor in groups for name in group}


@final
@dataclass(frozen=True, slots=True)
class Tables:
    """Products with all samples visited in some steps, each computed once: its gradient is the same at every visit.

    Groups whose rates agree in all of these steps share a product.

    Attributes:
        run: the training.
        classes: number of the product that every parameter group belongs to.
        samples: those visited in steps of each kind, in order.
        products: `[class, query, sample]` for each kind.
    """

    run: Run
    classes: np.ndarray
    samples: dict[Kind, np.ndarray]
    products: dict[Kind, np.ndarray]

    @staticmethod
    def of(view: StateProducts, indices: Sequence[int]) -> "Tables":
        """Take the products at a viewpoint."""
        steps = [view.run.step(index) for index in indices]
        found, classes = np.unique(
            [rates(step.settings) for step in steps], axis=1, return_inverse=True
        )
        ones = [(classes == one).astype(float).tolist() for one in range(found.shape[1])]
        samples, products = {}, {}
        for kind, like in {_kind(step): step for step in steps}.items():
            visited = np.unique(
                np.concatenate([step.samples for step in steps if _kind(step) == kind])
            )
            samples[kind] = visited
            products[kind] = np.stack(
                [view.by_sample(like, visited.tolist(), factors) for factors in ones]
            )
        return Tables(view.run, classes.ravel(), samples, products)

    def __call__(
        self, index: int
    ) -> tuple[Float[np.ndarray, "query slot"], Float[np.ndarray, " slot"]]:
        """The scores of a step's visits; their losses at the step's own state are not known."""
        step = self.run.step(index)
        kind = _kind(step)
        columns = np.searchsorted(self.samples[kind], step.samples)
        rate = np.zeros(len(self.products[kind]))
        rate[self.classes] = rates(step.settings)
        visited = np.tensordot(rate, self.products[kind][:, :, columns], axes=1)
        return visited * shares(self.run, index).cpu().numpy(), np.full(len(columns), np.nan)


def _kind(step: Step) -> Kind:
    return step.evaluating, step.unused


def alike(run: Run) -> bool:
    """Whether a sample has one gradient at a state, whatever its visit: none drew, was stored or leans on its batch."""
    if any(fed.stored or fed.random for step in run.log for fed in step.fed if fed.contributes):
        return False
    widest = {
        step.evaluating: step.index
        for step in sorted(run.log, key=lambda step: len(step.fed[0].samples))
    }
    return not any(coupled(run, index) for index in widest.values())
