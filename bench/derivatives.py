"""The check of the derivatives on every training of the table: python -m bench.derivatives.

Each is recorded for some epochs, in float32, under bfloat16 autocast, and in float64. The check
must refuse none of them. Its time is given in plain steps of the same training.
"""

import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import backtrail
from backtrail.methods.derivative_check import check_derivatives
from bench.cases import CASES, Case

EPOCHS = 2
PRECISIONS = ("float32", "autocast", "float64")


def checked(case: Case, precision: str, folder: Path) -> tuple[str, float]:
    """What the check found, and its time in plain steps."""
    train, _, _ = case.load()
    model, optimizer = case.begin()
    if precision == "float64":
        model = model.double()
        optimizer = case.optimizer(model.parameters())
        tensors = [t.double() if t.is_floating_point() else t for t in train.tensors]
        train = torch.utils.data.TensorDataset(*tensors)
    loader = case.loader(train)
    task = case.task(model, train)
    steps = 0
    with backtrail.Recorder(folder, task, optimizer) as recorder:
        for _ in range(case.epochs):
            for inputs, targets in recorder.watch(loader):
                low = torch.autocast("cpu", torch.bfloat16)
                with low if precision == "autocast" else nullcontext():
                    loss = cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
    plain_model, plain_optimizer = case.begin()
    begun = time.process_time()
    case.train(plain_model, plain_optimizer, lambda: case.loader(case.load()[0]))
    one_step = (time.process_time() - begun) / steps
    run = backtrail.open_run(folder, task)
    begun = time.process_time()
    try:
        found = check_derivatives(run, backtrail.Hessian())
    except backtrail.BacktrailError as error:
        found = f"REFUSED: {type(error).__name__}: {error}"
    return found, (time.process_time() - begun) / one_step


def main() -> None:
    """Print a line for every training and precision."""
    wanted = sys.argv[1:]
    for case in CASES:
        if wanted and case.name not in wanted:
            continue
        short = replace(case, epochs=min(case.epochs, EPOCHS))
        for precision in PRECISIONS:
            with tempfile.TemporaryDirectory() as folder:
                found, cost = checked(short, precision, Path(folder) / "run")
            print(f"{case.name:28} {precision:9} {cost:7.1f} plain steps   {found}", flush=True)


if __name__ == "__main__":
    main()
