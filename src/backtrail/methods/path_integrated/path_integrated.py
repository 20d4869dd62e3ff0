r"""What removing a sample does, integrated over its weight from 1 down to nearly 0.

A derivative at the full weight says little about a sample that the training memorises: a little
less of it is made up for by its other visits, and only near the weight 0 does the query change.
Here the derivative is taken at random weights between, in several re-runs of the training, and
averaged (Aumann-Shapley along the diagonal path, with the other samples' weights random too).

Each re-run is trained (`rerun`), swept (`backtrail.methods.dit`), and joined with the others
(`estimates`). All of that is in a folder, where an attribution that was killed is resumed.
"""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import final

import numpy as np

from backtrail import arguments
from backtrail.curvature.policies import Curvature
from backtrail.errors import BadSetting
from backtrail.exclusive import exclusive
from backtrail.influence.influence import Influence
from backtrail.influence.layout import Description
from backtrail.methods.derivative_check import check_derivatives
from backtrail.methods.dit.attribution import Attribution
from backtrail.methods.dit.checkpoint import CotangentStore
from backtrail.methods.dit.dit import DIT, sweep_settings
from backtrail.methods.dit.observing import cotangent_source
from backtrail.methods.memory import Budget, Limits, budget, unfinished_chunk
from backtrail.methods.observe import ObservedAt, check_queries, check_run, observed_states
from backtrail.methods.path_integrated.draws import Draws, check_share, draw_weights
from backtrail.methods.path_integrated.estimates import Estimates
from backtrail.methods.path_integrated.rerun import Rerun
from backtrail.methods.result import begin_or_resume, describe, sample_table
from backtrail.queries import Query
from backtrail.run.run import Run
from backtrail.sweep.rules import Rules

# In the settings of the result.
SLICES = (
    "a step, visits and visits_curve are shares of the full removal, which add up to the total; "
    "they are not the effect of removing that visit alone"
)
RERUNS = "reruns"  # folder of what is needed until the result is complete


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PathIntegrated:
    r"""Influence integrated over a sample's weight, by sweeps along re-runs with random weights.

    Removing sample j takes the weight :math:`w_j` of its loss from 1 to 0 at all its visits. With
    :math:`w = f^u`, and u uniform in [0, 1],

    .. math::
        q(f) - q(1) = -\int_f^1 \frac{\partial q}{\partial w}\, dw
            = -\ln(1/f)\; \mathrm{E}_u \Big[ w \frac{\partial q}{\partial w} \Big]

    The training is run again `runs` times from its recorded first state, along the recorded
    batches, random numbers and hyperparameters, with every drawn sample's loss multiplied by its
    own :math:`w^{(k)}_j`; the others keep the weight 1. One reverse sweep along each re-run gives
    the derivatives of all queries by all weights. The result is

    .. math:: I[q, \tau, t, b] = -\frac{\ln(1/f)}{n_j} \sum_{k:\, j \text{ drawn}}
        w^{(k)}_j\, \frac{\partial q(\theta^{(k)}_\tau)}{\partial w_{t,b}}, \qquad j = S_t[b]

    with :math:`n_j` the number of re-runs in which sample j was drawn. Sign: what the query gains
    when the sample is removed; for a loss, positive is helpful.

    It finds what `DIT` cannot: the few rows that a model has memorised an answer from. There the
    derivative at w = 1 is nearly zero, since later visits learn again what an earlier one lacks,
    and most of the integral lies at small weights. It costs `runs` trainings and as many sweeps.

    **What is estimated.** The integral of a derivative along the diagonal path is the
    Aumann-Shapley value; here the others' weights are random as well. With `share=1` every weight
    is drawn, and the expectation is that of removing the sample from a training in which the others
    have random weights with mean :math:`p = (1 - f) / \ln(1/f)`, .145 for f = 0.001. For a query
    that is multilinear in the weights this is a semivalue: the p-binomial one, a weighted Banzhaf
    value. It is not the removal from the full training: under SGD it describes a training with a
    seventh of the gradient, and near-copies of a row get larger values than from single removal,
    since each is measured without most of the others. With a smaller `share` the others keep the
    weight 1 more often. The result tends to the removal from the full training, and each re-run
    tells of fewer samples. The memorisation scores of Feldman & Zhang
    (`arXiv 2008.03703 <https://arxiv.org/abs/2008.03703>`_) compare trainings on random subsets
    with and without a sample in the same way; the derivative replaces the many trainings. (Koh &
    Liang's influence function, `arXiv 1703.04730 <https://arxiv.org/abs/1703.04730>`_, is the
    derivative at w = 1 alone, at a minimum.)

    **What slices mean.** `total` and `window` estimate removal from the whole training. A single
    step, `visits` and `visits_curve` are that visit's share of it: shares add up to the total, but
    a memorised sample has large shares and no effect of any one visit.

    **Limits.** The change from w = f to 0 is left out. Divisors stay as recorded (a mean is still
    divided by the full batch). Estimates are noisy: :meth:`Influence.standard_error` says by how
    much, from two draws of a sample on.

    >>> PathIntegrated(runs=8, share=0.5).floor
    0.001

    Args:
        base: The sweep along every re-run: curvature, slope, memory, chunk.
        runs: Number of re-runs.
        floor: f, the smallest weight, above 0 and below 1.
        share: Share of the re-runs in which a sample's weight is drawn, above 0 and at most 1.
            Every sample is drawn in runs * share of them, rounded up or down, and at least once.
        seed: Of the weights.

    Raises:
        BadSetting: Names the setting, and what it may be.
    """

    base: DIT = field(default_factory=DIT)
    runs: int = 4
    floor: float = 1e-3
    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            BadSetting: Names the setting, and what it may be.
        """
        arguments.instance("base", self.base, DIT, "a backtrail.DIT()")
        if not isinstance(self.base.curvature, Curvature):
            reason = (
                "a fixed curvature, such as backtrail.Hessian() or GaussNewton(): the automatic "
                "choice is for derivatives at the full weight"
            )
            raise BadSetting("base.curvature", self.base.curvature, reason)
        if self.base.denominator != "keep":
            reason = "'keep': a weight between 0 and 1 does not change the divisor of a mean"
            raise BadSetting("base.denominator", self.base.denominator, reason)
        above_0 = "a number above 0 and below 1"
        up_to_1 = "a number above 0 and at most 1"
        checked: dict[str, object] = {
            "runs": arguments.whole("runs", self.runs, least=1),
            "floor": arguments.real("floor", self.floor, above_0, lambda number: 0 < number < 1),
            "share": arguments.real("share", self.share, up_to_1, lambda number: 0 < number <= 1),
            "seed": arguments.seed("seed", self.seed),
        }
        # The dataclass is frozen, and numpy's numbers could not be stored with a result.
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        check_share(self.runs, self.share)

    @exclusive
    def attribute(
        self,
        run: Run,
        queries: Query,
        *,
        observed_at: ObservedAt = "end",
        out: str | Path | None = None,
    ) -> Influence:
        """Influence of every training sample at every step on the queries.

        Sign: what the query gains when the sample is removed; for a loss, positive is helpful,
        negative harmful.

        Args:
            run: The recorded training.
            queries: What is asked; all are answered by one sweep along each re-run.
            observed_at: The states that the queries read: "end", "epochs", a number, or several.
            out: Folder of the result. If it holds an unfinished attribution of the same question,
                that one is resumed, with bit-identical results. None keeps the result in memory,
                and what is needed meanwhile in a temporary folder.
        """
        check_run(run)
        check_queries(queries)
        path = arguments.folder_or_none("out", out)
        states = observed_states(run, observed_at)
        rules = self._rules()
        checked = check_derivatives(run, self.base.curvature)
        # Another chunk would change the last bits, so a resumed attribution keeps its own.
        limits = Limits(memory=self.base.memory, chunk=self.base.chunk or unfinished_chunk(path))
        twice = rules.curvature.product == "autograd"
        cut = budget(run, queries, len(states), twice=twice, limits=limits)
        settings = sweep_settings(run, queries, rules, cut) | self._settings()
        description = describe(
            run,
            queries,
            states,
            method="PathIntegrated",
            settings=settings | {"derivatives": checked},
        )
        writer = begin_or_resume(run, description, path, queries=queries, sampled=True)
        if len(writer.done) < len(writer.shards):
            # The re-runs are compared with nothing, so the task must reproduce the recording.
            run.check_steps()
            draws = self._draws(run)
            with working_folder(path) as folder:
                parts: list[Influence] = []
                for number, weights in enumerate(draws.weights):
                    work = _Part(run, queries, description, rules, cut, folder / f"{number:04d}")
                    parts.append(work.computed(weights))
                estimates = Estimates(parts, draws, math.log(1 / self.floor))
                estimates.write(writer, places_of_slots(run))
        if path is not None:
            shutil.rmtree(path / RERUNS, ignore_errors=True)
        return writer.finish().with_queries(queries)

    def _rules(self) -> Rules:
        curvature = self.base.curvature
        assert isinstance(curvature, Curvature), "The constructor refuses everything else."
        return Rules(curvature, self.base.slope)

    def _draws(self, run: Run) -> Draws:
        return draw_weights(
            len(run.ids), runs=self.runs, floor=self.floor, share=self.share, seed=self.seed
        )

    def _settings(self) -> dict[str, object]:
        """What is stored with the result beside the settings of the sweeps."""
        return {
            # Of the recorded training it is no derivative.
            "exact": False,
            "runs": self.runs,
            "floor": self.floor,
            "share": self.share,
            "seed": self.seed,
            "slices": SLICES,
        }


@final
@dataclass(frozen=True, slots=True)
class _Part:
    """One re-run and the sweep along it.

    Attributes:
        run: the recorded training.
        queries: what is asked.
        description: of the joined result.
        rules: of the sweep.
        cut: of the sweep.
        folder: of the states and of the influence.
    """

    run: Run
    queries: Query
    description: Description
    rules: Rules
    cut: Budget
    folder: Path

    def computed(self, weights: np.ndarray) -> Influence:
        """The influence along the re-run with these weights, computed where it is not on disk."""
        states = self.folder / "states"
        about = replace(self.description, method=f"PathIntegrated, re-run {self.folder.name}")
        writer = begin_or_resume(self.run, about, self.folder / "influence", queries=self.queries)
        missing = sorted({*range(len(writer.shards))} - writer.done)
        if missing:
            rerun = Rerun(self.run, weights, states)
            rerun.train()
            source = cotangent_source(rerun, self.queries, self.description.observed_at)
            store = CotangentStore(writer.path)
            Attribution(rerun, source, writer, store).fill(missing, self.rules, self.cut)
        shutil.rmtree(states, ignore_errors=True)
        return writer.finish()


@contextmanager
def working_folder(out: Path | None) -> Iterator[Path]:
    """A folder for the re-runs: within that of the result, or else a temporary one."""
    if out is not None:
        yield out / RERUNS
        return
    with TemporaryDirectory(prefix="backtrail-") as folder:
        yield Path(folder)


def places_of_slots(run: Run) -> np.ndarray:
    """The place of the sample in every slot among all samples, `[step, slot]`; -1 is padding."""
    sample = sample_table(run)
    return np.where(sample < 0, -1, np.searchsorted(run.ids, sample))
