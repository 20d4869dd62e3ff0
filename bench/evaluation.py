"""Three methods judged on the same re-runs, and the cost of that with and without a bank.

python -m bench.evaluation

The digits and network of bench.policies, GELU: 196 steps of AdamW. 200 samples left out one at a
time and 100 groups of 5 %, in float64; then the same again from the bank. Processor time, on as
many threads as torch has.
"""

import tempfile
import time
from pathlib import Path

import polars as pl
from torch import nn

import backtrail
from bench.policies import train


def main() -> None:
    """Print the table, and the cost of both calls."""
    run, test = train(nn.GELU, 0)
    query = backtrail.Loss(test, aggregate="mean")
    methods = {
        "DIT": backtrail.DIT(),
        "TracIn": backtrail.TracIn(),
        "gradient-dot": backtrail.GradientDot(),
    }
    found = {name: method.attribute(run, query) for name, method in methods.items()}
    bank = Path(tempfile.mkdtemp())
    for kind in ("training again", "from the bank"):
        begun = time.process_time()
        table = backtrail.evaluate(run, found, removals=200, groups=100, bank=bank)
        print(f"{kind}: {time.process_time() - begun:.1f} s")
    print(f"bank: {sum(path.stat().st_size for path in bank.iterdir()) / 2**20:.0f} MiB")
    with pl.Config(tbl_rows=-1, float_precision=2):
        print(table)


if __name__ == "__main__":
    main()
