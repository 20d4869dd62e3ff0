r"""Diff-In (arXiv 2508.14648): influence from a handful of states, by gradients and differences of gradients.

With N samples, steps 0 ... T-1, m states t looked at, a proxy batch B, and G, H the gradient and
Hessian of a loss:

.. math::
    \text{published:} \quad \sum_t \frac{-t \eta_t^2}{N m} (H_B G_z + H_z G_B)
    \qquad
    \text{corrected:} \quad \sum_t \frac{T}{m} \Big( \frac{\eta_t}{N} G_z - \frac{t \eta_t^2}{N} H_B G_z \Big)

The published sum is one T-th of the second-order *correction* to what a removal changes, its first
order dropped: where both make sense it runs against leaving samples out. The corrected sum is the
change of the parameters by a removal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, final, get_args

import numpy as np
import torch
from jaxtyping import Float64

from backtrail.errors import BadSetting
from backtrail.influence.influence import Influence
from backtrail.influence.layout import Description
from backtrail.influence.tables import places
from backtrail.influence.writer import InfluenceWriter
from backtrail.methods.diff_in.checkpoints import Checkpoints
from backtrail.methods.diff_in.finite_differences import Differences, Sides
from backtrail.methods.diff_in.forms import Corrected, Published
from backtrail.methods.diff_in.terms import Terms
from backtrail.methods.diff_in.trajectory import Trajectory, spread, trajectory_of
from backtrail.methods.observe import ObservedAt, observed_states
from backtrail.methods.result import described, slots
from backtrail.queries import Averaged, Query
from backtrail.run.run import Run
from backtrail.tree import Tree, each

Name = Literal["published", "corrected"]
Seen = ObservedAt | Literal["checkpoints"]
REACH, FAR = (
    "T*lr*curvature",
    0.2,
)  # the setting that tells it, and from where on the sums are not to be relied on


@final
@dataclass(frozen=True, slots=True)
class DiffIn:
    r"""Influence from a few states of a training, recorded or not: no replay of its steps, no second derivative.

    A term of a sample z at a state t, which stands for the steps since the state before, is paired
    with a query q:

    .. math::
        \text{corrected:} \quad \frac{T}{m} \Big\langle \nabla q(\theta_\tau),\;
        \frac{\eta_t}{N} G_z - \frac{t \eta_t^2}{N} H_B G_z \Big\rangle
        \qquad
        \text{published:} \quad \frac{-t \eta_t^2}{N m} \langle \nabla q(\theta_t),\; H_B G_z + H_z G_B \rangle

    The corrected form estimates what the query gains when the sample is removed, as long as T η λ
    (λ the largest curvature) is far below 1; `influence.settings["T*lr*curvature"]` says how far.
    **The published form is no such estimate**: it lacks the first order, and its sign is mostly the
    opposite. Use its size, as the paper does.

    Left out, in both: momentum, weight decay and clipping (of the optimizer, the rate of every
    parameter group is all that counts), which batch a sample was in, and BatchNorm's statistics,
    which are those of the state (rows are seen in eval mode).

    Args:
        checkpoints: how many states; one in each of so many equal stretches of steps, the last that
            was kept there (its end, by replay, where none was). 1 looks at the end only, the
            cheapest. Or the states themselves.
        form: "corrected" or "published".
        batch: rows in the proxy batch B, drawn once.
        epsilon: the length by which the parameters are moved for a difference (a hundredth of it in
            double precision, if central).
        seed: of the draw.
        sides: "central" differences, or "one-sided" as published, whose error is of the order of
            epsilon.
        rank: through how many directions `self_influence` takes the curvature between gradients,
            beyond twice as many samples; None takes every product, exactly.
        chunk: rows at once through the model; by default as many as are of use.

    Raises:
        BadSetting: names the setting, and what it may be.
    """

    checkpoints: int | Sequence[int] = 5
    form: Name = "published"
    batch: int = 512
    epsilon: float = field(default=1e-3, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    sides: Sides = field(default="central", kw_only=True)
    rank: int | None = field(default=16, kw_only=True)
    chunk: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse settings that are none.

        Raises:
            BadSetting: names the setting, and what it may be.
        """
        few = self.checkpoints
        if min([few] if isinstance(few, int) else few, default=0) < 1:
            raise BadSetting(
                "checkpoints", few, "a number of states from 1, or the numbers of states from 1"
            )
        for name, kinds in (("form", Name), ("sides", Sides)):
            if getattr(self, name) not in get_args(kinds):
                raise BadSetting(name, getattr(self, name), " or ".join(map(repr, get_args(kinds))))
        for name in ("batch", "chunk", "rank"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise BadSetting(name, getattr(self, name), "a number from 1")
        if not self.epsilon > 0:
            raise BadSetting("epsilon", self.epsilon, "a length above 0")

    def attribute(
        self,
        run: "Run | Checkpoints",
        queries: Query,
        *,
        observed_at: Seen = "checkpoints",
        out: str | Path | None = None,
    ) -> Influence:
        r"""Influence of every sample on the queries, as a few states tell it.

        Sign: what the query gains when the sample is removed; for a loss, positive is helpful,
        negative harmful (of the corrected form; the published one points the same way in its
        formula, and mostly the other way in fact).

        The term of a state is spread evenly over the sample's visits in the steps that the state
        stands for (where it has none there, over the nearest step before that has some, or else
        after). So `total()` at the last state is the whole sum, and at an earlier one the sum so
        far. A sample never visited has zero. Checkpoints without a recording know no visits: there
        the result has one step, and one slot a sample.

        With :math:`\langle \nabla q, H_B G_z \rangle = \langle H_B \nabla q, G_z \rangle` the
        curvature costs a product for each query and state, however many samples there are.

        Args:
            run: the recorded training, or checkpoints of one that was not.
            queries: what is asked.
            observed_at: up to which states visits count: "checkpoints" are the states looked at,
                with the end in place of the last; "end", "epochs", a number, or several.
            out: folder of the result. None keeps it in memory.

        Raises:
            BadSetting: the queries are of averaged weights.
        """
        if isinstance(queries, Averaged):
            raise BadSetting(
                "queries",
                queries,
                "queries of the weights themselves; backtrail.DIT answers for averages",
            )
        trajectory = self._course(run)
        terms, states = self._terms(trajectory), _states(run, trajectory, observed_at)
        about, sample = _about(run, queries, states)
        about = replace(about, method="DiffIn", settings=self._settings(terms))
        double = all(tensor.dtype == torch.float64 for tensor in trajectory.end.params.values())
        path, dtype = None if out is None else Path(out), "float64" if double else "float32"
        writer = InfluenceWriter.begin(path, about, sample=sample, dtype=dtype)
        if len(writer.done) < len(writer.shards):
            _fill(writer, terms.of_queries(queries, states), _Visits.of(run, trajectory, sample))
        return writer.finish().with_queries(queries)

    def self_influence(
        self, run: "Run | Checkpoints", samples: Sequence[int] | None = None
    ) -> Float64[np.ndarray, " sample"]:
        """Influence of samples on their own loss: large, of either sign, where a label does not fit its row.

        Every sample has a curvature product of its own, which takes as many gradients as the proxy
        batch has rows. Of many samples it is taken through `rank` directions instead, those in
        which rows' gradients lie and curvature is large. Eight rows are checked against the exact
        product at every state; the log warns where they are off by 5 %.

        Args:
            run: the recorded training, or checkpoints of one that was not.
            samples: which; all by default. One that was never visited has zero.

        Raises:
            UnknownSample: a sample that the training set does not have.
        """
        trajectory = self._course(run)
        wanted = (
            np.arange(len(trajectory.task.data))
            if samples is None
            else np.asarray(samples, dtype=np.int64)
        )
        seen = np.isin(_rows(trajectory, wanted.tolist()), trajectory.samples)
        found = np.zeros(len(wanted))
        found[seen] = self._terms(trajectory).of_themselves(wanted[seen].tolist(), rank=self.rank)
        return found

    def parameter_change(self, run: "Run | Checkpoints", samples: Sequence[int]) -> Tree:
        """What the trained parameters gain when samples are removed, all together: the sum over the samples.

        Added to the parameters at the end it forgets the samples, as far as the corrected form
        goes. The published form is no estimate of that.

        Args:
            run: the recorded training, or checkpoints of one that was not.
            samples: which; one that was never visited changes nothing.

        Raises:
            UnknownSample: a sample that the training set does not have.
        """
        trajectory = self._course(run)
        seen = set(trajectory.samples.tolist())
        rows = [row for row in _rows(trajectory, samples) if row in seen]
        if not rows:
            return each(torch.zeros_like, trajectory.end.trained)
        return self._terms(trajectory).of_removal(rows)

    def _course(self, run: "Run | Checkpoints") -> Trajectory:
        return (
            run.trajectory(self.checkpoints)
            if isinstance(run, Checkpoints)
            else trajectory_of(run, self.checkpoints)
        )

    def _terms(self, trajectory: Trajectory) -> Terms:
        form = Corrected() if self.form == "corrected" else Published()
        differences = Differences(self.epsilon, self.sides)
        return Terms.of(
            trajectory, form, differences, batch=self.batch, seed=self.seed, chunk=self.chunk
        )

    def _settings(self, terms: Terms) -> dict[str, object]:
        reach = float(f"{terms.reach():.3g}")
        doubt = {"warning": "unreliable"} if reach > FAR else {}
        return {
            "form": self.form,
            REACH: reach,
            **doubt,
            "states": [point.state for point in terms.trajectory.points],
            "proxy": f"{len(terms.proxy)} rows, seed {self.seed}",
            "differences": f"{self.sides}, epsilon {self.epsilon:g}",
            "chunk": terms.chunk,
            "exact": False,
        }


def _rows(trajectory: Trajectory, samples: Sequence[int]) -> list[int]:
    return places(np.arange(len(trajectory.task.data)), samples)


def _states(run: "Run | Checkpoints", trajectory: Trajectory, observed_at: Seen) -> Sequence[int]:
    """The observed states; without a recording there is only the end."""
    if not isinstance(run, Run):
        return [trajectory.steps]
    ends = [stop for _, stop in trajectory.stretches]
    return observed_states(run, ends if observed_at == "checkpoints" else observed_at)


def _about(
    run: "Run | Checkpoints", queries: Query, states: Sequence[int]
) -> tuple[Description, np.ndarray]:
    """What the influence is about, and the samples of its slots."""
    if isinstance(run, Run):
        return described(run, queries, tuple(states)), slots(run)
    sample = np.arange(len(run.task.data))[None]
    about = Description(
        method="",
        unit=queries.unit,
        denominator="keep",
        run="checkpoints",
        queries=queries.names,
        observed_at=(1,),
        steps=1,
        slots=sample.size,
        samples=sample.size,
        shard=1,
    )
    return about, sample


def _fill(
    writer: InfluenceWriter,
    terms: Float64[np.ndarray, "query observed_at point sample"],
    visits: "_Visits",
) -> None:
    """Spread the terms over the visits, shard by shard."""
    observed = np.asarray(writer.description.observed_at)[:, None]
    for shard in sorted({*range(len(writer.shards))} - writer.done):
        first, stop = writer.shards[shard]
        steps = slice(first, stop)
        shares = visits.shares[:, steps]
        block = (terms[:, :, :, visits.place[steps]] * shares).sum(2)
        block *= (np.arange(first, stop) < observed)[:, :, None]
        writer.write(first, block, np.full(block.shape[2:], np.nan))
        writer.mark_done(shard)


@final
@dataclass(frozen=True, slots=True)
class _Visits:
    """Who sits in every slot, and how much of every state's term belongs there.

    Attributes:
        place: of the slot's sample among those trained on, `[step, slot]`.
        shares: `[point, step, slot]`.
    """

    place: np.ndarray
    shares: np.ndarray

    @staticmethod
    def of(run: "Run | Checkpoints", trajectory: Trajectory, sample: np.ndarray) -> "_Visits":
        place = np.searchsorted(trajectory.samples, sample)
        if isinstance(run, Run):
            return _Visits(
                place, np.stack([spread(sample, stretch) for stretch in trajectory.stretches])
            )
        return _Visits(place, np.ones((len(trajectory.points), *sample.shape)))
