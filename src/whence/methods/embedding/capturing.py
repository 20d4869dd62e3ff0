"""The pass over a training that gathers what the recursion of Data Value Embedding needs, shard by shard.

Every step is replayed once, and its samples' gradients are projected beside it. What the update makes of a gradient is
a number per entry (`lasting.py`). Where that is the same for all entries of a parameter, or where a mask picks entries,
it is a number per coordinate of the projection. Elsewhere it is taken as the product of a number per row and one per
column, which a projection of a matrix's two sides lets through: rows and columns are scaled before they are mixed.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from whence.clipping import ClipValue
from whence.methods.embedding.embedding_store import EmbeddingStore
from whence.methods.embedding.projection import Kind, Projection, projection
from whence.methods.viewpoint import rates
from whence.replay.capture import Watched, watched
from whence.replay.lasting import Lasting, lasting
from whence.replay.sides import Picked
from whence.replay.state import State
from whence.replay.transition import Transition
from whence.replay.update import LINEAR
from whence.run.run import Run
from whence.task import Batch
from whence.tree import Tree, add

Fisher = Literal["true", "empirical"]
Follow = Literal["optimizer", "rate"]
Arrays = dict[str, Tensor]
ROUNDING = 1e-5  # of a sample's gradient: a step's gradient below it is none
LOOKED_AT = 2**13  # entries of a parameter, for their median


@final
@dataclass(frozen=True, slots=True)
class Gathering:
    """What is gathered at every step, and how.

    Attributes:
        run: the training.
        projection: of its parameters.
        fisher: whether the curvature is made of the samples' own gradients, or of those with drawn labels.
        follow: whether the update is the optimizer's, or a plain step by its learning rate.
        seed: of the drawn labels.
    """

    run: Run
    projection: Projection
    fisher: Fisher
    follow: Follow
    seed: int

    @property
    def plain(self) -> bool:
        """Whether the update is one number per coordinate."""
        uniform = self.run.manifest.optimizer in LINEAR and not isinstance(self.run.task.clip, ClipValue)
        return self.follow == "rate" or uniform or picks(self.projection)

    def shapes(self, slots: int) -> dict[str, tuple[int, ...]]:
        """The arrays of a step."""
        rows, true = (slots, self.projection.rank), self.fisher == "true"
        wanted = {"fisher": True, "gradient": true and self.plain, "moved": not self.plain}
        wanted |= {"fisher_moved": true and not self.plain}
        found: dict[str, tuple[int, ...]] = {name: rows for name, there in wanted.items() if there}
        return found | {"rate": rows[1:], "decay": rows[1:], "share": rows[:1]}

    def fill(self, store: EmbeddingStore, part: tuple[int, int] = (0, 1)) -> None:
        """Walk over the shards that are not done, and write them: of n equal stretches of shards, the i-th."""
        (number, of), count = part, len(store.about.shards)
        ours = range(count * number // of, count * (number + 1) // of)
        spans = {shard: store.about.shards[shard] for shard in store.missing if shard in ours}
        total, there = sum(stop - first for first, stop in spans.values()), dict[int, State]()
        with tqdm(total=total, desc="embedding", unit="step", disable=None, leave=False) as bar:
            for shard, (first, stop) in spans.items():
                state = there.pop(first) if first in there else self.before(first)
                there = {stop: self._fill_shard(store, (first, stop), state, bar=bar)}
                store.mark_captured(shard)

    def before(self, step: int) -> State:
        """The state before a step, reached as this pass reaches it: so going on gives the same bits."""
        first = max(kept for kept in self.run.kept if kept <= step)
        state = self.run.state(first)
        for index in range(first, step):
            transition = self.run.transition(index)
            state = self._after(transition, state, self._gradient(transition, state))
        return state

    def _fill_shard(self, store: EmbeddingStore, span: tuple[int, int], state: State, *, bar: "tqdm[Any]") -> State:
        """Write the arrays of the steps [first, stop), given the state before them; the one behind them."""
        first, stop = span
        shapes = self.shapes(store.about.slots)
        blocks = {name: np.zeros((stop - first, *shape), store.about.dtype) for name, shape in shapes.items()}
        losses = np.full((stop - first, store.about.slots), np.nan)
        for place in range(stop - first):
            transition = self.run.transition(first + place)
            arrays, loss, left = self._step(transition, state)
            losses[place, : len(loss)] = loss.cpu().numpy()
            for name, rows in arrays.items():
                blocks[name][place, : len(rows)] = rows.cpu().numpy()
            state = self._after(transition, state, left)
            bar.update()
        for name, block in blocks.items():
            store.write(f"captured/{name}", block, first)
        store.write("loss", losses, first)
        return state

    def _after(self, transition: Transition, state: State, left: tuple[Tree, Tree]) -> State:
        """The state behind a step, given its gradient and buffers; where none is needed, any."""
        index = transition.step.index + 1
        if index == self.run.steps:
            return state
        if index in self.run.kept:
            return self.run.state(index)
        return transition.moved(state, transition.clipped(left[0]), left[1])

    def _apart(self, transition: Transition) -> bool:
        """Whether the step's gradient is needed before any rows, or in another precision."""
        return bool(transition.step.autocast) or (len(transition.batches) > 1 and not self.plain)

    def _gradient(self, transition: Transition, state: State) -> tuple[Tree, Tree]:
        """A step's gradient before clipping, to the bit as `_step` finds it, and the buffers that it leaves."""
        if self._apart(transition):
            return transition.raw_gradient(state)[:2]
        total, buffers = dict[str, Tensor](), state.buffers
        for piece in transition.pieces():
            seen = watched(piece, state.params, buffers)
            total, buffers = add(total, seen.gradient), seen.buffers
        return total, buffers

    def _step(self, transition: Transition, state: State) -> tuple[Arrays, Tensor, tuple[Tree, Tree]]:
        """A step's arrays, its losses `[slot]`, and what `_gradient` finds."""
        pieces, buffers, total, answer = transition.pieces(), state.buffers, dict[str, Tensor](), None
        apart = self._apart(transition)
        if apart:
            total, after = self._gradient(transition, state)
            answer = self._answer(transition, state, total)
        rows, losses = [], []
        for piece in pieces:
            seen = watched(piece, state.params, buffers)
            if not apart:
                total, after = add(total, seen.gradient), seen.buffers
                answer = None if self.plain else self._answer(transition, state, total)
            rows.append(self._rows(seen, transition.step.index, None if self.plain else answer))
            losses.append(seen.losses)
            buffers = seen.buffers
        answer = answer or self._answer(transition, state, total)
        joined = {name: torch.cat([of_piece[name] for of_piece in rows]) for name in rows[0]}
        arrays = self._without_rounding(joined, total) | {
            "rate": self._by_coordinate(answer.rate, absent=0.0),
            "decay": self._by_coordinate(answer.decay, absent=1.0),
            "share": torch.cat([piece.share for piece in pieces if piece.counted]),
        }
        return arrays, torch.cat(losses), (total, after)

    def _rows(self, seen: Watched, step: int, answer: Lasting | None) -> Arrays:
        """The samples' projected gradients, as they are and as the update moves them."""
        small = self.projection.sides
        drawn = self._drawn(step, seen.piece.index) if self.fisher == "true" else None
        if answer is None:
            found = seen.rows([small], [None] if drawn is None else [drawn, None])
            return dict(zip(("fisher", "gradient"), (one[0] for one in found), strict=False))
        scaled = self.projection.scaled(factors(self.projection, answer.rate)).sides
        if drawn is None:
            return dict(zip(("fisher", "moved"), seen.rows([small, scaled])[0], strict=True))
        both = dict(zip(("fisher", "fisher_moved"), seen.rows([small, scaled], [drawn])[0], strict=True))
        return both | {"moved": seen.rows([scaled])[0][0]}

    def _without_rounding(self, rows: Arrays, total: Tree) -> Arrays:
        """Drop the rows of a bias in front of BatchNorm, say: frozen statistics show it a gradient where there is none.

        Adam would divide it by the rounding that is there instead.
        """
        if self.run.task.running:
            for name, place in self.projection.layout.items():
                usual = rows["fisher"][:, place].square().sum(1).mean().sqrt()
                if name in total and total[name].norm() <= ROUNDING * usual:
                    for tensor in rows.values():
                        tensor[:, place] = 0.0
        return rows

    def _drawn(self, step: int, piece: int) -> Any:
        """The loss with drawn labels, always the same of a piece."""
        draw = self.run.task.draw
        assert draw is not None
        digest = hashlib.sha256(f"{self.seed}/{step}/{piece}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little", signed=True)

        def losses(outputs: Any, batch: Batch) -> Tensor:
            return draw(outputs, batch, torch.Generator(self.run.task.device).manual_seed(seed))

        return losses

    def _answer(self, transition: Transition, state: State, gradient: Tree) -> Lasting:
        if self.follow == "optimizer":
            answer = lasting(transition, state, gradient)
            return replace(answer, rate={n: at_most_usual(rate, gradient[n]) for n, rate in answer.rate.items()})
        by_group = zip(transition.update.groups, rates(transition.step), strict=True)
        rate = {name: torch.full_like(gradient[name], r) for group, r in by_group for name in group if name in gradient}
        return Lasting(rate, {name: torch.ones_like(tensor) for name, tensor in rate.items()})

    def _by_coordinate(self, tree: Tree, absent: float) -> Float[Tensor, " coordinate"]:
        """A number of every entry as one of every coordinate: that of the picked entry, or the parameter's mean."""
        names = self.projection.layout
        like = next(iter(tree.values()))
        if picks(self.projection):
            shapes = self.run.manifest.params
            full = {n: tree[n] if n in tree else like.new_full(shapes[n].shape, absent) for n in names}
            return self.projection.of_diagonal(full)
        means = {name: tree[name].mean() if name in tree else like.new_tensor(absent) for name in names}
        return torch.cat([means[name].expand(place.stop - place.start) for name, place in names.items()])


def at_most_usual(rate: Tensor, gradient: Tensor) -> Tensor:
    """A parameter's rates, none larger than their median where there is a gradient (of thousands of its entries).

    Adam divides an entry that hardly ever had a gradient by almost nothing, but only until it gets one: what it is
    divided by grows with it. Here that counts as fixed, and so may not be taken at its word.

    >>> at_most_usual(torch.tensor([1.0, 2.0, 1e6, 0.1]), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    tensor([1.0000, 2.0000, 2.0000, 0.1000])
    """
    every = -(-rate.numel() // LOOKED_AT) | 1  # odd, so that it meets every column of most matrices
    some = rate.flatten()[::every][gradient.flatten()[::every] != 0].abs()
    usual = float(some.median()) if len(some) else 0.0
    return rate.clamp(-usual, usual) if usual > 0 else rate


def picks(whole: Projection) -> bool:
    """Whether a projection picks entries and mixes none."""
    every = (side for sides in whole.sides.values() for side in (sides.left, sides.right) if side is not None)
    return all(isinstance(side, Picked) for side in every)


def factors(whole: Projection, rate: Tree) -> dict[str, tuple[Tensor, ...]]:
    r"""Every parameter's numbers as products of one for the row and one for the column, of vectors as they are.

    .. math:: d_{ij} \approx \exp(\overline{\log d}_{i \cdot} + \overline{\log d}_{\cdot j} - \overline{\log d})
    """
    found = {}
    for name, sides in whole.sides.items():
        if name not in rate:
            ones = next(iter(rate.values()))
            found[name] = tuple(ones.new_ones(s.size) for s in (sides.left, sides.right) if s is not None)
        elif sides.right is None:
            found[name] = (rate[name].flatten(),)
        else:
            found[name] = _outer(rate[name].reshape(sides.left.size, sides.right.size))
    return found


def _outer(matrix: Float[Tensor, "left right"]) -> tuple[Tensor, Tensor]:
    largest = matrix.abs().max().clamp_min(torch.finfo(matrix.dtype).tiny)
    logs = matrix.abs().clamp_min(1e-12 * largest).log()
    left = (logs.mean(1) - logs.mean()).exp()
    return left * matrix.sum().sign(), logs.mean(0).exp()


def projection_for(run: Run, *, kind: Kind, rank: int, seed: int) -> Projection:
    """The projection of a run's trained parameters; those of one module stand behind each other."""
    modules = {name.rpartition(".")[0]: None for name in run.trained}
    names = [name for module in modules for name in run.trained if name.rpartition(".")[0] == module]
    shapes = {name: run.manifest.params[name].shape for name in names}
    like = next(tensor for tensor in run.state(run.kept[-1]).params.values() if tensor.is_floating_point())
    return projection(shapes, kind=kind, rank=rank, seed=seed, like=like)


def blocks_of(whole: Projection, *, dense: bool) -> dict[str, tuple[int, int]]:
    """The coordinates that the recursion treats together: a module's, or all."""
    if dense:
        return {"all layers": (0, whole.rank)}
    found: dict[str, tuple[int, int]] = {}
    for name, place in whole.layout.items():
        module = name.rpartition(".")[0] or "model"
        found[module] = (found.get(module, (place.start, 0))[0], place.stop)
    return found
