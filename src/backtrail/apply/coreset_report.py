"""Compare parts of the training set, by training again on each of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import final

import numpy as np
import polars as pl
import torch
from jaxtyping import Int
from torch import Tensor, nn

from backtrail import arguments
from backtrail.apply.signals import are_classes, class_scores
from backtrail.errors import BadSetting
from backtrail.exclusive import exclusive
from backtrail.influence.tables import places
from backtrail.methods.observe import check_queries, check_run
from backtrail.methods.result import sample_table
from backtrail.methods.retrain.retrain import perturb
from backtrail.methods.retrain.weights import keep_only
from backtrail.queries import Part, Query
from backtrail.queries.rows import RowQuery
from backtrail.queries.selection import RowSelection
from backtrail.run.run import Run
from backtrail.task.classes import class_labels
from backtrail.task.task import Batch, Task, in_eval_mode
from backtrail.tree import Tree, cast, mapping_to_dict

Samples = Sequence[int] | Int[np.ndarray, " kept"] | pl.Series | pl.DataFrame
# A training again for each: more is a mistake.
MOST_DRAWS = 100_000
COLUMNS = "name", "kept", "loss", "change", "accuracy"


@exclusive
def compare_coresets(
    run: Run,
    coresets: Mapping[str, Samples],
    queries: Query,
    *,
    draws: int = 3,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> pl.DataFrame:
    r"""Train again on each of several parts of the training set, and on random parts of equal size.

    The recorded training is run again from its recorded start through its recorded batches, in
    which all other samples have weight 0 and the kept ones share it:

    .. math:: w_{t,b} = |S_t| / k_t \;\text{ if kept (of } k_t \text{), else } 0.

    So a part is trained on for as many **steps** as all samples were: a tenth of the data is seen
    ten times as often as in a training of its own with as many epochs, in batches a tenth as large;
    a step with no kept sample has no gradient. BatchNorm's statistics still include the others. All
    parts are trained at once, in one stack.

    Give queries on rows that the selection did not use: a score that selected the data cannot judge
    it.

    Args:
        run: The recorded training.
        coresets: The kept samples of each part, by name, for example from
            :func:`backtrail.select_coreset`.
        queries: What to compare, such as the losses of test rows; the table has their mean.
        draws: How many random parts of each size; the table has their mean.
        seed: Of the random parts.
        dtype: Precision of the trainings; by default the recorded one.

    Returns:
        A row for all samples, one for each part, and one for random parts of each of their sizes:
        name, kept (of the samples seen in training), loss (mean of the queries after the training),
        change (from training on all samples), and, where the queries are scores of rows with
        classes, accuracy on these rows.

    Raises:
        BadSetting: There is no part, one is empty, or `draws` is negative.
        UnknownSample: A sample that the training set does not have.
    """
    check_run(run)
    check_queries(queries)
    if not isinstance(coresets, Mapping) or not coresets:
        raise BadSetting("coresets", coresets, "at least one part by name, like {'mine': samples}")
    most = f"an integer from 0 to {MOST_DRAWS}"
    draws = arguments.whole("draws", draws, least=0, most=MOST_DRAWS, expected=most)
    seed = arguments.seed("seed", seed)
    dtype = arguments.precision("dtype", dtype)
    # Every row of the table is the mean over one or several parts of one size.
    named = [(name, [_ids(run, name, samples)]) for name, samples in coresets.items()]
    sizes = sorted({len(parts[0]) for _, parts in named})
    if draws:
        generator = np.random.default_rng(seed)
        for size in sizes:
            drawn = [generator.choice(run.seen, size, replace=False) for _ in range(draws)]
            named.append((f"random {size}", drawn))

    slots = sample_table(run)  # the sample in every slot, [step, slot]; negative where padded
    is_sample = slots >= 0
    changes = []
    for _, parts in named:
        for part in parts:
            changes.append(keep_only(np.isin(slots, part), is_sample))
    with_accuracy = _with_accuracy(run, queries)
    asked = with_accuracy or queries
    found = perturb(run, asked, changes, observed_at=(run.steps,), dtype=dtype)
    base = found.base[:, 0]  # [query]
    change = found.change[:, 0]  # [query, part]

    after = [base]
    first = 0
    for _, parts in named:
        stop = first + len(parts)
        after.append(base + change[:, first:stop].mean(axis=1))
        first = stop
    queries_after = np.stack(after)  # [row, query]

    if with_accuracy:
        loss = queries_after[:, 0]
    else:
        loss = queries_after.mean(axis=1)
    columns = {
        "name": ["everything", *(name for name, _ in named)],
        "kept": [len(run.seen), *(len(parts[0]) for _, parts in named)],
        "loss": loss,
        "change": loss - loss[0],
    }
    if with_accuracy:
        columns["accuracy"] = queries_after[:, 1]
    return pl.DataFrame(columns)


def numbers(samples: Samples, *, name: str = "samples") -> Int[np.ndarray, " kept"]:
    """Samples in order, each once; of a table, its column `sample`.

    >>> numbers(pl.DataFrame({"sample": [5, 2, 5]})).tolist()
    [2, 5]

    Raises:
        BadSetting: there are none; or a mask of true and false was given, which would be taken for
            the samples 0 and 1.
    """
    expected = "one or more samples, by their numbers (not a mask)"
    column: object = samples
    if isinstance(samples, pl.DataFrame):
        if "sample" not in samples.columns:
            raise BadSetting(name, samples.columns, "samples, or a table with a column `sample`")
        column = samples["sample"]
    found = arguments.whole_numbers(name, column, expected=expected)
    if max(found) > np.iinfo(np.int64).max:
        raise BadSetting(name, column, expected)
    return np.unique(np.array(found, dtype=np.int64))


def _ids(run: Run, name: str, samples: Samples) -> Int[np.ndarray, " kept"]:
    """Samples of a part that the training has seen, each once.

    Raises:
        BadSetting: there are none.
        UnknownSample: a sample that the training set does not have.
    """
    found = numbers(samples, name=f"coresets[{name!r}]")
    places(run.ids, found.tolist())  # raises where the training set has no such sample
    seen = np.intersect1d(found, run.seen)
    if not len(seen):
        raise BadSetting(
            f"coresets[{name!r}]", found[:6].tolist(), "some samples that were in a recorded batch"
        )
    return seen


@final
class _WithAccuracy(Query):
    """Mean of a query's scores over its rows, and the share of rows classified correctly."""

    def __init__(self, scored: RowQuery) -> None:
        self.scored = scored
        self.unit = scored.unit
        self.mode = scored.mode
        columns = ("", " and accuracy")
        self.selection = replace(scored.selection, aggregate="mean", columns=columns)

    @property
    def names(self) -> tuple[str, ...]:
        """Score and accuracy."""
        return self.selection.names

    def parts(self, task: Task, like: Tensor, *, together: bool) -> Iterator[Part]:
        """Both means over blocks of rows."""
        return self.selection.parts(task, like, together=together, score=self.score)

    def prepare(self, task: Task, *, params: Tree, buffers: Tree) -> None:
        """Look whether rows depend on one another.

        Raises:
            CoupledRows: They do, and it is not known which of them belong together.
        """
        self.selection.prepare(task, params, buffers, score=self.scored.score)

    def score(self, task: Task, model: nn.Module, batch: Batch) -> Tensor:
        """Score of each row, and 1 where its class is predicted: `[slot, 2]`."""
        scores = self.scored.score(task, model, batch)
        predicted = class_scores(task.predict(model, batch), batch).argmax(1)
        correct = predicted == class_labels(batch)
        return torch.stack([scores, correct.to(scores)], 1)


def _with_accuracy(run: Run, queries: Query) -> _WithAccuracy | None:
    """The queries' mean and the accuracy on their rows; None where these have no classes."""
    if not isinstance(queries, RowQuery):
        return None
    selection = queries.selection
    if len(selection.columns) > 1 or not _has_classes(run, selection):
        return None
    return _WithAccuracy(queries)


def _has_classes(run: Run, selection: RowSelection) -> bool:
    """Whether the model gives class scores to the first selected row."""
    state = run.state(run.kept[-1])
    like = next(iter(state.params.values()))
    collate = selection.collate or run.task.collate
    row = selection.data[selection.rows[0]]
    read = mapping_to_dict(collate([row]))
    batch = cast(read, like.dtype, like.device)
    with in_eval_mode(run.task):
        outputs, _ = run.task.outputs(state.params, state.buffers, batch)
        return are_classes(outputs, batch)
