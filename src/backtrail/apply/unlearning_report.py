"""Evaluate unlearning: how close the model is to one trained without the samples."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final, get_args

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from backtrail import arguments
from backtrail.errors import BacktrailError, BadSetting
from backtrail.exclusive import exclusive
from backtrail.methods.diff_in.checkpoints import matched, tensors_of
from backtrail.methods.observe import check_run
from backtrail.methods.retrain.removal import RemovedGroup
from backtrail.methods.retrain.retrain import Denominator
from backtrail.run.run import Run
from backtrail.stats import auc
from backtrail.step.state import State
from backtrail.task.task import Batch, Rows, Task, in_eval_mode, labels_of, logits_of
from backtrail.tree import Tree, cast, mapping_to_dict, norm

log = logging.getLogger(__name__)

ROWS = 256  # that go through the model at once
Pair = tuple[float, float]
Triple = tuple[float, float, float]


@final
@dataclass(frozen=True, slots=True)
class Forgotten:
    """What :func:`backtrail.judge_forgetting` measured, on three models.

    They are the trained model, the model that was to forget, and the model retrained without the
    samples, which is the ideal. Pairs and triples below are in this order.

    >>> found = Forgotten(2, 0.1, 0.2, (1e-3, 2e-4), agreement=None, membership=(0.9, 0.6, 0.5))
    >>> print(str(found).splitlines()[-1])
    membership   AUC 0.600; trained 0.900, retrained 0.500 (0.5 = like test rows)

    Attributes:
        samples: Number of samples that were to be forgotten.
        parameters: Distance of the forgetting model to the retrained one, divided by that of the
            trained one: 0 is perfect, 1 no better than doing nothing.
        predictions: The same ratio of divergences of the predictions on the test rows.
        divergence: Divergence from the retrained model's predictions, of the trained and of the
            forgetting model: mean Kullback-Leibler divergence of class probabilities in nats, or
            mean squared difference where the outputs are not classes.
        agreement: Share of test rows (or tokens) with the retrained model's class, of the trained
            and of the forgetting model; None where the outputs are not classes.
        membership: Area under the ROC curve for telling the samples from test rows by their lower
            loss, on all three models. The second should be like the third. None where the rows
            cannot be read again.
    """

    samples: int
    parameters: float
    predictions: float
    divergence: Pair
    agreement: Pair | None
    membership: Triple | None

    def __str__(self) -> str:
        """A line per measure, the model that was to forget first."""
        lines = [
            f"Forgetting {self.samples} samples, compared with retraining without them "
            "(0 = equal to it, 1 = as far from it as without forgetting)",
            f"parameters   {self.parameters:.3f}",
        ]
        before, after = self.divergence
        predictions = (
            f"predictions  {self.predictions:.3f}: KL divergence {after:.2e} "
            f"({before:.2e} without forgetting)"
        )
        if self.agreement is not None:
            before, after = self.agreement
            predictions += f"; same class on {after:.1%} ({before:.1%} without forgetting)"
        lines.append(predictions)
        if self.membership is not None:
            trained, forgotten, retrained = self.membership
            figures = f"AUC {forgotten:.3f}; trained {trained:.3f}, retrained {retrained:.3f}"
            lines.append(f"membership   {figures} (0.5 = like test rows)")
        return "\n".join(lines)


@exclusive
def judge_forgetting(
    run: Run,
    samples: Sequence[int],
    state: Mapping[str, Tensor],
    *,
    test: Rows,
    denominator: Denominator = "keep",
) -> Forgotten:
    r"""Compare a model that was to forget samples with the training without them.

    That training is run for the comparison, over the recorded batches, with weight 0 for the
    samples; in float64, or in the training's own precision where float64 fails. With the trained
    parameters :math:`\theta`, those to judge :math:`\hat\theta`, and the retrained ones
    :math:`\theta'`:

    .. math:: \frac{\|\hat\theta - \theta'\|}{\|\theta - \theta'\|}
        \qquad
        \frac{\operatorname{mean}_x \mathrm{KL}(p_{\theta'}(x) \,\|\, p_{\hat\theta}(x))}
        {\operatorname{mean}_x \mathrm{KL}(p_{\theta'}(x) \,\|\, p_{\theta}(x))}

    Args:
        run: The recorded training.
        samples: The samples that were to be forgotten.
        state: The state_dict to judge, from :func:`backtrail.forget` or any other method.
        test: Rows of the same kind that were not trained on.
        denominator: What a removal does to its batch's mean: "keep" or "renormalize".

    Raises:
        UnknownSample: A sample that the training set does not have.
        UnknownId: A sample that the training did not see, where samples have ids of their own.
        NeverTrainedOn: A sample that was in no batch.
        BadCheckpoint: The state is not of this model; the message names the tensor.
        BadSetting: There are no test rows, or the denominator is unknown.
        BacktrailError: The task is wrong, in any precision.
        OutOfMemoryError: Memory ran out.
        RuntimeError: The model fails in its own precision as well.
    """
    check_run(run)
    expected = "one or more rows that were not trained on"
    if not arguments.count_rows("test", test, expected):
        raise BadSetting("test", test, expected)
    arguments.choice("denominator", denominator, get_args(Denominator))
    arguments.instance("state", state, Mapping, "a state_dict")  # type: ignore[type-abstract]
    try:
        return Judge.of(run, samples, denominator=denominator)(state, test)
    except (BacktrailError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        if run.task.dtype == torch.float64:
            raise
        first_line = str(error).partition("\n")[0]
    # Tensors that are not part of the batch (a teacher, an adjacency matrix) are not cast.
    log.warning(
        "retraining for the comparison is in %s, the training's own precision: in float64 the "
        "model fails (%s)",
        run.task.dtype,
        first_line,
    )
    judge = Judge.of(run, samples, denominator=denominator, dtype=run.task.dtype)
    return judge(state, test)


@final
@dataclass(frozen=True, slots=True)
class Judge:
    """Retraining with and without some samples: the reference for unlearned models."""

    group: RemovedGroup
    trained: State
    retrained: State
    dtype: torch.dtype

    @staticmethod
    def of(
        run: Run,
        samples: Sequence[int],
        *,
        denominator: Denominator = "keep",
        dtype: torch.dtype = torch.float64,
    ) -> "Judge":
        """Train again without the samples, in some precision."""
        group = RemovedGroup.of(run, samples, renormalize=denominator == "renormalize", dtype=dtype)
        start = run.state(0, dtype=dtype)
        end = run.state(run.steps, dtype=dtype)
        return Judge(group, trained=end, retrained=group.replayed(0, start), dtype=dtype)

    def __call__(self, state: Mapping[str, Tensor], test: Rows) -> Forgotten:
        """Judge a state_dict by some rows that were not trained on."""
        run = self.group.run
        removed = sorted(self.group.removal.samples)
        judged = self._read(state)
        models = [self.trained, judged, self.retrained]
        distance_before = _distance(self.trained.params, self.retrained.params)
        distance_after = _distance(judged.params, self.retrained.params)
        divergence, agreement = _compared(run.task, models, test, dtype=self.dtype)
        divergence_before, divergence_after = divergence
        membership = None
        if removed and not run.has_ids:  # else their rows cannot be read by number
            removed_rows = [run.task.data[row] for row in removed]
            membership = _membership(
                run.task, models, removed=removed_rows, test=test, dtype=self.dtype
            )
        return Forgotten(
            samples=len(removed),
            parameters=_ratio(distance_after, distance_before),
            predictions=_ratio(divergence_after, divergence_before),
            divergence=divergence,
            agreement=agreement,
            membership=membership,
        )

    def _read(self, state: Mapping[str, Tensor]) -> State:
        given = tensors_of(state)
        params = matched("state", given, self.trained.params, required=True)
        buffers = matched("state", given, self.trained.buffers, required=False)
        return State(params, buffers)


def _distance(left: Tree, right: Tree) -> float:
    return norm({name: tensor - right[name] for name, tensor in left.items()})


def _ratio(after: float, before: float) -> float:
    """The distance after forgetting, divided by that before; 0 where both are 0."""
    if before > 0:
        return after / before
    return float("inf") if after > 0 else 0.0


def _compared(
    task: Task, models: Sequence[State], test: Rows, *, dtype: torch.dtype
) -> tuple[Pair, Pair | None]:
    """Divergence of the first two models' predictions from the last one's, and agreement."""
    divergence = np.zeros(2)
    same_class = np.zeros(2)
    divisor = 0
    are_classes = True
    for batch in _batches(task, test, dtype):
        outputs = []
        with in_eval_mode(task, dtype) as reset_generators:
            for state in models:
                # All models with the same random numbers, if they draw any.
                reset_generators()
                output, _ = task.outputs(state.params, state.buffers, batch)
                outputs.append(logits_of(output).detach().double())
        *both, reference = outputs
        are_classes = _are_classes(reference, batch)
        if are_classes:
            divisor += reference.shape[:-1].numel()
        else:
            divisor += reference.numel()
        for place, output in enumerate(both):
            if are_classes:
                divergence[place] += float(_kl(reference, output))
            else:
                divergence[place] += float(_square(reference, output))
            same = output.argmax(-1) == reference.argmax(-1)
            same_class[place] += float(same.sum())
    mean_divergence = _pair(divergence / divisor)
    agreement = _pair(same_class / divisor)
    return mean_divergence, agreement if are_classes else None


def _pair(values: Float64[np.ndarray, " model"]) -> Pair:
    first, second = values.tolist()
    return first, second


def _are_classes(outputs: Tensor, batch: Batch) -> bool:
    """Whether outputs are class scores: one whole-number label for every vector of scores."""
    try:
        labels = labels_of(batch)
    except (KeyError, IndexError, TypeError):
        return False
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return False
    if outputs.dim() < 2 or outputs.shape[-1] < 2:
        return False
    return labels.shape == outputs.shape[:-1]


def _kl(reference: Tensor, other: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(reference || other), summed over rows."""
    log_reference = reference.log_softmax(-1)
    log_other = other.log_softmax(-1)
    return (log_reference.exp() * (log_reference - log_other)).sum()


def _square(reference: Tensor, other: Tensor) -> Tensor:
    return (reference - other).square().sum()


def _membership(
    task: Task, models: Sequence[State], *, removed: Rows, test: Rows, dtype: torch.dtype
) -> Triple:
    """How well a lower loss tells the removed rows from test rows, by model."""
    is_removed = np.arange(len(removed) + len(test)) < len(removed)
    found = []
    for state in models:
        losses = [_losses(task, state, rows, dtype) for rows in (removed, test)]
        found.append(auc(-np.concatenate(losses), is_removed))
    trained, judged, retrained = found
    return trained, judged, retrained


def _losses(
    task: Task, state: State, rows: Rows, dtype: torch.dtype
) -> Float64[np.ndarray, " row"]:
    parts = []
    with in_eval_mode(task, dtype):
        for batch in _batches(task, rows, dtype):
            losses, _ = task.losses(state.params, state.buffers, batch)
            parts.append(losses.detach())
    return torch.cat(parts).double().cpu().numpy()


def _batches(task: Task, rows: Rows, dtype: torch.dtype) -> Iterator[Batch]:
    """Rows in some precision on the task's device.

    Raises:
        BadSetting: they make no batch.
    """
    for first in range(0, len(rows), ROWS):
        stop = min(first + ROWS, len(rows))
        some = [rows[row] for row in range(first, stop)]
        try:
            read = mapping_to_dict(task.collate(some))
        except (TypeError, ValueError, RuntimeError, KeyError) as error:
            expected = f"rows that the task's collate makes a batch of (it raised: {error})"
            raise BadSetting("test", some[:1], expected) from error
        yield cast(read, dtype, task.device)
