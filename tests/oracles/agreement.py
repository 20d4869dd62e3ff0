"""How well the rules of a sweep predict removals, with one re-run for every sample left out."""

import numpy as np

import backtrail
from backtrail import stats
from backtrail.methods.dit.auto import SEED
from backtrail.queries import Query
from backtrail.run.run import Run
from backtrail.sweep.rules import Rules


def agreement_with_removals(run: Run, rules: list[Rules], query: Query) -> list[float]:
    """Return the agreement of every candidate of `curvature="auto"` with the same removals.

    It is the mean, over all queries, of the Pearson correlation with single samples left out and
    of the Spearman correlation with groups left out. A group has 5 % of the samples seen: of the
    small trainings that this is for, one sample.
    """
    # The draws must be those of the library, so they come in the same order from the same seed.
    draw = np.random.default_rng(SEED)
    seen = sorted({sample for step in run.log for sample in step.samples})
    singles = draw.choice(seen, min(30, len(seen)), replace=False).tolist()
    groups = []
    for _ in range(32):
        groups.append(int(draw.choice(seen, 1, replace=False)[0]))
    single_changes = left_out(run, query, singles)
    group_changes = left_out(run, query, groups)

    figures = []
    for candidate in rules:
        method = backtrail.DIT(curvature=candidate.curvature, slope=candidate.slope)
        influence = method.attribute(run, query)
        column = {sample: place for place, sample in enumerate(influence.ids.tolist())}
        total = influence.total()[:, 0]
        single_predictions = np.stack([total[:, column[sample]] for sample in singles], axis=1)
        group_predictions = np.stack([total[:, column[sample]] for sample in groups], axis=1)
        correlations = []
        for q in range(len(query.names)):
            pearson = stats.pearson(single_predictions[q], single_changes[q])
            spearman = stats.spearman(group_predictions[q], group_changes[q])
            correlations += [pearson, spearman]
        figures.append(float(np.mean(correlations)))
    return figures


def left_out(run: Run, query: Query, samples: list[int]) -> np.ndarray:
    """Return the change of the queries by leaving out each of the samples, `[query, removal]`."""
    changes = []
    for sample in samples:
        changes.append(backtrail.leave_one_out(run, query, samples=[sample])[:, 0])
    return np.stack(changes, axis=1)
