"""Queries that read an average of the weights instead of the weights themselves."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from backtrail import arguments
from backtrail.errors import BadSetting
from backtrail.queries.query import Mode, Part, Query
from backtrail.task.task import Task
from backtrail.tree import Tree


@final
@dataclass(frozen=True, repr=False)
class Averaged(Query):
    r"""Reads queries at the average of the weights over the training, as of the observed state.

    With `decay` d and `start` s the average is exponential (EMA), as
    `torch.optim.swa_utils.get_ema_multi_avg_fn` and timm keep it during a training:

    .. math:: \bar\theta_s = \theta_s \qquad \bar\theta_t = d\,\bar\theta_{t-1} + (1 - d)\,\theta_t

    or, with `decay=None`, the plain mean of :math:`\theta_s \dots \theta_t` (SWA).

    >>> from backtrail.queries.rows import Loss
    >>> query = Averaged(Loss([(0.0, 0.0)] * 5, samples=[3]), decay=0.99)
    >>> query
    Averaged(Loss(1 sample: 3; aggregate=None), decay=0.99, start=0, every=1, use_buffers=False)
    >>> query.names
    ('loss[3] (EMA 0.99)',)

    Args:
        queries: The queries to read at the average.
        decay: d, at least 0 and below 1; None for the plain mean.
        start: s, the state that the average starts from: 0 for timm; 1 for
            `AveragedModel.update_parameters` after every step, whose first call copies. At an
            earlier state the average is that state.
        every: From s on, every this many states one enters the average.
        use_buffers: Whether floating buffers (BatchNorm's statistics) are averaged too, as timm
            does. By default they are those of the observed state, as for `AveragedModel`.

    Raises:
        BadSetting: A setting has a value that it cannot take.
    """

    queries: Query
    decay: float | None = 0.999
    start: int = field(default=0, kw_only=True)
    every: int = field(default=1, kw_only=True)
    use_buffers: bool = field(default=False, kw_only=True)
    unit: str = field(init=False)
    mode: Mode = field(init=False)

    def __post_init__(self) -> None:
        """Take unit and mode from the queries; check the settings.

        Raises:
            BadSetting: names the setting, and what it may be.
        """
        if not isinstance(self.queries, Query) or isinstance(self.queries, Averaged):
            raise BadSetting(
                "queries", self.queries, "queries of the weights, like backtrail.Loss(...)"
            )
        checked: dict[str, object] = {
            "start": arguments.whole("start", self.start, least=0),
            "every": arguments.whole("every", self.every, least=1),
            "use_buffers": arguments.flag("use_buffers", self.use_buffers),
            "unit": self.queries.unit,
            "mode": self.queries.mode,
        }
        if self.decay is not None:
            expected = "0 <= decay < 1, or None for the plain mean"
            checked["decay"] = arguments.real("decay", self.decay, expected, lambda d: 0 <= d < 1)
        # The dataclass is frozen.
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def names(self) -> tuple[str, ...]:
        """The queries' names with the kind of average, like `loss[3] (EMA 0.99)`."""
        kind = "SWA" if self.decay is None else f"EMA {self.decay:g}"
        return tuple(f"{name} ({kind})" for name in self.queries.names)

    @property
    def about(self) -> str:
        """The average in words, without the queries; results on disk are compared by it."""
        return (
            f"decay={self.decay}, start={self.start}, every={self.every}, "
            f"use_buffers={self.use_buffers}"
        )

    def prepare(self, task: Task, *, params: Tree, buffers: Tree) -> None:
        """Prepare the queries themselves."""
        self.queries.prepare(task, params=params, buffers=buffers)

    def parts(self, task: Task, like: Tensor, *, together: bool) -> Iterator[Part]:
        """The queries' own parts; the caller puts the average in place of the weights."""
        return self.queries.parts(task, like, together=together)

    def share(self, state: int, observed: int) -> float:
        r"""Weight of the state t in the average at the observed state τ.

        .. math:: \partial\bar\theta_\tau / \partial\theta_t

        >>> from backtrail.queries.rows import Loss
        >>> average = Averaged(Loss([(0.0, 0.0)]), decay=0.5, start=1)
        >>> [average.share(t, 3) for t in range(5)]
        [0.0, 0.25, 0.25, 0.5, 0.0]
        """
        if observed < self.start:
            return float(state == observed)
        # The states that enter are start, start + every, ...: numbered 0 to `last`.
        number, late = divmod(state - self.start, self.every)
        last = (observed - self.start) // self.every
        if late or not 0 <= number <= last:
            return 0.0
        if self.decay is None:
            return 1 / (last + 1)
        # The first state that enters is copied; each later one enters with weight 1 - d.
        entered = 1.0 if number == 0 else 1 - self.decay
        return float(self.decay ** (last - number) * entered)

    def __repr__(self) -> str:
        """Queries and average in one line."""
        return f"Averaged({self.queries!r}, {self.about})"
