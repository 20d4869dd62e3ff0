r"""What visits are worth at one state, by products of gradients there.

.. math::
    \sum_g \eta_{t,g}\, c_{t,b}\, \langle \nabla_g q(\theta),\, \nabla_g \ell_b(\theta) \rangle

over the parameter groups g, with the rates :math:`\eta` and the shares c of the visit's own step t.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import msgspec
import numpy as np
import torch
from jaxtyping import Float

from backtrail.methods.gradient_dot.products import slot_products
from backtrail.methods.observe import query_gradients
from backtrail.methods.renormalize import is_coupled
from backtrail.methods.step_factors import rates, shares
from backtrail.queries import Query
from backtrail.run.run import Run
from backtrail.step.state import BatchRecord, State, Step
from backtrail.step.step import MicroBatch
from backtrail.tree import Tree, cast

Scores = tuple[Float[np.ndarray, "query slot"], Float[np.ndarray, " slot"]]  # and losses
StepScores = Callable[[int], Scores]  # from the index of a step
Kind = tuple[tuple[str, ...], tuple[str, ...]]  # modules in eval mode, parameters without gradient


@final
@dataclass(frozen=True, slots=True)
class StateProducts:
    """Products of gradients at a state.

    Attributes:
        run: The training.
        state: Where the gradients are taken.
        gradients: Of the queries, `[query, ...]`.
        chunk: How many queries are multiplied at once.
    """

    run: Run
    state: State
    gradients: Tree
    chunk: int

    @staticmethod
    def at(run: Run, queries: Query, state: State, *, chunk: int) -> "StateProducts":
        """Take the gradients of the queries at a state."""
        gradients, _ = query_gradients(run, queries, state)
        return StateProducts(run, state, gradients, chunk)

    def of_step(self, index: int) -> Scores:
        """Compute the scores of a step's visits and their losses, each sample in its own batch."""
        transition = self.run.transition(index)
        directions = self.scaled(rates(transition.step.settings))
        # Not the state of the step: its samples are read at the state of these products.
        scores, losses = slot_products(
            transition.micro_batches(), self.state, directions, chunk=self.chunk
        )
        return scores.cpu().numpy(), losses.cpu().numpy()

    def of_samples(
        self, like: Step, samples: Sequence[int], factors: Sequence[float]
    ) -> Float[np.ndarray, "query row"]:
        """Compute products with samples in batches of their own.

        Args:
            like: A step whose train/eval modes and updated parameters are used.
            samples: Rows of the training set.
            factors: Of every parameter group, instead of its rate.
        """
        directions = self.scaled(factors)
        transition = self.run.transition(like.index)
        # No batch is larger than the largest that the training had.
        width = max(len(fed.samples) for step in self.run.log for fed in step.fed)
        blocks = []
        for first in range(0, len(samples), width):
            some = tuple(samples[first : first + width])
            step = msgspec.structs.replace(like, fed=(BatchRecord(some, 0, ""),))
            batch = cast(self.run.rows(some), None, self.run.task.device)
            # A step with one micro-batch of these rows and share c = 1.
            alone = replace(transition, step=step, batches=(batch,))
            micro_batch = MicroBatch(alone, 0, torch.ones(len(some)))
            scores, _ = slot_products([micro_batch], self.state, directions, chunk=self.chunk)
            blocks.append(scores.cpu().numpy())
        return np.concatenate(blocks, axis=1)

    def scaled(self, factors: Sequence[float]) -> Tree:
        """Multiply the gradients of the queries by a factor for each parameter group."""
        scaled: Tree = {}
        for members, factor in zip(self.run.manifest.groups, factors, strict=True):
            for name in members:
                scaled[name] = factor * self.gradients[name]
        return scaled


@final
@dataclass(frozen=True, slots=True)
class Tables:
    """Products with all samples visited in some steps, each computed once.

    A sample's gradient is the same at every visit (`has_one_gradient`), so a visit's score is its
    product times rate and share. Parameter groups whose rates agree in all of these steps form a
    class and share a product.

    Attributes:
        run: The training.
        classes: Class of every parameter group.
        samples: Those visited in steps of each kind, ascending.
        products: `[class, query, sample]` for each kind.
    """

    run: Run
    classes: np.ndarray
    samples: dict[Kind, np.ndarray]
    products: dict[Kind, np.ndarray]

    @staticmethod
    def of(at_state: StateProducts, indices: Sequence[int]) -> "Tables":
        """Compute the products with the samples of some steps."""
        steps = [at_state.run.step(index) for index in indices]
        by_step = [rates(step.settings) for step in steps]
        distinct, classes = np.unique(by_step, axis=1, return_inverse=True)
        classes = classes.ravel()
        by_kind: dict[Kind, list[Step]] = {}
        for step in steps:
            by_kind.setdefault(_kind(step), []).append(step)
        samples: dict[Kind, np.ndarray] = {}
        products: dict[Kind, np.ndarray] = {}
        for kind, alike in by_kind.items():
            samples[kind] = np.unique(np.concatenate([step.samples for step in alike]))
            by_class = []
            for number in range(distinct.shape[1]):
                # Factor 1 inside the class and 0 outside; the rates are multiplied in by visit.
                inside = (classes == number).astype(float)
                by_class.append(
                    at_state.of_samples(alike[-1], samples[kind].tolist(), inside.tolist())
                )
            products[kind] = np.stack(by_class)
        return Tables(at_state.run, classes, samples, products)

    def of_step(self, index: int) -> Scores:
        """Look up the scores of a step's visits; losses at the step's own state are not known."""
        step = self.run.step(index)
        kind = _kind(step)
        columns = np.searchsorted(self.samples[kind], step.samples)
        # Groups of one class have one rate, so any of them sets it.
        rate = np.zeros(len(self.products[kind]))
        rate[self.classes] = rates(step.settings)
        scores = np.tensordot(rate, self.products[kind][:, :, columns], axes=1)
        return scores * shares(self.run, index).cpu().numpy(), np.full(len(columns), np.nan)


def _kind(step: Step) -> Kind:
    return step.evaluating, step.unused


def has_one_gradient(run: Run) -> bool:
    """Test whether a sample has one gradient at a state, whatever its visit.

    It has not where a forward pass drew random numbers, where what was fed was stored, or where the
    losses of a batch depend on one another.
    """
    widest: dict[tuple[str, ...], Step] = {}
    for step in run.log:
        if any(fed.contributes and (fed.stored or fed.random) for fed in step.fed):
            return False
        known = widest.get(step.evaluating)
        if known is None or len(step.fed[0].samples) >= len(known.fed[0].samples):
            widest[step.evaluating] = step
    return not any(is_coupled(run, step.index) for step in widest.values())
