"""Evaluate unlearning: how close the model is to one trained without the samples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final, get_args

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from backtrail.errors import BadSetting
from backtrail.exclusive import exclusive
from backtrail.methods.diff_in.checkpoints import matched, tensors_of
from backtrail.methods.retrain.removal import RemovedGroup
from backtrail.methods.retrain.retrain import Denominator
from backtrail.run.run import Run
from backtrail.stats import auc
from backtrail.step.state import State
from backtrail.task.task import Batch, Rows, Task, in_eval_mode, labels_of, logits_of
from backtrail.tree import Tree, cast, mapping_to_dict, norm

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
        predictions: The same ratio for the divergence of predictions on the test rows.
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
        """One line a measure, the second model first."""
        before, after = self.divergence
        lines = [
            f"Forgetting {self.samples} samples, compared with retraining without them "
            "(0 = equal to it, 1 = as far from it as without forgetting)",
            f"parameters   {self.parameters:.3f}",
            f"predictions  {self.predictions:.3f}: KL divergence {after:.2e} "
            f"({before:.2e} without forgetting)",
        ]
        if self.agreement is not None:
            before, after = self.agreement
            lines[-1] += f"; same class on {after:.1%} ({before:.1%} without forgetting)"
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

    That training is run for the comparison, over the recorded batches in float64, with weight 0 for
    the samples. With the trained parameters :math:`\theta`, those to judge :math:`\hat\theta`, and
    the retrained ones :math:`\theta'`:

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
        BadCheckpoint: The state is not of this model; the message names the tensor.
        BadSetting: There are no test rows, or the denominator is unknown.
    """
    if not len(test):
        raise BadSetting("test", test, "one or more rows that were not trained on")
    if denominator not in get_args(Denominator):
        raise BadSetting("denominator", denominator, "'keep' or 'renormalize'")
    return Judge.of(run, samples, denominator=denominator)(state, test)


@final
@dataclass(frozen=True, slots=True)
class Judge:
    """Retraining in float64 with and without some samples: the reference for unlearned models."""

    group: RemovedGroup
    trained: State
    retrained: State

    @staticmethod
    def of(run: Run, samples: Sequence[int], *, denominator: Denominator = "keep") -> "Judge":
        """Train again without the samples."""
        group = RemovedGroup.of(
            run, samples, renormalize=denominator == "renormalize", dtype=torch.float64
        )
        start, end = (run.state(number, dtype=torch.float64) for number in (0, run.steps))
        return Judge(group, end, group.replayed(0, start))

    def __call__(self, state: Mapping[str, Tensor], test: Rows) -> Forgotten:
        """Judge a state_dict by some rows that were not trained on."""
        task, gone = self.group.run.task, sorted(self.group.removal.samples)
        found = [self.trained, self._read(state), self.retrained]
        divergence, agreement = _compared(task, found, test)
        apart = [_distance(model.params, self.retrained.params) for model in found[:2]]
        readable = gone and not self.group.run.has_ids
        return Forgotten(
            samples=len(gone),
            parameters=_share(apart[1], apart[0]),
            predictions=_share(divergence[1], divergence[0]),
            divergence=divergence,
            agreement=agreement,
            membership=_membership(task, found, gone=[task.data[row] for row in gone], test=test)
            if readable
            else None,
        )

    def _read(self, state: Mapping[str, Tensor]) -> State:
        given, end = tensors_of(state), self.trained
        params = matched("state", given, end.params, required=True)
        return State(params, matched("state", given, end.buffers, required=False))


def _distance(left: Tree, right: Tree) -> float:
    return norm({name: tensor - right[name] for name, tensor in left.items()})


def _share(part: float, whole: float) -> float:
    """Of nothing, nothing is 0."""
    return part / whole if whole > 0 else float(part > 0) and float("inf")


def _compared(task: Task, found: Sequence[State], test: Rows) -> tuple[Pair, Pair | None]:
    """KL divergence from the last model's predictions and agreement with its classes."""
    divergence, same, divisor, classes = np.zeros(2), np.zeros(2), 0, True
    for batch in _batches(task, test):
        with in_eval_mode(task):
            outputs = (task.outputs(state.params, state.buffers, batch)[0] for state in found)
            *both, true = (logits_of(some).double() for some in outputs)
        classes = _classes(true, batch)
        divergence += [float((_kl if classes else _square)(true, some)) for some in both]
        same += [float((some.argmax(-1) == true.argmax(-1)).sum()) for some in both]
        divisor += true.shape[:-1].numel() if classes else true.numel()
    pairs = [
        (float(first), float(second)) for first, second in (divergence / divisor, same / divisor)
    ]
    return pairs[0], pairs[1] if classes else None


def _classes(outputs: Tensor, batch: Batch) -> bool:
    """Whether outputs are class scores: one whole-number label for every vector of scores."""
    try:
        labels = labels_of(batch)
    except (KeyError, IndexError, TypeError):
        return False
    whole = isinstance(labels, Tensor) and not labels.is_floating_point()
    return (
        whole and outputs.dim() > 1 and outputs.shape[-1] > 1 and labels.shape == outputs.shape[:-1]
    )


def _kl(true: Tensor, other: Tensor) -> Tensor:
    true, other = true.log_softmax(-1), other.log_softmax(-1)
    return (true.exp() * (true - other)).sum()


def _square(true: Tensor, other: Tensor) -> Tensor:
    return (true - other).square().sum()


def _membership(task: Task, found: Sequence[State], *, gone: Rows, test: Rows) -> Triple:
    """How well a lower loss tells the rows that are gone from test rows, by model."""
    guilty = np.arange(len(gone) + len(test)) < len(gone)
    first, second, third = (
        auc(-np.concatenate([_losses(task, state, rows) for rows in (gone, test)]), guilty)
        for state in found
    )
    return first, second, third


def _losses(task: Task, state: State, rows: Rows) -> Float64[np.ndarray, " row"]:
    with in_eval_mode(task):
        parts = [
            task.losses(state.params, state.buffers, batch)[0] for batch in _batches(task, rows)
        ]
    return torch.cat(parts).double().cpu().numpy()


def _batches(task: Task, rows: Rows) -> Iterator[Batch]:
    """Rows in float64 on the task's device."""
    for first in range(0, len(rows), ROWS):
        some = [rows[row] for row in range(first, min(first + ROWS, len(rows)))]
        yield cast(mapping_to_dict(task.collate(some)), torch.float64, task.device)
