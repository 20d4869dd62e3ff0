r"""Dynamic Influence Tracker (Xu & Wu, arXiv 2502.10793), exact, through any supported optimizer.

One adjoint sweep over the recorded steps gives, for every query q and observed state τ,

.. math:: I[q, \tau, t, b] = -\,\partial q(\theta_\tau) / \partial w_{t,b}

which the paper approximates for plain SGD and recomputes for every window.

An attribution is planned (states, rules, memory), swept from the last step to the first, written
shard by shard on the way, and resumed from the last shard that was written.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, final, get_args

import numpy as np
from jaxtyping import Float

from backtrail import arguments
from backtrail.curvature.policies import Curvature, Hessian
from backtrail.curvature.vjp import Product
from backtrail.exclusive import exclusive
from backtrail.influence.influence import Influence
from backtrail.methods.derivative_check import check_derivatives
from backtrail.methods.dit.attribution import Attribution
from backtrail.methods.dit.auto import candidate_rules, choose_rules
from backtrail.methods.dit.checkpoint import CotangentStore
from backtrail.methods.dit.observing import cotangent_source
from backtrail.methods.memory import (
    Budget,
    Limits,
    budget,
    keep_limits,
    unfinished_chunk,
    unfinished_settings,
)
from backtrail.methods.observe import ObservedAt, check_queries, check_run, observed_states
from backtrail.methods.renormalize import check_renormalizable
from backtrail.methods.result import begin_or_resume, describe
from backtrail.methods.retrain.retrain import Denominator
from backtrail.optim.slopes import Tangent, UpdateDerivative
from backtrail.queries import Averaged, Query
from backtrail.run.run import Run
from backtrail.sweep.rules import Rules

# In the settings of an influence with another curvature than the Hessian.
SURROGATES = (
    "the curvature matrix is that of the gradient which the training used, with what it stops "
    "({}); backtrail.Hessian() takes the derivative of what was stopped, too"
)

Policy = Curvature | Literal["auto"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DIT:
    r"""Exact influence of every slot of every step, by one reverse sweep for all queries.

    .. math:: I[q, \tau, t, b] = -\,\partial q(\theta_\tau) / \partial w_{t,b}

    >>> DIT(denominator="renormalize", chunk=4).slope
    Tangent()

    Args:
        curvature: How the loss's second derivative is taken. "auto" leaves out some samples first
            and takes what predicts that best on this run, `Hessian` or `GaussNewton`, and for
            optimizers with a nonlinear update also with `Secant`; `influence.settings["chosen"]`
            says why.
        slope: How the update is differentiated: exactly, or as a mean over the width of one
            removal.
        denominator: "keep" leaves a removed sample's place in the batch's mean; "renormalize"
            divides by one less.
        memory: Bytes that a sweep may use beside the model; default half of what is free. It
            decides how many states are held and how many queries are pulled at once.
        chunk: How many queries are pulled at once, if you know better.

    Raises:
        BadSetting: Names the setting, and what it may be.
    """

    curvature: Policy = field(default_factory=Hessian)
    slope: UpdateDerivative = field(default_factory=Tangent)
    denominator: Denominator = "keep"
    memory: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            BadSetting: Names the setting, and what it may be.
        """
        is_auto = isinstance(self.curvature, str) and self.curvature == "auto"
        if not is_auto:
            policies = "backtrail.Hessian(), GaussNewton(), EmpiricalFisher(), Zero() or 'auto'"
            curvature = arguments.instance("curvature", self.curvature, Curvature, policies)  # type: ignore[type-abstract]
            arguments.choice("product", curvature.product, get_args(Product))
        slopes = "backtrail.Tangent() or backtrail.Secant()"
        arguments.instance("slope", self.slope, UpdateDerivative, slopes)  # type: ignore[type-abstract]
        arguments.choice("denominator", self.denominator, get_args(Denominator))
        keep_limits(self, Limits(memory=self.memory, chunk=self.chunk))

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
            queries: What is asked; all are answered by one sweep.
            observed_at: The states that the queries read: "end", "epochs", a number, or several.
            out: Folder of the result. If it holds an unfinished attribution of the same question,
                that one is resumed, with bit-identical results. None keeps the result in memory.
        """
        # Plan: which states, by which rules, in how much memory.
        check_run(run)
        check_queries(queries)
        path = arguments.folder_or_none("out", out)
        states = observed_states(run, observed_at)
        if self.denominator == "renormalize":
            check_renormalizable(run)
        checked = check_derivatives(run, self.curvature)
        rules, choice = self._rules(run, queries, state=states[-1], path=path)
        # Another chunk would change the last bits, so a resumed attribution keeps its own.
        limits = Limits(memory=self.memory, chunk=self.chunk or unfinished_chunk(path))
        twice = rules.curvature.product == "autograd"
        cut = budget(run, queries, len(states), twice=twice, limits=limits)
        settings = sweep_settings(run, queries, rules, cut) | choice | {"derivatives": checked}
        description = describe(
            run,
            queries,
            states,
            method="DIT",
            settings=settings,
            denominator=self.denominator,
        )
        # Sweep and write what is not there yet.
        writer = begin_or_resume(run, description, path, queries=queries)
        missing = sorted({*range(len(writer.shards))} - writer.done)
        if missing:
            source = cotangent_source(run, queries, states)
            attribution = Attribution(run, source, writer, CotangentStore(writer.path))
            attribution.fill(missing, rules, cut)
        return writer.finish().with_queries(queries)

    def _rules(
        self, run: Run, queries: Query, *, state: int, path: Path | None
    ) -> tuple[Rules, dict[str, object]]:
        """The rules of the sweep, and the setting that says why they were chosen, if they were."""
        if isinstance(self.curvature, Curvature):
            return Rules(self.curvature, self.slope), {}
        candidates = candidate_rules(run, self.slope)
        unfinished = unfinished_settings(path)
        if "chosen" in unfinished:
            # Measuring again would take as long, and might choose otherwise.
            begun = (unfinished["curvature"], unfinished["slope"])
            for rules in candidates:
                if (repr(rules.curvature), repr(rules.slope)) == begun:
                    return rules, {"chosen": unfinished["chosen"]}

        def predict(rules: Rules, some: Query) -> Float[np.ndarray, "query sample"]:
            method = replace(self, curvature=rules.curvature, slope=rules.slope, chunk=None)
            return method.attribute(run, some, observed_at=state).total()[:, 0]

        choice = choose_rules(
            run, queries, candidates, predict=predict, state=state, denominator=self.denominator
        )
        return choice.rules, {"chosen": choice.reason}


def sweep_settings(run: Run, queries: Query, rules: Rules, cut: Budget) -> dict[str, object]:
    """What the numbers of a sweep depend on; stored with the result."""
    settings: dict[str, object] = {
        "curvature": repr(rules.curvature),
        "slope": repr(rules.slope),
        # Queries that are pulled together are rounded differently than alone.
        "chunk": cut.chunk,
        "exact": rules.exact,
    }
    surrogates = run.task.binding.surrogates
    if surrogates and not isinstance(rules.curvature, Hessian):
        settings["surrogates"] = SURROGATES.format(", ".join(surrogates))
    if isinstance(queries, Averaged):
        settings["average"] = queries.about
    if run.task.binding.no_second_derivative:
        settings["differences"] = run.task.binding.no_second_derivative
    return settings
