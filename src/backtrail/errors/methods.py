"""Errors of attribution methods, and of retraining."""

from collections.abc import Sequence
from pathlib import Path

from backtrail.errors.sentences import (
    BacktrailError,
    count_of,
    did_you_mean,
    join_items,
    quoted_in,
    shown,
)


class BadSetting(BacktrailError, ValueError):
    """An option has a value that it cannot take."""

    def __init__(self, name: str, value: object, expected: str) -> None:
        near = did_you_mean(value, quoted_in(expected))
        self.args = (f"Invalid {name}={shown(value)}: expected {expected}.{near}",)


class UnusedOption(BacktrailError, TypeError):
    """An option was given that the chosen method does not use."""

    def __init__(self, name: str, value: object, *, call: str, takes: Sequence[str]) -> None:
        options = f"it takes {join_items(takes)}" if takes else "it takes no further options"
        self.args = (
            f"Invalid {name}={shown(value)}: {call} does not use it; {options}. Leave {name}= out.",
        )


class WrongDerivative(BacktrailError, RuntimeError):
    """The derivative of a training step is wrong, by its own check."""

    def __init__(
        self, step: int, what: str, off: float, layers: Sequence[str] = (), *, instead: str = ""
    ) -> None:
        where = f", in the derivative by {join_items(layers, most=6)}" if layers else ""
        if instead:
            causes = (
                f"torch has no second derivative of an operation ({instead}), and differences of "
                "gradients in its place need a gradient that is the derivative of its loss: this "
                "model also stops gradients (detach, no_grad), or has a backward pass of its own"
            )
        else:
            causes = (
                "a value that leaves torch on its way (.item(), NumPy); a custom "
                "autograd.Function, in particular one that is called by a name given to its apply "
                "(f = F.apply), which hides it: call F.apply(x) where it is used; state of the "
                "model that is not in its buffers; an operation of torch whose second derivative "
                "is wrong"
            )
        self.args = (
            f"The derivative of step {step} is wrong: {what} changes by something else (relative "
            f"difference {off:.2g}) when parameters and sample weights are moved a little{where}. "
            f"Usual causes: {causes}. DIT would be wrong by as much; backtrail.TracIn and "
            "backtrail.leave_one_out need no second derivative.",
        )


class NoSecondDerivative(BacktrailError, RuntimeError):
    """Neither torch nor differences give the second derivative of a training."""

    def __init__(self, missing: str, buffers: Sequence[str]) -> None:
        self.args = (
            f"torch has no second derivative of an operation of this training ({missing}), and "
            "differences of gradients cannot take its place, since the forward pass changes "
            f"{join_items(buffers, most=6)}. Write the operation with others that torch "
            "differentiates twice, or use backtrail.TracIn or backtrail.leave_one_out, which need "
            "no second derivative.",
        )


class LateSecondDerivative(BacktrailError, RuntimeError):
    """torch lacks the second derivative of an operation that the checked steps do not reach."""

    def __init__(self, step: int, missing: str) -> None:
        self.args = (
            f"Step {step}: torch has no second derivative of an operation ({missing}), which the "
            "steps that were checked do not use. Take products by differences of gradients in all "
            "steps: backtrail.DIT(curvature=backtrail.Hessian(product='difference')); or use "
            "backtrail.TracIn, which needs no second derivative. With out=, give another folder.",
        )


class CannotRenormalize(BacktrailError, ValueError):
    """The denominator of a batch's mean cannot be renormalised in a run."""

    def __init__(self, why: str) -> None:
        self.args = (
            f"denominator='renormalize' is not possible for this run: {why}. Use "
            "denominator='keep'.",
        )


class TooLittleMemory(BacktrailError, RuntimeError):
    """A sweep does not fit into memory."""

    def __init__(self, free: int, needed: int, rows: int) -> None:
        self.args = (
            f"A sweep with {count_of(rows, 'cotangent')} (queries x observed states) needs "
            f"{needed / 2**20:.0f} MiB, and may use {free / 2**20:.0f} MiB. Use fewer queries or "
            "observed states at once, or allow more with memory=bytes.",
        )


class NoOutputs(BacktrailError, TypeError):
    """Gauss-Newton curvature needs the model's outputs."""

    def __init__(self, kind: str) -> None:
        self.args = (
            "GaussNewton differentiates the loss by the model's outputs, but the "
            f"{kind} that predict returned holds no floating-point tensor. Let predict return "
            "tensors (nested in tuples, lists or dicts), or use curvature=backtrail.Hessian().",
        )


class WithoutQueries(BacktrailError, ValueError):
    """An influence is to be checked, and its queries are not known."""

    def __init__(self, names: Sequence[str]) -> None:
        if names:
            which = f"the ones that it was computed for: {join_items(names, most=6)}"
        else:
            which = "for example a backtrail.Loss"
        self.args = (
            "This check reads the queries again, and an influence opened from disk does not "
            f"contain them. Give queries=, {which}.",
        )


class CoupledLoss(BacktrailError, ValueError):
    """The loss of one sample depends on other samples of its batch."""

    def __init__(self) -> None:
        self.args = (
            "The loss of one sample depends on the outputs of others (a contrastive loss, or an "
            "average over the batch?), and embeddings need a gradient for each sample alone. Use "
            "backtrail.DIT(), which does not, or give the task a loss of every row by itself.",
        )


class CoupledRows(BacktrailError, ValueError):
    """Rows are read one by one, or in groups of no meaning, and depend on one another."""

    def __init__(self, what: str, instead: str) -> None:
        self.args = (
            f"{what} of a row depends on the other rows of its forward pass (a contrastive loss, "
            f"or an average over the batch?). {instead}.",
        )


class RowsNotReadable(BacktrailError, ValueError):
    """A method reads rows by number, and the run's samples are ids."""

    def __init__(self, method: str, instead: str = "Use backtrail.DIT or backtrail.TracIn") -> None:
        self.args = (
            f"{method} reads rows of the training set by number, and the samples of this run are "
            f"ids. {instead}, or record a run of a data set with row numbers.",
        )


class NoCheckpoints(BacktrailError, ValueError):
    """There are no checkpoints that can be used."""

    def __init__(self, problem: str) -> None:
        self.args = (
            f"No usable checkpoints: {problem}. Give (step, state_dict, lr) for each, or a folder "
            "of files like step500.pt with lr=.",
        )


class BadCheckpoint(BacktrailError, ValueError):
    """A checkpoint does not belong to this training."""

    def __init__(self, place: str, problem: str) -> None:
        self.args = (f"{place} is not a checkpoint of this training: {problem}.",)


class StrayedRerun(BacktrailError, RuntimeError):
    """The unperturbed re-run is another training than the recorded one."""

    def __init__(self, step: int, state: int, *, off: float, tolerance: float, dtype: str) -> None:
        self.args = (
            f"Run again in {dtype}, step {step} has another gradient than in the training "
            f"(relative difference {off:.2g}, tolerance {tolerance:.2g}), and the kept state "
            f"{state} is another one. Usual causes: random numbers that a model draws in one "
            "precision whatever its own, or not from torch's default generators. Re-run in the "
            "training's precision (dtype=None); run.verify() says whether that reproduces it.",
        )


class DamagedBank(BacktrailError, RuntimeError):
    """A file in the folder of stored re-runs cannot be read."""

    def __init__(self, path: Path, why: str) -> None:
        self.args = (
            f"{path} is not a file of stored re-runs ({why}). Give bank= a folder of its own; if "
            "this is it, delete the file, and its re-runs are computed again.",
        )
