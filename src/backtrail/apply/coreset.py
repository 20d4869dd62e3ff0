"""Select a subset of the training set: by influence, embeddings, or common baselines."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
from jaxtyping import Float, Float64, Int64
from torch import Tensor

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
from backtrail.queries import Loss, Query
from backtrail.run.run import Run

Method = Literal["dve", "dit", "diff-in", "tracin", "herding", "el2n", "loss", "random"]
ASKED = 256  # training losses that influence is on, where no queries are given
EARLY = 3  # epochs whose ends EL2N looks at
METHODS: dict[str, Callable[[], Any]] = {
    "dit": DIT,
    "diff-in": lambda: DiffIn(form="corrected"),
    "tracin": lambda: TracIn(states="kept"),
}
Places = Int64[np.ndarray, " _"]
Choose = Callable[[Places, int], Places]  # so many of a group
Chooser = tuple[Float[np.ndarray, " sample"] | None, Choose]


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
    if not 0 < fraction <= 1:
        raise BadSetting("fraction", fraction, "0 < fraction <= 1")
    _check_options(method, queries, seed=seed)
    run.check_kept_steps()
    labels = _labels(run, needed=balanced is True)
    seen = _seen(run)
    pool = seen
    if among is not None:
        allowed = places(run.ids, numbers(among, name="among").tolist())
        pool = np.intersect1d(seen, allowed)
    groups = [pool]
    if labels is not None and balanced is not False:
        groups = [pool[labels[pool] == label] for label in np.unique(labels[pool])]
    score, choose = _chooser(run, method, queries, seed=seed)
    chosen = _in_turns(groups, min(max(1, round(fraction * len(seen))), len(pool)), choose)
    table = {
        "sample": run.ids[chosen],
        "score": pl.Series(
            [None] * len(chosen) if score is None else score[chosen], dtype=pl.Float64
        ),
        "rank": np.arange(1, len(chosen) + 1),
    }
    return pl.DataFrame(table | ({} if labels is None else {"label": labels[chosen]}))


def _check_options(
    method: str | Influence | Embeddings, queries: Query | None, *, seed: int
) -> None:
    """Refuse a method that there is not, and options that the method does not use.

    Raises:
        BadSetting: there is no such method.
        UnusedOption: names the option, and those that the method takes.
    """
    if isinstance(method, str) and method not in get_args(Method):
        names = ", ".join(map(repr, get_args(Method)))
        raise BadSetting("method", method, f"{names}, an Influence or Embeddings")
    is_ready = isinstance(method, (Influence, Embeddings))
    shown = f"method={type(method).__name__}" if is_ready else f"method={method!r}"
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
    try:
        scores.outputs(run, run.kept[-1])  # numbers that happen to be whole are no classes
        return scores.labels(run)
    except NoClasses:
        if needed:
            raise
        return None


def _in_turns(groups: Sequence[Places], count: int, choose: Choose) -> Places:
    """Interleave the choices of the groups in proportion, so that every prefix is balanced."""
    shares = quotas(np.array([len(group) for group in groups]), count)
    turns = [(np.arange(share) + 0.5) / share for share in shares]
    chosen = [choose(group, int(share)) for group, share in zip(groups, shares, strict=True)]
    found: Places = np.concatenate(chosen)[np.argsort(np.concatenate(turns), kind="stable")]
    return found


def _chooser(
    run: Run, method: str | Influence | Embeddings, queries: Query | None, *, seed: int
) -> Chooser:
    """What is told of every sample, and how some of a group are chosen."""
    if isinstance(method, Influence):
        method.check_run(run)
        return _by_influence(method.total()[:, -1])
    if isinstance(method, Embeddings):
        return _by_embeddings(run, method, queries)
    if method == "dve":
        return _by_embeddings(run, DataValueEmbedding().embed(run), queries)
    if method in BASELINES:
        return BASELINES[method](run, seed)
    return _by_influence(_attributed(run, method, queries, seed=seed))


def _by_embeddings(run: Run, embeddings: Embeddings, queries: Query | None) -> Chooser:
    """By what samples did to the weights, or to the queries.

    Raises:
        EmbeddedElsewhere: the embeddings are of another run.
    """
    if embeddings.about.run != run.id:
        raise EmbeddedElsewhere(embeddings.path, embeddings.about.run, run.id)
    if queries is None:
        return None, _herding(embeddings.summed())
    return _by_influence(embeddings.attribute(queries).total()[:, -1])


def _by_influence(found: Float[np.ndarray, "query sample"]) -> Chooser:
    return found.mean(axis=0), _herding(found.T)


def _by(keys: Float[np.ndarray, " sample"]) -> Choose:
    """The lowest keys first."""
    return lambda group, count: group[np.argsort(keys[group], kind="stable")[:count]]


def _herding(vectors: Float[np.ndarray, "sample entry"]) -> Choose:
    return lambda group, count: group[herded(vectors[group], count)]


def _attributed(
    run: Run, method: str, queries: Query | None, *, seed: int
) -> Float[np.ndarray, "query sample"]:
    """Influence on every query; of training losses, that of a row on itself left out.

    Raises:
        RowsNotReadable: there are no queries, and the training rows cannot be read.
    """
    if queries is None and run.has_ids:
        others = ", ".join(map(repr, ("dve", *BASELINES)))
        raise RowsNotReadable(
            f"{method!r} without queries", f"Give queries=, or a method that needs none ({others})"
        )
    rows = np.sort(
        np.random.default_rng(seed).choice(run.samples, min(ASKED, run.samples), replace=False)
    )
    asked = Loss(run.task.data, samples=rows.tolist()) if queries is None else queries
    found: np.ndarray = METHODS[method]().attribute(run, asked).total()[:, -1]
    if queries is None:
        found[np.arange(len(rows)), rows] = 0.0
    return found


def last_inputs(run: Run, state: int) -> Float64[np.ndarray, "sample entry"]:
    """Features of every training sample: the flattened input of the last layer at a state."""
    last = [
        module for module in run.task.binding.model.modules() if [*module.parameters(recurse=False)]
    ][-1]
    given: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _module, inputs: given.append(inputs[0]))
    try:
        found = scores.read_rows(run, state, lambda _outputs, _batch: given[-1].flatten(1))
    finally:
        handle.remove()
    return found


def _by_loss(run: Run, seed: int) -> Chooser:
    del seed
    score = scores.losses(run, run.steps)
    return score, _by(score)


def _by_el2n(run: Run, seed: int) -> Chooser:
    del seed
    score = scores.el2n(run, run.epochs[:EARLY])
    return score, _by(-score)


BASELINES: dict[str, Callable[[Run, int], Chooser]] = {
    "random": lambda run, seed: (None, _by(np.random.default_rng(seed).random(run.samples))),
    "herding": lambda run, _seed: (None, _herding(last_inputs(run, run.steps))),
    "el2n": _by_el2n,
    "loss": _by_loss,
}


def herded(vectors: Float[np.ndarray, "sample entry"], count: int) -> Int64[np.ndarray, " chosen"]:
    """Places of the first `count` rows in the order of herding; of equal rows, the first.

    >>> herded(np.array([[0.0], [1.0], [2.0], [9.0]]), 2).tolist()
    [2, 1]
    """
    sizes, mean = np.square(vectors).sum(axis=1), vectors.mean(axis=0)
    missing = np.zeros_like(mean)  # what the chosen lack to the mean of all
    free, chosen = np.ones(len(vectors), dtype=bool), np.zeros(count, dtype=np.int64)
    for place in range(count):
        missing += mean
        gap = np.where(free, sizes - 2 * (vectors @ missing), np.inf)
        chosen[place] = best = int(np.argmin(gap))
        free[best] = False
        missing -= vectors[best]
    return chosen


def quotas(sizes: Int64[np.ndarray, " group"], count: int) -> Int64[np.ndarray, " group"]:
    """Divide `count` among groups in proportion to their sizes, by largest remainders.

    >>> quotas(np.array([6, 3, 1]), 5).tolist()
    [3, 2, 0]
    """
    shares = sizes * count / sizes.sum()
    found: np.ndarray = np.floor(shares).astype(np.int64)
    rest = np.argsort(found - shares, kind="stable")[: count - int(found.sum())]
    found[rest] += 1
    return found
