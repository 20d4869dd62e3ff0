r"""Data Value Embedding (Wang et al., arXiv 2412.09538): a vector for every visit of a sample.

.. math::
    e_{t,b} = \Big[ \prod_{k > t} (\rho_k - D_k H_k) \Big] D_t\, c_{t,b} \nabla \ell_b(\theta_t)

in the small space of a random projection, layer by layer. D is what the optimizer makes of a
gradient, :math:`\rho` what weight decay leaves, and H the Fisher matrix of a batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from backtrail import arguments
from backtrail.accel.context import accelerated
from backtrail.errors import BadSetting, NoDraw
from backtrail.exclusive import exclusive
from backtrail.influence.influence import Influence
from backtrail.methods.dve.embeddings import Embeddings, refuse_averaged
from backtrail.methods.dve.gather import Gathering
from backtrail.methods.dve.live.capture import LiveCapture
from backtrail.methods.dve.live.early_rates import Now
from backtrail.methods.dve.live.files import KeptRows, RowsWriter
from backtrail.methods.dve.projection import Kind, blocks_of, projection_for
from backtrail.methods.dve.recursion import Propagator, Visits, curvature_weights, embed_step
from backtrail.methods.dve.sampled_labels import Drawn
from backtrail.methods.dve.step_features import Fisher, Follow, StepFeatures
from backtrail.methods.dve.store import About, EmbeddingStore
from backtrail.methods.observe import ObservedAt, check_queries, check_run, observed_states
from backtrail.methods.result import precision, sample_table
from backtrail.queries import Query
from backtrail.run.manifest import Manifest
from backtrail.run.run import Run
from backtrail.task.task import Task

Layers = Literal["apart", "together"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DataValueEmbedding:
    r"""Vectors for every visit of a training, made once; influence is then an inner product.

    .. math:: I[q, t, b] = \langle \nabla q(\theta_T),\, e_{t,b} \rangle

    It approximates in four places: the curvature is a Fisher matrix; the effect of one layer's
    change on another is left out; gradients are projected; momentum is taken as settled. `DIT`
    leaves out nothing, and takes a sweep for every set of queries.

    Source: Wang et al., "Capturing the Temporal Dependence of Training Data Influence",
    arXiv 2412.09538.

    Args:
        rank: Coordinates per parameter, at most. Storage is steps x slots x rank x parameters.
        fisher: "true" samples labels from the model; "empirical" takes the samples' own gradients,
            as the paper does.
        drawn: With fisher="true", the share of a step's samples whose labels are sampled. Below 1
            those samples have a pass of their own, which makes capturing during training cheap;
            down to a quarter it costs little fidelity.
        projection: "orthonormal" (exact where the rank equals a parameter's size), "gaussian", or
            "mask", which picks rows and columns, so that Adam's division stays exact.
        follow: "optimizer" takes momentum, Adam's division, weight decay and clipping into account;
            "rate" treats every step as plain gradient descent.
        layers: "apart", or "together" with one matrix for all coordinates, which only small models
            can afford.
        damping: 1 = implicit (backward Euler) steps, stable for any curvature; 0.5 is also stable
            and shrinks moderate eigenvalues less; 0 = as published, unstable where learning rate
            times curvature exceeds 2.
        segments: Number of equal stretches that the training is cut into; the states at their ends
            can be observed as well.
        seed: Of the projection and of the sampled labels.

    Raises:
        BadSetting: An argument has an invalid value; the message names it and what is expected.
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
        """Refuse invalid arguments.

        Raises:
            BadSetting: An argument has an invalid value; the message names it.
        """
        choices = {
            "fisher": get_args(Fisher),
            "projection": get_args(Kind),
            "follow": get_args(Follow),
            "layers": get_args(Layers),
        }
        for name, allowed in choices.items():
            arguments.choice(name, getattr(self, name), allowed)
        checked: dict[str, object] = {
            "rank": arguments.whole("rank", self.rank, least=1),
            "segments": arguments.whole("segments", self.segments, least=1),
            "seed": arguments.seed("seed", self.seed),
            "damping": arguments.real(
                "damping", self.damping, "a number of at least 0", lambda damping: damping >= 0
            ),
            "drawn": arguments.real(
                "drawn", self.drawn, "0 < drawn <= 1", lambda drawn: 0 < drawn <= 1
            ),
        }
        # The dataclass is frozen. numpy's and torch's numbers become plain ones.
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.drawn < 1 and self.fisher == "empirical":
            raise BadSetting(
                "drawn", self.drawn, 'drawn=1 with fisher="empirical", which samples no labels'
            )

    @exclusive
    def embed(
        self, run: Run, *, observed_at: ObservedAt = "end", out: str | Path | None = None
    ) -> Embeddings:
        """Make the vectors: one pass forward over the training, then one recursion back.

        Args:
            run: A recorded run.
            observed_at: States that the vectors shall lead to, beside the end and those of
                `segments`.
            out: Folder of the result. Unfinished embeddings with the same settings there are
                resumed. None keeps the result in memory.

        Raises:
            NoDraw: The task does not say how labels are sampled from the model.
        """
        gathering, store = self._begin(run, observed_at, out)
        if not store.finished:
            with accelerated(products=False, keep_memory=True):
                gathering.fill(store)
                _Recursion(store, run.task.device, self.damping).fill()
        return Embeddings(run, store)

    @exclusive
    def gather(
        self, run: Run, *, part: tuple[int, int], out: str | Path, observed_at: ObservedAt = "end"
    ) -> None:
        """Do a part of the pass over the training; other processes do the other parts.

        The pass is most of the work, and its parts are independent: each begins at a kept state.
        When all are done, `embed` with the same settings does the recursion over what they found;
        the result is bit-identical to that of a single process.

        Args:
            run: A recorded run.
            part: (i, n): the i-th of n parts, from 0.
            out: Folder of the result, the same for all parts.
            observed_at: As `embed` will be given it.

        Raises:
            BadSetting: There is no such part.
            NoDraw: The task does not say how labels are sampled from the model.
        """
        expected = "(i, n) with 0 <= i < n: of n parts, the i-th"
        part = arguments.pair("part", part, expected)
        if not 0 <= part[0] < part[1]:
            raise BadSetting("part", part, expected)
        arguments.folder("out", out)
        gathering, store = self._begin(run, observed_at, out)
        if not store.finished:
            with accelerated(products=False, keep_memory=True):
                gathering.fill(store, part)

    def _begin(
        self, run: Run, observed_at: ObservedAt, out: str | Path | None
    ) -> tuple[Gathering, EmbeddingStore]:
        """What is gathered, and the store that it goes to, which may hold a part already.

        Raises:
            BadSetting: There are more segments than steps, or an argument is something else.
            NoDraw: The task does not say how labels are sampled from the model.
        """
        check_run(run)
        path = arguments.folder_or_none("out", out)
        states = observed_states(run, observed_at)
        if self.segments > run.steps:
            expected = f"at most {run.steps}, the number of steps of the run"
            raise BadSetting("segments", self.segments, expected)
        run.check_kept_steps()
        what = self._features(run.task, run.manifest)
        ends = {-(-run.steps * part // self.segments) for part in range(1, self.segments + 1)}
        layout = what.projection.layout
        about = About(
            run=run.id,
            steps=run.steps,
            slots=max(len(step.samples) for step in run.log),
            samples=run.samples,
            observed_at=tuple(sorted({*states, *ends})),
            layout={name: (place.start, place.stop) for name, place in layout.items()},
            blocks=blocks_of(what.projection, dense=self.layers == "together"),
            dtype=precision(run),
            settings=self._settings,
        )
        store = EmbeddingStore.begin(path, about, what.sizes(about.slots), sample=sample_table(run))
        return Gathering(run, what, KeptRows(run, self._settings_of_rows)), store

    def _features(self, task: Task, manifest: Manifest) -> StepFeatures:
        """What is gathered at a step.

        Raises:
            NoDraw: The task does not say how labels are sampled from the model.
        """
        if self.fisher == "true" and task.draw is None:
            raise NoDraw
        return StepFeatures(
            task=task,
            optimizer=manifest.optimizer,
            shapes={name: layout.shape for name, layout in manifest.params.items()},
            projection=projection_for(
                task, manifest, kind=self.projection, rank=self.rank, seed=self.seed
            ),
            fisher=self.fisher,
            follow=self.follow,
            draws=Drawn(task, self.drawn, self.seed),
        )

    def start_capture(
        self,
        task: Task,
        manifest: Manifest,
        trained: Mapping[str, nn.Parameter],
        *,
        write_file: Callable[[str, bytes], None],
        upcoming_update: Now,
    ) -> LiveCapture:
        """Capture a training while it runs: `Recorder(..., capture=DataValueEmbedding(...))`.

        Experimental.

        Args:
            task: Of the training, with the live model.
            manifest: Of its recording.
            trained: The live parameters that the optimizer holds.
            write_file: Adds a file to the recording.
            upcoming_update: Returns the update and the state as they are now.

        Raises:
            NoDraw: The task does not say how labels are sampled from the model.
        """
        writer = RowsWriter(write_file, self._settings_of_rows)
        features = self._features(task, manifest)
        return LiveCapture(features, trained, writer, now=upcoming_update)

    @exclusive
    def attribute(
        self,
        run: Run,
        queries: Query,
        *,
        observed_at: ObservedAt = "end",
        out: str | Path | None = None,
    ) -> Influence:
        """Embed in memory and attribute, for a single set of queries.

        Sign: what the query gains when the sample is removed; for a loss, positive is helpful,
        negative harmful. The unit is that of the queries.

        Args:
            run: A recorded run.
            queries: What is asked.
            observed_at: The states that the queries read: "end", "epochs", a number, or several.
            out: Folder of the result. An unfinished attribution of the same question there is
                resumed and gives bit-identical results. None keeps the result in memory.
        """
        # Before the embedding, which takes long.
        check_run(run)
        check_queries(queries)
        refuse_averaged(queries)
        arguments.folder_or_none("out", out)
        embeddings = self.embed(run, observed_at=observed_at)
        return embeddings.attribute(queries, observed_at=observed_at, out=out)

    @property
    def _settings(self) -> dict[str, object]:
        return self._settings_of_rows | {"layers": self.layers, "damping": self.damping}

    @property
    def _settings_of_rows(self) -> dict[str, object]:
        """The settings that the pass over the training depends on."""
        return {
            "rank": self.rank,
            "fisher": self.fisher,
            "drawn": self.drawn,
            "projection": self.projection,
            "follow": self.follow,
            "seed": self.seed,
        }


@final
@dataclass(frozen=True, slots=True)
class _Recursion:
    """The recursion back over what the pass over the training has gathered."""

    store: EmbeddingStore
    device: torch.device
    damping: float

    def fill(self) -> None:
        """Write the embeddings from the last shard to the first, and note that all is there."""
        about = self.store.about
        ends = about.observed_at
        names = self.store.captured_names
        propagators: list[Propagator] = []
        shards = tqdm(
            about.shards[::-1], desc="going back", unit="shard", disable=None, leave=False
        )
        for first, stop in shards:
            arrays = {
                name: self._tensor(self.store.read(f"captured/{name}", first, stop))
                for name in names
            }
            embeddings = np.zeros((stop - first, *about.shape[1:]), about.dtype)
            for step in range(stop - 1, first - 1, -1):
                if step + 1 in ends:
                    # Each stretch has a recursion of its own, from the identity on.
                    propagators = self._identities()
                place = step - first
                of_step = {name: tensor[place] for name, tensor in arrays.items()}
                rows = self._embed_step(of_step, propagators, step=step)
                embeddings[place] = rows.cpu().numpy()
                starts_stretch = step == 0 or step in ends
                if len(ends) > 1 and starts_stretch:
                    stretch = next(number for number, end in enumerate(ends) if end > step)
                    self._keep(propagators, stretch)
            self.store.write("embedding", embeddings, first)
        self.store.finish()

    def _embed_step(
        self, of_step: dict[str, Tensor], propagators: list[Propagator], *, step: int
    ) -> Tensor:
        blocks = self.store.about.blocks
        visits = [visits_of(of_step, slice(start, stop)) for start, stop in blocks.values()]
        parts = []
        with accelerated():
            weights = curvature_weights(visits, self.damping)
            for number, block in enumerate(blocks):
                part = embed_step(
                    visits[number],
                    propagators[number],
                    weights=weights[number],
                    step=step,
                    block=block,
                )
                parts.append(part)
        return torch.cat(parts, dim=1)

    def _identities(self) -> list[Propagator]:
        like = self._tensor(np.zeros(0, self.store.about.dtype))
        blocks = self.store.about.blocks.values()
        return [Propagator(like.new_zeros(stop - start)) for start, stop in blocks]

    def _keep(self, propagators: list[Propagator], stretch: int) -> None:
        for number, propagator in enumerate(propagators):
            matrix = propagator.matrix()[None].cpu().numpy()
            self.store.write(f"transport/{number}", matrix, stretch)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def visits_of(of_step: dict[str, Tensor], place: slice) -> Visits:
    """What a step says about some coordinates; arrays that were not gathered follow from others."""
    share = of_step["share"]
    fisher = of_step["fisher"][..., place]
    rate = of_step["rate"][..., place]
    decay = of_step["decay"][..., place]
    if "moved" in of_step:
        moved = of_step["moved"][..., place]
    elif "gradient" in of_step:
        moved = of_step["gradient"][..., place] * rate
    else:
        # The empirical Fisher matrix consists of the samples' own gradients.
        moved = fisher * rate
    if "fisher_moved" in of_step:
        fisher_moved = of_step["fisher_moved"][..., place]
    elif "gradient" in of_step:
        fisher_moved = fisher * rate
    else:
        fisher_moved = moved
    return Visits(
        share=share,
        moved=moved,
        fisher_share=of_step.get("fisher_share", share),
        fisher=fisher,
        fisher_moved=fisher_moved,
        decay=decay,
    )
