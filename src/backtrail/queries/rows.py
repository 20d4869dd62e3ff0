"""Queries that are read off rows of a data set: losses, logits, margins, hidden units, saliencies."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, Unpack, final

import torch
from torch import Tensor, nn
from torch.func import grad

from backtrail.errors import BadQuery
from backtrail.queries.query import Mode, Part, Query
from backtrail.task.task import Batch, Rows, Task, labels_of, logits_of
from backtrail.tree import cast, plain

Aggregate = Literal["mean", "sum"] | None
Score = Callable[[Task, nn.Module, Batch], Tensor]


class RowOptions(TypedDict, total=False):
    """Options of every query that is read off rows of a data set.

    Attributes:
        aggregate: "mean" or "sum" over the rows gives one query; None gives one query per row.
        mode: train or eval mode of the model while it is asked.
        collate: makes a batch of rows; default: the task's.
        batch: how many rows go through the model at once.
    """

    aggregate: Aggregate
    mode: Mode
    collate: Callable[[list[Any]], Batch] | None
    batch: int


@final
@dataclass(frozen=True)
class RowQuery(Query):
    """Scores of rows of a data set: `score(task, model, batch) -> [slot]` or `[slot, column]`."""

    kind: str
    unit: str
    score: Score
    data: Any
    samples: Sequence[int] | None = None
    columns: tuple[str, ...] = field(default=("",), kw_only=True)
    aggregate: Aggregate = field(default=None, kw_only=True)
    mode: Mode = field(default="eval", kw_only=True)
    collate: Callable[[list[Any]], Batch] | None = field(default=None, kw_only=True)
    batch: int = field(default=256, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse rows that are not there, before any work is done.

        Raises:
            BadQuery: names them.
        """
        missing = [row for row in self.rows if not 0 <= row < len(self.data)]
        if missing or not self.rows:
            raise BadQuery(
                f"samples={missing}" if missing else "no samples",
                f"the data set has {len(self.data)} rows",
            )

    @property
    def rows(self) -> tuple[int, ...]:
        """Row numbers that are asked about."""
        return (
            tuple(range(len(self.data)))
            if self.samples is None
            else tuple(int(row) for row in self.samples)
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Like `loss[17]`, or `mean loss of 200`."""
        if self.aggregate:
            return tuple(
                f"{self.aggregate} {self.kind}{column} of {len(self.rows)}"
                for column in self.columns
            )
        return tuple(f"{self.kind}{column}[{row}]" for row in self.rows for column in self.columns)

    def parts(self, task: Task, like: Tensor, *, together: bool) -> Iterator[Part]:
        """Blocks of rows; one row at a time where every row is a query that is differentiated on its own."""
        alone = not (together or self.aggregate or self.mode == "train")
        size, at_once = (1, self.batch) if alone else (self.batch, 1)
        every, wide = self.rows, len(self.columns)

        def numbers(model: nn.Module, batch: Batch) -> Tensor:
            return self.score(task, model, cast(batch, like.dtype, like.device)).flatten()

        for first in range(0, len(every), size):
            rows = every[first : first + size]
            batch = plain((self.collate or task.collate)([self.data[row] for row in rows]))
            eye = torch.eye(len(rows) * wide, dtype=torch.float64)
            if self.aggregate:
                mean = eye.view(len(rows), wide, -1).sum(0) / (
                    len(every) if self.aggregate == "mean" else 1
                )
                yield Part(tuple(range(wide)), mean, numbers, batch)
            else:
                queries = range(first * wide, (first + len(rows)) * wide)
                yield Part(tuple(queries), eye, numbers, batch, at_once)


def Loss(
    data: Rows,
    samples: Sequence[int] | None = None,
    *,
    unit: str = "loss",
    **options: Unpack[RowOptions],
) -> RowQuery:
    """The task's own loss on rows of a data set (any, not only the training set).

    >>> Loss([(0.0, 0.0)] * 5, samples=[3, 4]).names
    ('loss[3]', 'loss[4]')
    >>> Loss([(0.0, 0.0)] * 5, aggregate="mean").names
    ('mean loss of 5',)
    """

    def score(task: Task, model: nn.Module, batch: Batch) -> Tensor:
        return task.loss(task.predict(model, batch), batch)

    return RowQuery("loss", unit, score, data, samples, **options)


def Logit(
    data: Rows,
    samples: Sequence[int] | None = None,
    *,
    target: int | None = None,
    **options: Unpack[RowOptions],
) -> RowQuery:
    """The output for one class: the row's own label, or `target`.

    >>> Logit([(0.0, 1)] * 2, target=7).names
    ('logit 7[0]', 'logit 7[1]')
    """

    def score(task: Task, model: nn.Module, batch: Batch) -> Tensor:
        outputs = logits_of(task.predict(model, batch))
        wanted = (
            labels_of(batch)
            if target is None
            else torch.full((len(outputs),), target, device=outputs.device)
        )
        return outputs.gather(1, wanted[:, None])[:, 0]

    return RowQuery(
        "logit" if target is None else f"logit {target}", "logit", score, data, samples, **options
    )


def Margin(
    data: Rows, samples: Sequence[int] | None = None, **options: Unpack[RowOptions]
) -> RowQuery:
    r"""Log-odds of the row's label, :math:`\log p_y / (1 - p_y)`: its logit minus the log-sum-exp of the others.

    This is the model output of TRAK (Park et al., 2023).

    >>> Margin([(0.0, 1)] * 2).names
    ('margin[0]', 'margin[1]')
    """

    def score(task: Task, model: nn.Module, batch: Batch) -> Tensor:
        outputs, labels = logits_of(task.predict(model, batch)), labels_of(batch)[:, None]
        others = outputs.scatter(1, labels, -torch.inf).logsumexp(1)
        return outputs.gather(1, labels)[:, 0] - others

    return RowQuery("margin", "logit", score, data, samples, **options)


def Feature(
    data: Rows,
    samples: Sequence[int] | None = None,
    *,
    layer: str,
    unit: int,
    **options: Unpack[RowOptions],
) -> RowQuery:
    """One hidden unit: entry `unit` of the last axis of a module's output, averaged over the axes between.

    For convolutional outputs `[slot, channel, ...]` ask about a module that puts channels last, or
    use `Custom`.

    >>> Feature([(0.0, 1)], layer="encoder.0", unit=5).names
    ('encoder.0[5][0]',)
    """

    def score(task: Task, model: nn.Module, batch: Batch) -> Tensor:
        seen: list[Tensor] = []
        handle = _submodule(model, layer).register_forward_hook(
            lambda _module, _inputs, output: seen.append(output)
        )
        try:
            task.predict(model, batch)
        finally:
            handle.remove()
        return seen[-1][..., unit].flatten(1).mean(1) if seen[-1].dim() > 2 else seen[-1][:, unit]

    return RowQuery(f"{layer}[{unit}]", "activation", score, data, samples, **options)


def Saliency(
    data: Rows,
    samples: Sequence[int] | None = None,
    *,
    inputs: Sequence[int],
    **options: Unpack[RowOptions],
) -> RowQuery:
    """How the label's logit leans on chosen input features: its derivative with respect to entries of `batch[0]`.

    Gives one query per row and feature; `inputs` counts the entries of a flattened row.

    >>> Saliency([(0.0, 1)], inputs=[0, 9]).names
    ('saliency 0[0]', 'saliency 9[0]')
    """

    def score(task: Task, model: nn.Module, batch: Batch) -> Tensor:
        def logit(x: Tensor) -> Tensor:
            fed = (x, *batch[1:])
            return logits_of(task.predict(model, fed)).gather(1, labels_of(batch)[:, None]).sum()

        slopes: Tensor = grad(logit)(batch[0])
        return slopes.flatten(1)[:, list(inputs)]

    columns = tuple(f" {entry}" for entry in inputs)
    return RowQuery("saliency", "logit per input", score, data, samples, columns=columns, **options)


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = [name for name, _ in model.named_modules() if name]
        raise BadQuery(f"layer {name!r}", f"the model has {known}") from None
