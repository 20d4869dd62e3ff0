r"""Diff-In (arXiv 2508.14648): influence from a few states, by gradients and their differences.

With N samples, steps 0 ... T-1, m states t, a proxy batch B, and G, H the gradient and Hessian of
a loss:

.. math::
    \text{published:} \quad \sum_t \frac{-t \eta_t^2}{N m} (H_B G_z + H_z G_B)
    \qquad
    \text{corrected:} \quad \sum_t \frac{T}{m}
    \Big( \frac{\eta_t}{N} G_z - \frac{t \eta_t^2}{N} H_B G_z \Big)

The published sum is 1/T of the second-order *correction* to the effect of a removal; the first
order is missing. Where both make sense, it correlates negatively with leave-one-out. The corrected
sum is the change of the parameters by a removal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, final, get_args

import numpy as np
import torch
from jaxtyping import Float64

from backtrail import arguments
from backtrail.errors import BadSetting, NeverTrainedOn, NotFinite
from backtrail.exclusive import exclusive
from backtrail.influence.influence import Influence
from backtrail.influence.layout import Description
from backtrail.influence.tables import places
from backtrail.influence.writer import InfluenceWriter
from backtrail.methods.diff_in.checkpoints import Checkpoints
from backtrail.methods.diff_in.finite_differences import Differences, Sides
from backtrail.methods.diff_in.forms import Corrected, Published
from backtrail.methods.diff_in.terms import Terms
from backtrail.methods.diff_in.trajectory import (
    Trajectory,
    checkpoints_argument,
    spread_over_visits,
    trajectory_of,
)
from backtrail.methods.observe import ObservedAt, check_queries, check_run, observed_states
from backtrail.methods.result import describe, sample_table, with_values
from backtrail.queries import Averaged, Query
from backtrail.run.run import Run
from backtrail.tree import Tree

Name = Literal["published", "corrected"]
ObservedStates = ObservedAt | Literal["checkpoints"]
# The setting that holds T times learning rate times curvature, and the value from which on the
# expansion that both forms are should not be relied on.
REACH = "T*lr*curvature"
UNRELIABLE_FROM = 0.2


@final
@dataclass(frozen=True, slots=True)
class DiffIn:
    r"""Influence from a few states of a training, without replaying its steps.

    It needs no second derivatives, and takes states of a recorded run or bare checkpoints.

    The term of a sample z at a state t, which stands for the steps since the state before, is
    paired with a query q:

    .. math::
        \text{corrected:} \quad \frac{T}{m} \Big\langle \nabla q(\theta_\tau),\;
        \frac{\eta_t}{N} G_z - \frac{t \eta_t^2}{N} H_B G_z \Big\rangle
        \qquad
        \text{published:} \quad \frac{-t \eta_t^2}{N m}
        \langle \nabla q(\theta_t),\; H_B G_z + H_z G_B \rangle

    The corrected form estimates what the query gains when the sample is removed, as long as T η λ
    (λ the largest curvature) is far below 1; `influence.settings["T*lr*curvature"]` holds that
    number. **The published form is no such estimate**: it lacks the first order, and its sign is
    mostly the opposite. The paper uses its magnitude.

    Both forms leave out momentum, weight decay and clipping (of the optimizer only the learning
    rate of every parameter group counts), which batch a sample was in, and changes of BatchNorm's
    statistics, which are those of the state (rows are read in eval mode).

    Source: "Diff-In", arXiv 2508.14648.

    Args:
        checkpoints: How many states: one from each of so many equal stretches of steps, the last
            that was kept there (or the stretch's end, by replay, where none was kept). 1 takes
            only the end, which costs least. Or the numbers of the states.
        form: "corrected" or "published".
        batch: Rows in the proxy batch B, which is drawn once.
        epsilon: Distance by which the parameters are moved for a finite difference (a hundredth of
            it in double precision with central differences).
        seed: Seed of the draw.
        sides: "central" differences, or "one-sided" as published, whose error is of order epsilon.
        rank: How many directions `self_influence` takes the curvature between gradients through,
            if there are more than twice as many samples; None takes every product exactly.
        chunk: Rows at once through the model; None: as many as are useful.

    Raises:
        BadSetting: An argument has an invalid value; the message names it and what is expected.
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
        """Refuse invalid arguments.

        Raises:
            BadSetting: An argument has an invalid value; the message names it.
        """
        arguments.choice("form", self.form, get_args(Name))
        arguments.choice("sides", self.sides, get_args(Sides))
        checked: dict[str, object] = {
            "checkpoints": checkpoints_argument(self.checkpoints),
            "batch": arguments.whole("batch", self.batch, least=1),
            "epsilon": arguments.positive("epsilon", self.epsilon),
            "seed": arguments.seed("seed", self.seed),
            "rank": arguments.positive_or_none("rank", self.rank),
            "chunk": arguments.positive_or_none("chunk", self.chunk),
        }
        # The dataclass is frozen. numpy's and torch's numbers become plain ones.
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @exclusive
    def attribute(
        self,
        run: "Run | Checkpoints",
        queries: Query,
        *,
        observed_at: ObservedStates = "checkpoints",
        out: str | Path | None = None,
    ) -> Influence:
        r"""Influence of every sample on the queries, `[query, observed_at, step, slot]`.

        Sign of the corrected form: what the query gains when the sample is removed; for a loss,
        positive is helpful, negative harmful. The published form has the same sign convention in
        its formula, and mostly the opposite sign in fact.

        The term of a state is spread evenly over the sample's visits in the steps that the state
        stands for (a sample without a visit there: over those in the nearest earlier step that has
        some, or else in the nearest later one). So `total()` at the last state is the whole sum,
        and at an earlier state the sum up to there. A sample that was never visited has zero. Bare
        checkpoints know no visits: the result has one step, with one slot for each sample.

        By :math:`\langle \nabla q, H_B G_z \rangle = \langle H_B \nabla q, G_z \rangle` the
        curvature costs one product for each query and state, however many samples there are.

        Args:
            run: A recorded run, or checkpoints of a training that was not recorded.
            queries: What is asked; the unit of the result is theirs.
            observed_at: Up to which states visits count: "checkpoints" are the states of the sum,
                with the end in place of the last; or "end", "epochs", a number, or several.
            out: Folder of the result. None keeps it in memory.

        Raises:
            BadSetting: The queries are of averaged weights.
        """
        check_queries(queries)
        if isinstance(queries, Averaged):
            expected = "queries that are not Averaged; backtrail.DIT supports averages"
            raise BadSetting("queries", queries, expected)
        path = arguments.folder_or_none("out", out)
        _check_states(run, observed_at)
        trajectory = self._trajectory(run)
        terms = self._terms(trajectory)
        states = _states(run, trajectory, observed_at)
        description, sample = _description(run, queries, states)
        description = replace(description, method="DiffIn", settings=self._settings(terms))
        end = trajectory.end
        if path is not None:
            task = trajectory.task
            description = with_values(description, queries, task, end.params, end.buffers)
        is_double = all(tensor.dtype == torch.float64 for tensor in end.params.values())
        writer = InfluenceWriter.begin(
            path,
            description,
            sample=sample,
            dtype="float64" if is_double else "float32",
        )
        if len(writer.done) < len(writer.shards):
            visits = _Visits.of(run, trajectory, sample)
            _fill(writer, terms.of_queries(queries, states), visits)
        return writer.finish().with_queries(queries)

    @exclusive
    def self_influence(
        self, run: "Run | Checkpoints", samples: Sequence[int] | None = None
    ) -> Float64[np.ndarray, " sample"]:
        """Influence of samples on their own loss; large, of either sign, where labels are wrong.

        Every sample has a curvature product of its own, which costs as many gradients as the proxy
        batch has rows. With many samples the products are taken through `rank` directions instead,
        in which the rows' gradients lie and curvature is large. Eight rows are checked against the
        exact product at every state; a warning is logged where they are off by 5 %.

        Args:
            run: A recorded run, or checkpoints of a training that was not recorded.
            samples: Row numbers; None: all, where one that was never visited has zero.

        Raises:
            UnknownSample: The training set has no such sample.
            NeverTrainedOn: One of the given samples was in no batch.
            NotFinite: Some influence is NaN or infinite.
        """
        trajectory = self._trajectory(run)
        if samples is None:
            wanted = np.arange(len(trajectory.task.data))
        else:
            wanted = np.asarray(_rows(trajectory, samples), dtype=np.int64)
        was_seen = np.isin(wanted, trajectory.samples)
        result = np.zeros(len(wanted))
        terms = self._terms(trajectory)
        result[was_seen] = terms.of_themselves(wanted[was_seen].tolist(), rank=self.rank)
        not_finite = wanted[~np.isfinite(result)]
        if len(not_finite):
            raise NotFinite(not_finite.tolist(), scored=True)
        return result

    @exclusive
    def parameter_change(self, run: "Run | Checkpoints", samples: Sequence[int]) -> Tree:
        """Change of the trained parameters when samples are removed together, by parameter name.

        Added to the final parameters, it removes the samples' effect as far as the corrected form
        goes. The published form is no estimate of that.

        Args:
            run: A recorded run, or checkpoints of a training that was not recorded.
            samples: Row numbers.

        Raises:
            UnknownSample: The training set has no such sample.
            NeverTrainedOn: One of the samples was in no batch.
        """
        trajectory = self._trajectory(run)
        rows = _rows(trajectory, samples)
        return self._terms(trajectory).of_removal(rows)

    def _trajectory(self, run: "Run | Checkpoints") -> Trajectory:
        if isinstance(run, Checkpoints):
            return run.trajectory(self.checkpoints)
        check_run(run)
        run.check_kept_steps()
        return trajectory_of(run, self.checkpoints)

    def _terms(self, trajectory: Trajectory) -> Terms:
        return Terms.of(
            trajectory,
            Corrected() if self.form == "corrected" else Published(),
            Differences(self.epsilon, self.sides),
            batch=self.batch,
            seed=self.seed,
            chunk=self.chunk,
        )

    def _settings(self, terms: Terms) -> dict[str, object]:
        reach = float(f"{terms.reach():.3g}")
        settings: dict[str, object] = {"form": self.form, REACH: reach}
        if reach > UNRELIABLE_FROM:
            settings["warning"] = "unreliable"
        settings["states"] = [point.state for point in terms.trajectory.points]
        settings["proxy"] = f"{len(terms.proxy)} rows, seed {self.seed}"
        settings["differences"] = f"{self.sides}, epsilon {self.epsilon:g}"
        settings["chunk"] = terms.chunk
        settings["exact"] = False
        return settings


def _rows(trajectory: Trajectory, samples: object) -> list[int]:
    """Rows of the training set, all of which were trained on.

    Raises:
        BadSetting: They are not one or more whole numbers.
        UnknownSample: The training set has no such sample.
        NeverTrainedOn: One of them was in no batch.
    """
    expected = "one or more numbers of samples"
    numbers = arguments.whole_numbers("samples", samples, least=None, expected=expected)
    rows = places(np.arange(len(trajectory.task.data)), numbers)
    unseen = np.setdiff1d(rows, trajectory.samples)
    if len(unseen):
        raise NeverTrainedOn(unseen.tolist(), len(trajectory.samples))
    return rows


def _check_states(run: "Run | Checkpoints", observed_at: object) -> None:
    """Refuse invalid observed states before any work is done.

    Raises:
        BadSetting: They are something else.
        NoSuchState: The run has no such state.
    """
    if isinstance(observed_at, str) and observed_at == "checkpoints":
        return
    if isinstance(run, Checkpoints):
        # Bare checkpoints have no states but their end.
        arguments.choice("observed_at", observed_at, ("checkpoints", "end"))
        return
    check_run(run)
    observed_states(run, observed_at)  # type: ignore[arg-type]


def _states(
    run: "Run | Checkpoints", trajectory: Trajectory, observed_at: ObservedStates
) -> Sequence[int]:
    """The observed states; without a recording there is only the end."""
    if not isinstance(run, Run):
        return [trajectory.steps]
    if isinstance(observed_at, str) and observed_at == "checkpoints":
        return observed_states(run, [stop for _, stop in trajectory.stretches])
    return observed_states(run, observed_at)


def _description(
    run: "Run | Checkpoints", queries: Query, states: Sequence[int]
) -> tuple[Description, np.ndarray]:
    """What the influence is about, and the samples of its slots, `[step, slot]`."""
    if isinstance(run, Run):
        return describe(run, queries, tuple(states), method="", settings={}), sample_table(run)
    sample = np.arange(len(run.task.data))[None]
    description = Description(
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
    return description, sample


@final
@dataclass(frozen=True, slots=True)
class _Visits:
    """Who sits in every slot, and which share of every state's term belongs there.

    Attributes:
        place: Place of the slot's sample among those trained on, `[step, slot]`.
        shares: Share of the sample's term, `[point, step, slot]`.
    """

    place: np.ndarray
    shares: np.ndarray

    @staticmethod
    def of(run: "Run | Checkpoints", trajectory: Trajectory, sample: np.ndarray) -> "_Visits":
        place = np.searchsorted(trajectory.samples, sample)
        if not isinstance(run, Run):
            return _Visits(place, np.ones((len(trajectory.points), *sample.shape)))
        shares = [spread_over_visits(sample, stretch) for stretch in trajectory.stretches]
        return _Visits(place, np.stack(shares))


def _fill(
    writer: InfluenceWriter,
    terms: Float64[np.ndarray, "query observed_at point sample"],
    visits: _Visits,
) -> None:
    """Spread the terms over the visits, and write them shard by shard."""
    observed = np.asarray(writer.description.observed_at)[:, None]
    for shard in sorted({*range(len(writer.shards))} - writer.done):
        first, stop = writer.shards[shard]
        steps = slice(first, stop)
        # [query, observed_at, point, step, slot], summed over the points.
        by_point = terms[:, :, :, visits.place[steps]] * visits.shares[:, steps]
        block = by_point.sum(axis=2)
        # Entries at steps from the observed state on are zero.
        is_before = np.arange(first, stop) < observed
        block *= is_before[:, :, None]
        unknown_losses = np.full(block.shape[2:], np.nan)
        writer.write(first, block, unknown_losses)
        writer.mark_done(shard)
