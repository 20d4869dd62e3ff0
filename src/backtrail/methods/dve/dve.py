r"""Data Value Embedding (Wang et al., arXiv 2412.09538): a vector for every visit, before any query is known.

.. math:: e_{t,b} = \Big[ \prod_{k > t} (\rho_k - D_k H_k) \Big] D_t\, c_{t,b} \nabla \ell_b(\theta_t)

in the small space of a random projection, layer by layer. D is what the optimizer makes of a
gradient, H the Fisher matrix of a batch: a choice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from backtrail.accel.allocator import keep_heap
from backtrail.accel.onednn import fast_products, installed
from backtrail.errors import BadSetting, NoDraw
from backtrail.exclusive import exclusive
from backtrail.influence.influence import Influence
from backtrail.methods.dve.embeddings import Embeddings
from backtrail.methods.dve.gather import Gathering
from backtrail.methods.dve.live.capture import LiveCapture
from backtrail.methods.dve.live.early_rates import Now
from backtrail.methods.dve.live.files import KeptRows, RowsWriter
from backtrail.methods.dve.projection import Kind, blocks_of, projection_for
from backtrail.methods.dve.recursion import Propagator, Visits, back_over, weights
from backtrail.methods.dve.sampled_labels import Drawn
from backtrail.methods.dve.step_features import Fisher, Follow, StepFeatures
from backtrail.methods.dve.store import About, EmbeddingStore
from backtrail.methods.observe import ObservedAt, observed_states
from backtrail.methods.result import precision, slots
from backtrail.queries import Query
from backtrail.run.manifest import Manifest
from backtrail.run.run import Run
from backtrail.task.task import Task

Layers = Literal["apart", "together"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DataValueEmbedding:
    """Vectors for every visit of a training, made once; the influence on any query is then an inner product.

    It approximates in four places: the curvature is a Fisher matrix; layers do not feel one
    another's change; gradients are projected; momentum and the like are taken as settled. `DIT`
    leaves out nothing and takes a sweep per question.

    Args:
        rank: coordinates per parameter, at most; storage is steps x slots x rank x parameters.
        fisher: "true" draws labels from the model, "empirical" takes the samples' own gradients, as
            the paper does.
        drawn: share of a step's samples whose labels are drawn, with fisher="true"; below 1, they
            have a pass of their own, which makes capturing beside a training cheap, and costs
            little of the fidelity down to a quarter.
        projection: "orthonormal" (exact where the rank is a parameter's size), "gaussian", or
            "mask", which picks rows and columns, so that what Adam divides by stays exact.
        follow: "optimizer" takes momentum, Adam's division, weight decay and clipping into account;
            "rate" pretends that every step was plain gradient descent.
        layers: "apart", or "together" with one matrix of all coordinates, which only small models
            can afford.
        damping: 1 makes every step implicit, so that no eigenvalue (rate times curvature) explodes,
            however large; 0.5 does as much with less shrinking of the middling ones; 0 leaves the
            recursion as published.
        segments: cuts the training into so many stretches; the states at their ends can then be
            observed, too.
        seed: of the projection and of the drawn labels.

    Raises:
        BadSetting: names the setting, and what it may be.
    """

    rank: int = 256
    fisher: Fisher = "true"
    drawn: float = 1.0
    projection: Kind = "orthonormal"
    follow: Follow = "optimizer"
    layers: Layers = "apart"
    damping: float = 1.0
    segments: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that are none.

        Raises:
            BadSetting: names the setting, and what it may be.
        """
        choices = (("fisher", Fisher), ("projection", Kind), ("follow", Follow), ("layers", Layers))
        for name, kind in choices:
            if (value := getattr(self, name)) not in get_args(kind):
                raise BadSetting(name, value, " or ".join(map(repr, get_args(kind))))
        for name, least in (("rank", 1), ("segments", 1), ("damping", 0)):
            if (value := getattr(self, name)) < least:
                raise BadSetting(name, value, f"a number, at least {least}")
        if not 0 < self.drawn <= 1:
            raise BadSetting("drawn", self.drawn, "a number above 0, at most 1")

    @exclusive
    def embed(
        self, run: Run, *, observed_at: ObservedAt = "end", out: str | Path | None = None
    ) -> Embeddings:
        """Make the vectors: one pass forward over the training, one recursion back.

        Args:
            run: the recorded training.
            observed_at: the states that the vectors shall lead to, beside the end and those of
                `segments`.
            out: folder of the result. An unfinished embedding with the same settings there is gone
                on with. None keeps the result in memory.

        Raises:
            NoDraw: the task does not say how labels are drawn from the model.
        """
        gathering, store = self._begin(run, observed_at, out)
        if not store.finished:
            with keep_heap(), installed():
                gathering.fill(store)
                _Recursion(store, run.task.device, self.damping).fill()
        return Embeddings(run, store)

    @exclusive
    def gather(
        self, run: Run, *, part: tuple[int, int], out: str | Path, observed_at: ObservedAt = "end"
    ) -> None:
        """Do a part of the pass over the training, while other processes do the others in the same folder.

        The pass is most of the work, and its parts need nothing of one another: each begins at a
        kept state. When all are done, `embed` with the same settings goes back over what they
        found, to the same bits as alone.

        Args:
            run: the recorded training.
            part: (i, n): of n parts, the i-th, from 0.
            out: folder of the result.
            observed_at: as `embed` will be given it.

        Raises:
            BadSetting: a part that is none.
            NoDraw: the task does not say how labels are drawn from the model.
        """
        if not 0 <= part[0] < part[1]:
            raise BadSetting("part", part, "(i, n): of n parts, the i-th, from 0")
        gathering, store = self._begin(run, observed_at, out)
        if not store.finished:
            with keep_heap(), installed():
                gathering.fill(store, part)

    def _begin(
        self, run: Run, observed_at: ObservedAt, out: str | Path | None
    ) -> tuple[Gathering, EmbeddingStore]:
        """What is gathered, and where; what was begun is gone on with.

        Raises:
            NoDraw: the task does not say how labels are drawn from the model.
        """
        what = self._what(run.task, run.manifest)
        cuts = {-(-run.steps * part // self.segments) for part in range(1, self.segments + 1)}
        about = About(
            run=run.id,
            steps=run.steps,
            slots=max(len(step.samples) for step in run.log),
            samples=run.samples,
            observed_at=tuple(sorted({*observed_states(run, observed_at), *cuts})),
            layout={
                name: (place.start, place.stop) for name, place in what.projection.layout.items()
            },
            blocks=blocks_of(what.projection, dense=self.layers == "together"),
            dtype=precision(run),
            settings=self._settings,
        )
        path = None if out is None else Path(out)
        store = EmbeddingStore.begin(path, about, what.sizes(about.slots), sample=slots(run))
        return Gathering(run, what, KeptRows(run, self._of_rows)), store

    def _what(self, task: Task, manifest: Manifest) -> StepFeatures:
        """What is gathered at a step.

        Raises:
            NoDraw: the task does not say how labels are drawn from the model.
        """
        if self.fisher == "true" and task.draw is None:
            raise NoDraw
        small = projection_for(task, manifest, kind=self.projection, rank=self.rank, seed=self.seed)
        draws = Drawn(task, self.drawn, self.seed)
        shapes = {name: layout.shape for name, layout in manifest.params.items()}
        return StepFeatures(
            task, manifest.optimizer, shapes, small, self.fisher, self.follow, draws
        )

    def beside(
        self,
        task: Task,
        manifest: Manifest,
        trained: Mapping[str, nn.Parameter],
        *,
        keep: Callable[[str, bytes], None],
        now: Now,
    ) -> LiveCapture:
        """Capture a training while it runs: `Recorder(..., capture=DataValueEmbedding(...))` calls this.

        Args:
            task: of the training, with the live model.
            manifest: of its recording.
            trained: the live parameters that the optimizer holds.
            keep: adds a file to the recording.
            now: the update and the state as they are.

        Raises:
            NoDraw: the task does not say how labels are drawn from the model.
        """
        return LiveCapture(
            self._what(task, manifest), trained, RowsWriter(keep, self._of_rows), now=now
        )

    @exclusive
    def attribute(
        self,
        run: Run,
        queries: Query,
        *,
        observed_at: ObservedAt = "end",
        out: str | Path | None = None,
    ) -> Influence:
        """Embed in memory, and ask: for a single question.

        Sign: what the query gains when the sample is removed; for a loss, positive is helpful,
        negative harmful.

        Args:
            run: the recorded training.
            queries: what is asked.
            observed_at: the states that the queries read: "end", "epochs", a number, or several.
            out: folder of the result. An unfinished attribution of the same question there is
                resumed, to the same bits. None keeps the result in memory.
        """
        return self.embed(run, observed_at=observed_at).attribute(
            queries, observed_at=observed_at, out=out
        )

    @property
    def _settings(self) -> dict[str, object]:
        return self._of_rows | {"layers": self.layers, "damping": self.damping}

    @property
    def _of_rows(self) -> dict[str, object]:
        """The settings that the pass over the training depends on."""
        return {
            name: getattr(self, name)
            for name in ("rank", "fisher", "drawn", "projection", "follow", "seed")
        }


@final
@dataclass(frozen=True, slots=True)
class _Recursion:
    """The way back over what a pass over the training has gathered."""

    store: EmbeddingStore
    device: torch.device
    damping: float

    def fill(self) -> None:
        """Write the embeddings from the last shard to the first, and note that all is there."""
        about, ends = self.store.about, self.store.about.observed_at
        transports: list[Propagator] = []
        for first, stop in tqdm(
            about.shards[::-1], desc="going back", unit="shard", disable=None, leave=False
        ):
            names = self.store.captured_names
            block = {
                name: self._tensor(self.store.read(f"captured/{name}", first, stop))
                for name in names
            }
            found = np.zeros((stop - first, *about.shape[1:]), about.dtype)
            for step in range(stop - 1, first - 1, -1):
                if step + 1 in ends:
                    transports = self._transports()
                place = step - first
                of_step = {name: tensor[place] for name, tensor in block.items()}
                found[place] = self._back(of_step, transports, step=step).cpu().numpy()
                if len(ends) > 1 and step in (0, *ends):
                    self._keep(
                        transports, next(number for number, end in enumerate(ends) if end > step)
                    )
            self.store.write("embedding", found, first)
        self.store.finish()

    def _back(
        self, of_step: dict[str, Tensor], transports: list[Propagator], *, step: int
    ) -> Tensor:
        blocks = self.store.about.blocks
        visits = [visits_of(of_step, slice(start, stop)) for start, stop in blocks.values()]
        with fast_products():
            parts = [
                back_over(one, transport, weights=weight, step=step, block=block)
                for block, one, transport, weight in zip(
                    blocks, visits, transports, weights(visits, self.damping), strict=True
                )
            ]
        return torch.cat(parts, 1)

    def _transports(self) -> list[Propagator]:
        like = self._tensor(np.zeros(0, self.store.about.dtype))
        return [
            Propagator(like.new_zeros(stop - start))
            for start, stop in self.store.about.blocks.values()
        ]

    def _keep(self, transports: list[Propagator], stretch: int) -> None:
        for number, transport in enumerate(transports):
            self.store.write(f"transport/{number}", transport.matrix()[None].cpu().numpy(), stretch)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def visits_of(of_step: dict[str, Tensor], place: slice) -> Visits:
    """What a step says about some coordinates."""
    cut = {
        name: tensor[..., place] for name, tensor in of_step.items() if not name.endswith("share")
    }
    fisher, rate = cut["fisher"], cut["rate"]
    moved = cut["moved"] if "moved" in cut else cut.get("gradient", fisher) * rate
    drawn = (
        cut["fisher_moved"]
        if "fisher_moved" in cut
        else fisher * rate
        if "gradient" in cut
        else moved
    )
    share = of_step["share"]
    return Visits(share, moved, of_step.get("fisher_share", share), fisher, drawn, cut["decay"])
