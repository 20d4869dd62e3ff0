"""Queries that read an average of the weights instead of the weights themselves."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from backtrail.errors import BadSetting
from backtrail.queries.query import Mode, Part, Query
from backtrail.task.task import Task


@final
@dataclass(frozen=True)
class Averaged(Query):
    r"""Asks queries of the average of the weights over the training, as it stands at the observed state.

    Exponential (EMA), as `torch.optim.swa_utils.get_ema_multi_avg_fn` and timm keep it beside a
    training:

    .. math:: \bar\theta_s = \theta_s \qquad \bar\theta_t = d\,\bar\theta_{t-1} + (1 - d)\,\theta_t

    or, with `decay=None`, the plain mean of :math:`\theta_s \dots \theta_t` (SWA).

    Args:
        queries: what is asked.
        decay: d; None for the plain mean.
        start: s, the state that the average starts from: 0 for timm; 1 for
            `AveragedModel.update_parameters` after every step, whose first call copies. Before it
            the average is the state itself.
        every: from s on, every so many-th state enters; the others leave the average as it is.
        use_buffers: whether floating buffers (BatchNorm's statistics) are averaged too, as timm
            does; otherwise they are those of the observed state, as `AveragedModel` has them by
            default.

    >>> from backtrail.queries.rows import Loss
    >>> Averaged(Loss([(0.0, 0.0)] * 5, samples=[3]), decay=0.99).names
    ('loss[3] (EMA 0.99)',)
    """

    queries: Query
    decay: float | None = 0.999
    start: int = field(default=0, kw_only=True)
    every: int = field(default=1, kw_only=True)
    use_buffers: bool = field(default=False, kw_only=True)
    unit: str = field(init=False, repr=False)
    mode: Mode = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Take unit and mode from the queries; refuse what is no average.

        Raises:
            BadSetting: names the setting, and what it may be.
        """
        if not isinstance(self.queries, Query) or isinstance(self.queries, Averaged):
            raise BadSetting(
                "queries", self.queries, "queries of the weights, like backtrail.Loss(...)"
            )
        if self.decay is not None and not 0 <= self.decay < 1:
            raise BadSetting(
                "decay", self.decay, "a number from 0 to below 1, or None for the plain mean"
            )
        for name, number, least in (("start", self.start, 0), ("every", self.every, 1)):
            if number < least:
                raise BadSetting(name, number, f"a whole number, at least {least}")
        object.__setattr__(self, "unit", self.queries.unit)
        object.__setattr__(self, "mode", self.queries.mode)

    @property
    def names(self) -> tuple[str, ...]:
        """The queries' names, and what is averaged."""
        kind = "SWA" if self.decay is None else f"EMA {self.decay:g}"
        return tuple(f"{name} ({kind})" for name in self.queries.names)

    @property
    def about(self) -> str:
        """The average in words, without the queries."""
        return f"decay={self.decay}, start={self.start}, every={self.every}, use_buffers={self.use_buffers}"

    def parts(self, task: Task, like: Tensor, *, together: bool) -> Iterator[Part]:
        """The queries' parts."""
        return self.queries.parts(task, like, together=together)

    def share(self, state: int, observed: int) -> float:
        r"""How much of a state is in the average at another: :math:`\partial\bar\theta_\tau / \partial\theta_t`.

        >>> from backtrail.queries.rows import Loss
        >>> average = Averaged(Loss([(0.0, 0.0)]), decay=0.5, start=1)
        >>> [average.share(t, 3) for t in range(5)]
        [0.0, 0.25, 0.25, 0.5, 0.0]
        """
        if observed < self.start:
            return float(state == observed)
        place, late = divmod(state - self.start, self.every)
        last = (observed - self.start) // self.every
        if late or not 0 <= place <= last:
            return 0.0
        if self.decay is None:
            return 1 / (last + 1)
        fresh: float = self.decay ** (last - place) * (1.0 if place == 0 else 1 - self.decay)
        return fresh
