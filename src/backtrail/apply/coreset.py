"""Select a subset of the training set: by influence, embeddings, or common baselines."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from backtrail import arguments
from backtrail.apply import signals as scores
from backtrail.apply.coreset_report import Samples, numbers
from backtrail.errors import (
    BadSetting,
    EmbeddedElsewhere,
    NoClasses,
    RowsNotReadable,
    UnusedOption,
)
from backtrail.exclusive import exclusive
from backtrail.influence.influence import Influence
from backtrail.influence.tables import places
from backtrail.methods.diff_in.diff_in import DiffIn
from backtrail.methods.dit.dit import DIT
from backtrail.methods.dve.dve import DataValueEmbedding
from backtrail.methods.dve.embeddings import Embeddings
from backtrail.methods.gradient_dot.tracin import TracIn
from backtrail.methods.observe import check_queries, check_run
from backtrail.queries import Loss, Query
from backtrail.run.run import Run

Method = Literal["dve", "dit", "diff-in", "tracin", "herding", "el2n", "loss", "random"]
ASKED = 256  # rows of the training set whose losses stand in for queries that are not given
EARLY = 3  # EL2N is read at the ends of so many epochs
METHODS: dict[str, Callable[[], Any]] = {
    "dit": DIT,
    "diff-in": lambda: DiffIn(form="corrected"),
    "tracin": lambda: TracIn(states="kept"),
}
Places = Int64[np.ndarray, " _"]  # of samples in `run.ids`
Choose = Callable[[Places, int], Places]  # chooses so many samples of a group, the best first
Chooser = tuple[Float[np.ndarray, " sample"] | None, Choose]  # the scores in the table, if any


@exclusive
def select_coreset(
    run: Run,
    fraction: float = 0.3,
    *,
    queries: Query | None = None,
    method: str | Influence | Embeddings = "dve",
    balanced: bool | None = None,
    among: Samples | None = None,
    seed: int = 0,
) -> pl.DataFrame:
    r"""Select the part of the training set that represents all of it best.

    Every sample j has a vector :math:`a_j`, and k of N samples are taken one by one so that their
    sum follows the sum of all (herding; Welling, 2009):

    .. math:: j_{i+1} = \arg\min_{j} \Big\lVert
        \frac{i + 1}{N} \sum_{l} a_l - \sum_{l \le i} a_{j_l} - a_j \Big\rVert_2

    For "dve" :math:`a_j` is the sample's embedding, summed over its visits: what it did to the
    final weights. For the other influences it is the influence on every query, so that to first
    order no query's loss differs between training on all samples and on the selected ones. The
    samples with the largest influence would be near-duplicates of one another, and a poor coreset.

    Args:
        run: The recorded training on all samples.
        fraction: Share of the samples seen in training that is kept, above 0 and at most 1.
        queries: Losses of validation rows, best one query per row. By default those of at most 256
            rows of the training set, without the influence of a row on its own loss. "dve" and
            `Embeddings` do without queries.
        method: "dve", "dit" (a sweep per query: use few), "diff-in", "tracin", or an existing
            `Influence` or `Embeddings`. For comparison: "herding" in the inputs of the model's last
            layer; "el2n", the samples that the first epochs got most wrong; "loss", those with the
            least loss at the end; "random".
        balanced: Keep every class's share of samples; by default where the task has classes.
        among: Samples to select from, as numbers or as a table with a column `sample`; all by
            default. If they are fewer than are to be kept, all of them are.
        seed: Of "random", and of the choice of training rows where influence is computed without
            `queries`.

    Returns:
        One row per kept sample, the best first: sample, score, rank (from 1), and label where there
        are classes. The score is the influence on the mean of the queries, EL2N, or the loss; null
        where the method has none.

    Raises:
        BadSetting: A fraction out of range, or an unknown method.
        UnusedOption: Queries or a seed for a method that does not use them.
        OtherRun: The influence belongs to another run.
        EmbeddedElsewhere: The embeddings belong to another run.
        NoClasses: Classes are to be balanced, and the task has none.
        RowsNotReadable: Queries are needed, since the samples are ids and their losses cannot be
            read.
        UnknownSample: A sample in `among` that the training set does not have.
    """
    check_run(run)
    expected = "0 < fraction <= 1"
    fraction = arguments.real("fraction", fraction, expected, lambda share: 0 < share <= 1)
    seed = arguments.seed("seed", seed)
    if queries is not None:
        check_queries(queries)
    if balanced is not None and not isinstance(balanced, bool):
        raise BadSetting("balanced", balanced, "True, False or None")
    _check_options(method, queries, seed=seed)
    run.check_kept_steps()
    labels = _labels(run, needed=balanced is True)
    seen = _seen(run)
    pool = seen
    if among is not None:
        ids = numbers(among, name="among")
        allowed = places(run.ids, ids.tolist())
        pool = np.intersect1d(seen, allowed)
        if not len(pool):
            raise BadSetting("among", ids[:6].tolist(), "some samples that were in a batch")
    # The fraction is of all samples seen, also where only some of them may be selected.
    count = max(1, round(fraction * len(seen)))
    count = min(count, len(pool))

    groups = [pool]
    if labels is not None and balanced is not False:
        groups = [pool[labels[pool] == label] for label in np.unique(labels[pool])]
    score, choose = _chooser(run, method, queries, seed=seed)
    chosen = _in_turns(groups, count, choose)

    known = [None] * len(chosen) if score is None else score[chosen]
    columns = {
        "sample": run.ids[chosen],
        "score": pl.Series(known, dtype=pl.Float64),
        "rank": np.arange(1, len(chosen) + 1),
    }
    if labels is not None:
        columns["label"] = labels[chosen]
    return pl.DataFrame(columns)


def _check_options(
    method: str | Influence | Embeddings, queries: Query | None, *, seed: int
) -> None:
    """Refuse an unknown method, and options that the method does not use.

    Raises:
        BadSetting: there is no such method.
        UnusedOption: names the option, and those that the method takes.
    """
    known = get_args(Method)
    is_known = isinstance(method, str) and method in known
    if not is_known and not isinstance(method, (Influence, Embeddings)):
        names = ", ".join(repr(name) for name in known)
        raise BadSetting("method", method, f"{names}, an Influence or Embeddings")
    if isinstance(method, (Influence, Embeddings)):
        shown = f"method={type(method).__name__}"
    else:
        shown = f"method={method!r}"
    takes = ["among", "balanced"]
    if method == "random":
        takes.append("seed")
    elif isinstance(method, Embeddings) or method == "dve":
        takes.append("queries")
    elif method in METHODS:
        takes.append("queries")
        if queries is None:
            takes.append("seed")  # the training rows whose losses stand in for queries are drawn
        else:
            shown += ", queries=..."
    call = f"select_coreset({shown})"
    if queries is not None and "queries" not in takes:
        raise UnusedOption("queries", queries, call=call, takes=takes)
    if seed != 0 and "seed" not in takes:
        raise UnusedOption("seed", seed, call=call, takes=takes)


def _seen(run: Run) -> Places:
    """Places of the samples that the training saw."""
    return np.flatnonzero(np.isin(run.ids, run.seen))


def _labels(run: Run, *, needed: bool) -> Int64[np.ndarray, " sample"] | None:
    """The class of every sample; None where there are no classes and none are needed.

    Raises:
        NoClasses: they are needed.
    """
    try:
        # Labels that happen to be whole numbers are classes only if the outputs are class scores.
        scores.outputs(run, run.kept[-1])
        return scores.labels(run)
    except NoClasses:
        if needed:
            raise
        return None


def _in_turns(groups: Sequence[Places], count: int, choose: Choose) -> Places:
    """Interleave the choices of the groups in proportion, so that every prefix is balanced."""
    sizes = np.array([len(group) for group in groups])
    shares = quotas(sizes, count)
    chosen = []
    turns = []
    for group, share in zip(groups, shares, strict=True):
        chosen.append(choose(group, int(share)))
        # The choices of every group are spread evenly over the interval from 0 to 1.
        turns.append((np.arange(share) + 0.5) / share)
    order = np.argsort(np.concatenate(turns), kind="stable")
    interleaved: Places = np.concatenate(chosen)[order]
    return interleaved


def _chooser(
    run: Run, method: str | Influence | Embeddings, queries: Query | None, *, seed: int
) -> Chooser:
    """The score of every sample, and how some samples of a group are chosen."""
    if isinstance(method, Influence):
        method.check_run(run)
        return _by_influence(method.total()[:, -1])
    if isinstance(method, Embeddings):
        return _by_embeddings(run, method, queries)
    if method == "dve":
        return _by_embeddings(run, DataValueEmbedding().embed(run), queries)
    if method in BASELINES:
        return BASELINES[method](run, seed)
    influence = _attributed(run, method, queries, seed=seed)
    return _by_influence(influence)


def _by_embeddings(run: Run, embeddings: Embeddings, queries: Query | None) -> Chooser:
    """By what samples did to the weights, or to the queries.

    Raises:
        EmbeddedElsewhere: the embeddings are of another run.
    """
    if embeddings.about.run != run.id:
        raise EmbeddedElsewhere(embeddings.path, embeddings.about.run, run.id)
    if queries is None:
        return None, _herding(embeddings.summed())
    influence = embeddings.attribute(queries)
    return _by_influence(influence.total()[:, -1])


def _by_influence(influence: Float[np.ndarray, "query sample"]) -> Chooser:
    """Every sample's vector is its influence on all queries, and its score their mean."""
    return influence.mean(axis=0), _herding(influence.T)


def _by(keys: Float[np.ndarray, " sample"]) -> Choose:
    """Choose the samples with the lowest keys."""

    def choose(group: Places, count: int) -> Places:
        order = np.argsort(keys[group], kind="stable")
        lowest: Places = group[order[:count]]
        return lowest

    return choose


def _herding(vectors: Float[np.ndarray, "sample entry"]) -> Choose:
    """Choose samples whose vectors together follow the sum over their group."""

    def choose(group: Places, count: int) -> Places:
        found: Places = group[herded(vectors[group], count)]
        return found

    return choose


def _attributed(
    run: Run, method: str, queries: Query | None, *, seed: int
) -> Float[np.ndarray, "query sample"]:
    """Influence on every query; of training losses, that of a row on itself left out.

    Raises:
        RowsNotReadable: there are no queries, and the training rows cannot be read.
    """
    if queries is None and run.has_ids:
        others = ", ".join(repr(name) for name in ("dve", *BASELINES))
        raise RowsNotReadable(
            f"{method!r} without queries", f"Give queries=, or a method that needs none ({others})"
        )
    attribution = METHODS[method]()
    if queries is not None:
        given: np.ndarray = attribution.attribute(run, queries).total()[:, -1]
        return given
    generator = np.random.default_rng(seed)
    count = min(ASKED, run.samples)
    rows = np.sort(generator.choice(run.samples, count, replace=False))
    losses = Loss(run.task.data, samples=rows.tolist())
    found: np.ndarray = attribution.attribute(run, losses).total()[:, -1]
    # A row helps its own loss most, which says nothing of its use for the others.
    found[np.arange(len(rows)), rows] = 0.0
    return found


def last_inputs(run: Run, state: int) -> Float64[np.ndarray, "sample entry"]:
    """Features of every training sample: the flattened input of the last layer at a state."""
    modules = list(run.task.binding.model.modules())
    # The last module with parameters of its own, in the order in which the model defines them.
    last = next(m for m in reversed(modules) if list(m.parameters(recurse=False)))
    seen: list[Tensor] = []

    def keep_input(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    handle = last.register_forward_pre_hook(keep_input)
    try:
        features = scores.read_rows(run, state, lambda _outputs, _batch: seen.pop().flatten(1))
    finally:
        handle.remove()
    return features


def _by_chance(run: Run, seed: int) -> Chooser:
    keys = np.random.default_rng(seed).random(run.samples)
    return None, _by(keys)


def _by_last_inputs(run: Run, seed: int) -> Chooser:
    del seed
    return None, _herding(last_inputs(run, run.steps))


def _by_el2n(run: Run, seed: int) -> Chooser:
    """The samples with the largest EL2N first."""
    del seed
    score = scores.el2n(run, run.epochs[:EARLY])
    return score, _by(-score)


def _by_loss(run: Run, seed: int) -> Chooser:
    """The samples with the smallest loss first."""
    del seed
    score = scores.losses(run, run.steps)
    return score, _by(score)


BASELINES: dict[str, Callable[[Run, int], Chooser]] = {
    "random": _by_chance,
    "herding": _by_last_inputs,
    "el2n": _by_el2n,
    "loss": _by_loss,
}


def herded(vectors: Float[np.ndarray, "sample entry"], count: int) -> Int64[np.ndarray, " chosen"]:
    """Places of the first `count` rows in the order of herding; of equal rows, the first.

    >>> herded(np.array([[0.0], [1.0], [2.0], [9.0]]), 2).tolist()
    [2, 1]
    """
    squares = np.square(vectors).sum(axis=1)
    mean = vectors.mean(axis=0)
    missing = np.zeros_like(mean)  # (i + 1) times the mean, less the sum of those chosen so far
    free = np.ones(len(vectors), dtype=bool)
    chosen = np.zeros(count, dtype=np.int64)
    for place in range(count):
        missing += mean
        # |missing - a|^2 without |missing|^2, which is the same for all.
        distances = squares - 2 * (vectors @ missing)
        best = int(np.argmin(np.where(free, distances, np.inf)))
        chosen[place] = best
        free[best] = False
        missing -= vectors[best]
    return chosen


def quotas(sizes: Int64[np.ndarray, " group"], count: int) -> Int64[np.ndarray, " group"]:
    """Divide `count` among groups in proportion to their sizes, by largest remainders.

    >>> quotas(np.array([6, 3, 1]), 5).tolist()
    [3, 2, 0]
    """
    shares = sizes * count / sizes.sum()
    whole: np.ndarray = np.floor(shares).astype(np.int64)
    rest = count - int(whole.sum())
    by_remainder = np.argsort(whole - shares, kind="stable")  # the largest remainder first
    whole[by_remainder[:rest]] += 1
    return whole
