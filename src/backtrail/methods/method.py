"""What all methods of attribution have in common."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from backtrail.influence.influence import Influence
from backtrail.methods.observe import ObservedAt
from backtrail.queries import Query
from backtrail.run.run import Run


@runtime_checkable
class Method(Protocol):
    r"""A method of attribution: settings in its constructor, and one function `attribute`.

    `DIT`, `PathIntegrated`, `TracIn`, `GradientDot`, `DataValueEmbedding` and `DiffIn` are methods,
    and so is any object of yours with this function. All of them fill the same array

    .. math:: I[q, \tau, t, b] \approx -\,\partial q(\theta_\tau) / \partial w_{t,b}

    over the axes `[query, observed_at, step, slot]`, with w the weight of the loss of the sample in
    slot b of step t. They differ in what they leave out, which their own documentation says.

    >>> import backtrail
    >>> isinstance(backtrail.DIT(), backtrail.Method)
    True

    `isinstance` looks for the name of the function only, as for every protocol.
    """

    def attribute(
        self,
        run: Run,
        queries: Query,
        *,
        observed_at: ObservedAt = ...,
        out: str | Path | None = ...,
    ) -> Influence:
        """Compute the influence of every visit of every sample on the queries.

        Sign: what the query gains when the sample is removed; for a loss, positive is helpful,
        negative harmful. Unit: the queries' own.

        Args:
            run: The recorded training.
            queries: The scalar functions of the model.
            observed_at: The states at which the queries are read: "end", "epochs", a number, or
                several.
            out: Folder of the result; None keeps it in memory.
        """
        ...
