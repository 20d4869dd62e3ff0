"""How well rules of a sweep predict removals, measured one query and one removal at a time."""

import numpy as np

import backtrail
from backtrail import stats
from backtrail.methods.dit.auto import SEED
from backtrail.queries import Query
from backtrail.run.run import Run
from backtrail.sweep.rules import Rules


def agreement_with_removals(run: Run, rules: list[Rules], query: Query) -> list[float]:
    """Every candidate against the same removals, one query and one removal at a time; groups have one sample here."""
    draw, count = np.random.default_rng(SEED), len(query.names)
    visited = sorted({sample for step in run.log for sample in step.samples})
    ones = draw.choice(visited, min(30, len(visited)), replace=False).tolist()
    groups = [int(draw.choice(visited, 1, replace=False)[0]) for _ in range(32)]
    single = backtrail.leave_one_out(run, query, samples=ones)
    many = np.stack(
        [backtrail.leave_one_out(run, query, samples=[one])[:, 0] for one in groups], axis=1
    )
    figures = []
    for rule in rules:
        influence = backtrail.DIT(curvature=rule.curvature, slope=rule.slope).attribute(run, query)
        total = {
            sample: influence.total()[:, 0, place]
            for place, sample in enumerate(influence.ids.tolist())
        }
        alone, together = (
            np.stack([total[one] for one in some], axis=1) for some in (ones, groups)
        )
        row = [stats.pearson(alone[q], single[q]) for q in range(count)]
        row += [stats.spearman(together[q], many[q]) for q in range(count)]
        figures.append(float(np.mean(row)))
    return figures
