"""How exact are the scores? python -m bench.exactness.

For every case of the exactness test: the largest difference from brute force (one training for
every nudge of every slot's weight, in plain PyTorch), relative to the largest derivative, over all
queries and observed states.
"""

import tempfile
from pathlib import Path

import numpy as np

import backtrail
from tests.cases import CASES, Case, record, rows
from tests.oracles.nudge import nudge_every_weight
from tests.standard_queries import standard_losses, standard_queries


def error_of(case: Case) -> float:
    """Largest relative difference of one case."""
    folder = Path(tempfile.mkdtemp()) / "run"
    model, data = case.built(), rows()
    record(case, model, data, folder)
    run = backtrail.open_run(folder, case.task(model, data))
    found = backtrail.DIT().attribute(run, standard_queries()).values()
    truth = nudge_every_weight(case, standard_losses, [run.steps])
    return float((np.abs(found - truth).max(axis=(2, 3)) / np.abs(truth).max(axis=(2, 3))).max())


def main() -> None:
    """Print the table."""
    errors = {str(case): error_of(case) for case in CASES}
    for name, error in errors.items():
        print(f"{name:26} {error:.1e}", flush=True)
    print(f"{len(errors)} cases, largest {max(errors.values()):.1e}")


if __name__ == "__main__":
    main()
