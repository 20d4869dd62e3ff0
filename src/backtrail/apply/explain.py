"""Which samples made a query what it is: proposed by cheap scorers, verified by real removals."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import final, get_args

import numpy as np
import polars as pl
import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from backtrail import arguments
from backtrail.apply.candidates import (
    Order,
    Proposals,
    Scorer,
    default_scorers,
    near_copies,
    strength,
)
from backtrail.errors import BacktrailError, BadSetting
from backtrail.exclusive import exclusive
from backtrail.methods.observe import check_queries, check_run
from backtrail.methods.retrain.retrain import retrain
from backtrail.queries import Averaged, Loss, Margin, Part, Query
from backtrail.queries.selection import RowSelection
from backtrail.run.run import Run
from backtrail.task.classes import class_scores
from backtrail.task.task import Batch, Task, in_eval_mode
from backtrail.tree import cast, mapping_to_dict

log = logging.getLogger(__name__)
# Of the removals that are left once every query has one for its top k: removals of single samples
# that scorers propose. The rest are near-copies and groups of them.
SINGLE = 0.6
FEWEST = 4  # removals for each query
FEWEST_OTHERS = 5  # removals that no scorer connects with a query, to tell its noise
PROPOSED = 5  # first picks of every scorer that count as proposed for a query, at least
GOOD = 0.5  # scorers that are asked on, relative to the best one
Group = frozenset[int]


@exclusive
def explain(
    run: Run,
    queries: Query,
    k: int = 10,
    *,
    order: Order = "largest",
    removals: int = 64,
    scorers: Mapping[str, Scorer] | None = None,
    bank: str | Path | None = None,
) -> pl.DataFrame:
    r"""Find the samples that made each query what it is, and measure what removing them does.

    Scorers propose: by default TracIn, the derivative (`DIT`), and `PathIntegrated` with two
    re-runs. What they propose is **really removed**, by training again without it: single samples
    first, then the near-copies of those whose removal changes a query most, alone and together, and
    at the end the top k of every query together. So every effect in the table is that of a
    training, not an estimate.

    With :math:`e_j` the effect of removing sample j alone and :math:`e_G` that of removing the
    group G of near-copies that it belongs to, samples are ranked by the equal-surplus division (for
    two samples, the Shapley value)

    .. math:: s_j = e_j + \frac{1}{|G|} \Big( e_G - \sum_{i \in G} e_i \Big)

    which is :math:`e_j` where a sample has no near-copies. Near-copies cover for one another:
    alone, neither has an effect.

    Sign of all effects: what the query gains when samples are removed; for a loss, positive is
    helpful. To ask why a model gives a wrong answer, make queries of the losses with that answer as
    the label; the samples that taught it are then helpful.

    Args:
        run: The recorded training.
        queries: What is explained; each is a scalar at the end of the training.
        k: Number of samples for each query.
        order: "largest" (by absolute effect), "helpful" or "harmful" first.
        removals: Number of trainings without samples, at most, for all queries together; at least
            4 for each query. They run in stacks and, where that works, in float64. A removal
            answers all queries.
        scorers: Methods, embeddings or influences by name, in the place of the default ones.
        bank: Folder that stores the re-runs and the scorers' results. A call that was stopped goes
            on from there, and other queries find the re-runs that they share.

    Returns:
        A table with k rows for each query (fewer, if fewer samples were removed): query, rank,
        sample, effect, group_effect (null without near-copies), group (the near-copies that were
        removed with it), share (:math:`s_j`), noise (the median absolute effect of removed samples
        that no scorer proposed for the query, or the largest difference between two unperturbed
        re-runs if that is larger; smaller effects mean nothing), the rank by every scorer, and
        summary, a sentence on what removing the top k together does.

    Raises:
        BadSetting: An argument has a value that it cannot take.
        BacktrailError: No scorer can answer, or the training cannot be run again.
    """
    check_run(run)
    check_queries(queries)
    k = arguments.whole("k", k, least=1)
    arguments.choice("order", order, get_args(Order))
    least = FEWEST * len(queries.names)
    removals = arguments.whole("removals", removals)
    if removals < least:
        expected = f"at least {least}, {FEWEST} for each of {len(queries.names)} queries"
        raise BadSetting("removals", removals, expected)
    chosen = default_scorers() if scorers is None else _named(scorers)
    path = arguments.folder_or_none("bank", bank)
    scores_folder = None if path is None else path / "scores"
    proposals = Proposals.of(run, queries, chosen, order=order, folder=scores_folder)
    with _bank(path, queries) as folder:
        picks = max(k, PROPOSED)
        proposed = [proposals.first_picks(query, picks) for query in range(len(queries.names))]
        tried = _Removals(run, queries, order, proposed, folder)
        left = removals - len(queries.names)
        best = _remove_proposed(tried, proposals, budget=round(SINGLE * left))
        _remove_copies(tried, proposals.samples[best][:, 0], budget=left - tried.count)
        top = tried.top(k)
        tried.remove([frozenset(samples) for samples in top])
        answers = _answers(tried, top)
    return _table(tried, proposals, top, answers)


def _named(scorers: object) -> dict[str, Scorer]:
    expected = "one or more methods, embeddings or influences by name"
    named = arguments.instance("scorers", scorers, Mapping, expected)  # type: ignore[type-abstract]
    if not named:
        raise BadSetting("scorers", scorers, expected)
    return dict(named)


@contextmanager
def _bank(path: Path | None, queries: Query) -> Iterator[Path | None]:
    """A folder for the re-runs, which are read a second time for the predictions."""
    if isinstance(queries, Averaged):
        yield None  # of an average over the training, stored states say nothing
    elif path is not None:
        yield path
    else:
        with TemporaryDirectory(prefix="backtrail-") as folder:
            yield Path(folder)


@final
@dataclass(slots=True)
class _Removals:
    """Groups that were removed, and what that did to every query.

    Attributes:
        run: the recorded training.
        queries: what is explained.
        order: which samples come first.
        proposed: for every query, the samples that a scorer proposes for it.
        bank: folder of the re-runs, if there is one.
        effects: of every group, `[query]`.
        base: the queries without a removal.
        noise: largest difference between unperturbed re-runs.
    """

    run: Run
    queries: Query
    order: Order
    proposed: list[set[int]]
    bank: Path | None
    effects: dict[Group, Float64[np.ndarray, " query"]] = field(default_factory=dict)
    base: Float64[np.ndarray, " query"] = field(default_factory=lambda: np.zeros(0))
    noise: Float64[np.ndarray, " query"] = field(default_factory=lambda: np.zeros(0))

    @property
    def count(self) -> int:
        """Number of trainings so far."""
        return len(self.effects)

    @property
    def singles(self) -> list[int]:
        """Samples that were removed alone, in the order of their removal."""
        return [sample for group in self.effects if len(group) == 1 for sample in group]

    def remove(self, groups: Sequence[Group]) -> None:
        """Train again without each of the groups that were not removed yet."""
        new = [group for group in dict.fromkeys(groups) if group not in self.effects]
        if not new:
            return
        removed = [sorted(group) for group in new]
        found = retrain(self.run, self.queries, removed, bank=self.bank)
        for place, group in enumerate(new):
            self.effects[group] = found.change[:, -1, place].astype(np.float64)
        noise = found.noise[:, -1].astype(np.float64)
        self.noise = np.maximum(self.noise, noise) if len(self.noise) else noise
        self.base = found.base[:, -1].astype(np.float64)

    def effect(self, sample: int, query: int) -> float:
        """The effect of removing a sample alone."""
        return float(self.effects[frozenset([sample])][query])

    def group_of(self, sample: int, query: int) -> Group | None:
        """The group of near-copies in which a sample counts most; None without one."""
        groups = [group for group in self.effects if len(group) > 1 and sample in group]
        if not groups:
            return None
        return max(groups, key=lambda group: self._strength_in(sample, group, query))

    def share(self, sample: int, query: int) -> float:
        """The equal-surplus division of the effect of its group."""
        group = self.group_of(sample, query)
        if group is None:
            return self.effect(sample, query)
        return self._share_in(sample, group, query)

    def _share_in(self, sample: int, group: Group, query: int) -> float:
        alone = sum(self.effect(member, query) for member in group)
        surplus = float(self.effects[group][query]) - alone
        return self.effect(sample, query) + surplus / len(group)

    def _strength_in(self, sample: int, group: Group, query: int) -> float:
        share = np.array([self._share_in(sample, group, query)])
        found = float(strength(share, self.order)[0])
        return found if np.isfinite(found) else -np.inf

    def ranked(self, query: int) -> list[int]:
        """All samples that were removed alone, by their share; first those proposed for the query.

        In a training that reacts to every small change, any sample may have a large effect on any
        query. That of a sample which no scorer connects with the query says nothing of it.
        """
        samples = self.singles
        shares = np.array([self.share(sample, query) for sample in samples])
        strengths = strength(shares, self.order)
        # A training that diverged says nothing about a sample.
        strengths = np.where(np.isnan(strengths), -np.inf, strengths)
        is_other = np.array([sample not in self.proposed[query] for sample in samples])
        return [samples[place] for place in np.lexsort((-strengths, is_other))]

    def background(self, query: int) -> float:
        """How much removals change a query that no scorer connects with it: noise."""
        others = [
            abs(self.effect(sample, query))
            for sample in self.singles
            if sample not in self.proposed[query]
        ]
        typical = float(np.nanmedian(others)) if len(others) >= FEWEST_OTHERS else 0.0
        return max(float(self.noise[query]), typical)

    def top(self, k: int) -> list[list[int]]:
        """The first k samples of every query."""
        return [self.ranked(query)[:k] for query in range(len(self.queries.names))]


def _remove_proposed(tried: _Removals, proposals: Proposals, *, budget: int) -> str:
    """Remove what the scorers propose: their first picks, then more of those that were right.

    Returns:
        The scorer whose first picks were the strongest.
    """
    names = list(proposals.samples)
    first = proposals.dealt(names, first=0, stop=1)
    _remove_dealt(tried, first, budget=budget)
    success = {name: _success(tried, proposals, name) for name in names}
    best = max(success.values())
    ordered = sorted(names, key=lambda name: -success[name])
    good = [name for name in ordered if success[name] >= GOOD * best]
    _remove_dealt(tried, proposals.dealt(good, first=1), budget=budget)
    return ordered[0]


def _remove_dealt(tried: _Removals, dealt: Iterator[tuple[str, int, int]], *, budget: int) -> None:
    """Remove single samples until so many trainings were made."""
    chosen: dict[int, None] = {}
    for _, _, sample in dealt:
        if tried.count + len(chosen) >= budget:
            break
        if frozenset([sample]) not in tried.effects:
            chosen[sample] = None
    tried.remove([frozenset([sample]) for sample in chosen])


def _success(tried: _Removals, proposals: Proposals, name: str) -> float:
    """How strong the first picks of a scorer were, relative to the strongest, mean over queries."""
    found: list[float] = []
    for query, picks in enumerate(proposals.samples[name]):
        all_effects = np.array([tried.effect(sample, query) for sample in tried.singles])
        strongest = np.nanmax(strength(all_effects, tried.order), initial=0.0)
        pick = frozenset([int(picks[0])])
        if strongest > 0 and pick in tried.effects:
            own = float(strength(tried.effects[pick][[query]], tried.order)[0])
            found.append(np.nan_to_num(max(own, 0.0)) / strongest)
    return float(np.mean(found)) if found else 0.0


def _remove_copies(tried: _Removals, picks: Int64[np.ndarray, " query"], *, budget: int) -> None:
    """Remove near-copies of what is likely to be the reason, alone and together with it.

    First those of the best scorer's first pick for every query, then those of the samples whose own
    removal was the strongest.

    Args:
        tried: what was removed so far.
        picks: the first pick for every query.
        budget: number of further trainings.
    """
    by_query = [tried.ranked(query) for query in range(len(tried.queries.names))]
    copies = near_copies(tried.run, sorted({*tried.singles, *picks.tolist()}))
    groups: dict[Group, None] = {}
    alone: dict[Group, None] = {}
    for samples in [picks.tolist(), *zip(*by_query, strict=True)]:
        for query, sample in enumerate(samples):
            group = frozenset([sample, *copies.get(sample, [])])
            if len(group) == 1:
                continue
            if sample in tried.proposed[query]:
                tried.proposed[query].update(group)
            if group in groups:
                continue
            members = [frozenset([member]) for member in sorted(group)]
            new = {one: None for one in members if one not in tried.effects and one not in alone}
            if len(groups) + len(alone) + len(new) + 1 <= budget:
                groups[group] = None
                alone |= new
    tried.remove([*alone, *groups])


@final
class _ClassScores(Query):
    """The scores of all classes on the rows of another query."""

    unit = "logit"

    def __init__(self, rows: RowSelection, classes: int) -> None:
        self.mode = rows.mode
        self.selection = RowSelection(
            label="score",
            data=rows.data,
            rows=rows.rows,
            columns=tuple(f" {number}" for number in range(classes)),
            aggregate=None,
            mode=rows.mode,
            collate=rows.collate,
            batch=rows.batch,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Like `score 3[17]`."""
        return self.selection.names

    def parts(self, task: Task, like: Tensor, *, together: bool) -> Iterator[Part]:
        """The scores of blocks of rows."""
        return self.selection.parts(task, like, together=together, score=_scores_of)


def _scores_of(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    return class_scores(task.predict(model, batch))


def _answers(tried: _Removals, top: Sequence[Sequence[int]]) -> list[tuple[int, int] | None]:
    """The predicted class before and after removing the top k of each query, where there is one."""
    nothing: list[tuple[int, int] | None] = [None] * len(top)
    queries = tried.queries
    if tried.bank is None or not isinstance(queries, Loss | Margin):
        return nothing
    rows = queries.selection
    if rows.aggregate is not None:
        return nothing
    try:
        scores = _ClassScores(rows, _count_classes(tried.run, rows))
        groups = [sorted(samples) for samples in top]
        found = retrain(tried.run, scores, groups, bank=tried.bank)
    except BacktrailError:
        return nothing  # no classification
    shape = len(rows.rows), -1
    before = found.base[:, -1].reshape(shape).argmax(1)
    answers: list[tuple[int, int] | None] = []
    for query in range(len(top)):
        after = found.base[:, -1] + found.change[:, -1, query]
        answers.append((int(before[query]), int(after.reshape(shape)[query].argmax())))
    return answers


def _count_classes(run: Run, rows: RowSelection) -> int:
    """Number of classes that the model gives scores to.

    Raises:
        NoClasses: it gives none.
    """
    task = run.task
    state = run.state(run.kept[-1])
    collate = rows.collate or task.collate
    batch = cast(mapping_to_dict(collate([rows.data[rows.rows[0]]])), task.dtype, task.device)
    with in_eval_mode(task), torch.no_grad():
        outputs, _ = task.outputs(state.params, state.buffers, batch)
    return class_scores(outputs).shape[1]


def _table(
    tried: _Removals,
    proposals: Proposals,
    top: Sequence[Sequence[int]],
    answers: Sequence[tuple[int, int] | None],
) -> pl.DataFrame:
    schema: dict[str, pl.DataType | type[pl.DataType]] = {
        "query": pl.String,
        "rank": pl.Int64,
        "sample": pl.Int64,
        "effect": pl.Float64,
        "group_effect": pl.Float64,
        "group": pl.List(pl.Int64),
        "share": pl.Float64,
        "noise": pl.Float64,
    }
    for name in proposals.samples:
        schema[f"{name} rank"] = pl.Int64
    schema["summary"] = pl.String
    rows: list[tuple[object, ...]] = []
    for query, name in enumerate(tried.queries.names):
        ranks = [proposals.ranks(scorer, query) for scorer in proposals.samples]
        sentence = _sentence(tried, query, top[query], answers[query])
        for rank, sample in enumerate(top[query], start=1):
            group = tried.group_of(sample, query)
            rows.append(
                (
                    name,
                    rank,
                    sample,
                    tried.effect(sample, query),
                    None if group is None else float(tried.effects[group][query]),
                    [] if group is None else sorted(group - {sample}),
                    tried.share(sample, query),
                    tried.background(query),
                    *(of_scorer[sample] for of_scorer in ranks),
                    sentence,
                )
            )
    return pl.DataFrame(rows, schema=schema, orient="row")


def _sentence(
    tried: _Removals, query: int, samples: Sequence[int], answer: tuple[int, int] | None
) -> str:
    """What removing the top k of a query together does to it."""
    effect = float(tried.effects[frozenset(samples)][query])
    before = float(tried.base[query])
    if not np.isfinite(effect):
        return "Training without these samples together diverges."
    noise = tried.background(query)
    verb = "raises" if effect > 0 else "lowers"
    which = "Removing the sample" if len(samples) == 1 else f"Removing the {len(samples)} together"
    found = (
        f"{which} {verb} {tried.queries.names[query]} by {abs(effect):.3g}, from {before:.3g} to "
        f"{before + effect:.3g}"
    )
    if abs(effect) <= noise:
        found += f", which is not more than other samples change it by ({noise:.1g})"
    if answer is not None and answer[0] != answer[1]:
        found += f"; the model then predicts {answer[1]} instead of {answer[0]}"
    elif answer is not None:
        found += f"; the model still predicts {answer[0]}"
    return found + "."
