r"""The estimates of several re-runs joined: their mean at every slot, the error of every total.

With :math:`I^{(k)}` the influence that a sweep through re-run k gives, relative to the weights
:math:`w^{(k)}` of that re-run, and :math:`D_j` the :math:`n_j` re-runs in which the weight of
sample j was drawn from [f, 1],

.. math::
    I[q, \tau, t, b] = \frac{\ln(1/f)}{n_j} \sum_{k \in D_j} I^{(k)}[q, \tau, t, b],
    \qquad j = S_t[b]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float64, Int64

from backtrail.influence.influence import Influence
from backtrail.influence.writer import InfluenceWriter
from backtrail.methods.path_integrated.draws import Draws


@final
@dataclass(frozen=True, slots=True)
class Estimates:
    """The influences of all re-runs, and how they are joined.

    Attributes:
        parts: the influence of each re-run.
        draws: the weights of the samples.
        scale: ln(1/f), the length of the path in ln(w).
    """

    parts: Sequence[Influence]
    draws: Draws
    scale: float

    def write(self, writer: InfluenceWriter, places: Int64[np.ndarray, "step slot"]) -> None:
        """Write the standard errors, and the shards that are missing, the last one first.

        Args:
            writer: of the result.
            places: of the sample in every slot; -1 is padding.
        """
        writer.write_standard_errors(self.standard_errors())
        for shard in sorted({*range(len(writer.shards))} - writer.done, reverse=True):
            first, stop = writer.shards[shard]
            block = self.mean(first, stop, places[first:stop])
            # The losses of the recorded training were those of none of the re-runs.
            unknown = np.full(block.shape[2:], np.nan)
            writer.write(first, block, unknown)
            writer.mark_done(shard)

    def mean(
        self, first: int, stop: int, places: Int64[np.ndarray, "step slot"]
    ) -> Float64[np.ndarray, "query observed_at step slot"]:
        """The influence of the steps first ... stop - 1.

        Args:
            first: the first step.
            stop: the step after the last.
            places: of the sample in every slot of these steps; -1 is padding, whose influence is 0.
        """
        # The last column is that of the padding.
        nothing = np.zeros((len(self.parts), 1))
        share_of_draw = self.scale * self.draws.drawn / self.draws.counts
        factors = np.concatenate([share_of_draw, nothing], axis=1)
        about = self.parts[0].description
        queries, states, _, slots = about.shape
        block = np.zeros((queries, states, stop - first, slots))
        for part, factor in zip(self.parts, factors, strict=True):
            block += factor[places] * part.values(first, stop)
        return block

    def standard_errors(self) -> Float64[np.ndarray, "query observed_at sample"]:
        """Standard error of every total; NaN for a sample that was drawn once."""
        counts = self.draws.counts
        # Two passes: a difference of sums of squares would be rounding where all draws agree.
        mean: np.ndarray = np.zeros(())
        for part, drawn in zip(self.parts, self.draws.drawn, strict=True):
            mean = mean + drawn * self.scale * part.total() / counts
        squares = np.zeros(mean.shape)
        for part, drawn in zip(self.parts, self.draws.drawn, strict=True):
            squares += drawn * np.square(self.scale * part.total() - mean)
        others = np.where(counts > 1, counts - 1.0, np.nan)
        errors: np.ndarray = np.sqrt(squares / others / counts)
        return errors
