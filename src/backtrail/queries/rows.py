"""Queries on rows of a data set: losses, logits, margins, hidden units, saliencies."""

from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.func import grad

from backtrail import arguments
from backtrail.errors import BadQuery, join_items
from backtrail.queries.query import Mode, Part, Query
from backtrail.queries.selection import Aggregate, Collate, RowSelection, chosen_rows
from backtrail.task.classes import class_labels, class_scores, labels_within
from backtrail.task.task import Batch, Rows, Task
from backtrail.tree import Tree, flat_rows


@final
class Loss(Query):
    """The task's own loss on rows of any data set, such as a test set.

    Influence on it is positive where removing the sample would raise the loss (a helpful sample),
    and negative where it would lower it (a harmful one).

    >>> query = Loss([(0.0, 0.0)] * 5, samples=[3, 4])
    >>> query, query.names
    (Loss(2 samples: 3, 4; aggregate=None), ('loss[3]', 'loss[4]'))
    >>> Loss([(0.0, 0.0)] * 5, aggregate="mean").names
    ('mean loss of 5',)

    Args:
        data: Map-style data set, or a list of rows.
        samples: Row numbers of `data`; all rows by default.
        unit: Unit of the loss, for example "nats".
        aggregate: "mean" or "sum" over the rows gives one query; None gives one query per row.
        mode: Mode of the model while it is read, "eval" or "train".
        collate: Makes a batch of a list of rows; the task's by default.
        batch: Rows per forward pass; 256 by default. Where the scores of rows depend on one another
            (a contrastive loss), every group of so many rows, in order, is read by itself.

    Raises:
        BadQuery: The data set does not have these rows.
        BadSetting: An option has a value that it cannot take.
    """

    def __init__(
        self,
        data: Rows,
        samples: Sequence[int] | None = None,
        *,
        unit: str = "loss",
        aggregate: Aggregate = None,
        mode: Mode = "eval",
        collate: Collate | None = None,
        batch: int | None = None,
    ) -> None:
        self.unit = arguments.text("unit", unit)
        self.mode: Mode = mode
        self.selection = RowSelection(
            label="loss",
            data=data,
            rows=chosen_rows(data, samples),
            aggregate=aggregate,
            mode=mode,
            collate=collate,
            batch=batch,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Like `loss[17]`, or `mean loss of 200`."""
        return self.selection.names

    def parts(self, task: Task, like: Tensor, *, together: bool) -> Iterator[Part]:
        """The losses of blocks of rows."""
        return self.selection.parts(task, like, together=together, score=self.score)

    def prepare(self, task: Task, *, params: Tree, buffers: Tree) -> None:
        """Look whether rows depend on one another.

        Raises:
            CoupledRows: They do, and it is not known which of them belong together.
        """
        self.selection.prepare(task, params, buffers, score=self.score)

    def score(self, task: Task, model: nn.Module, batch: Batch) -> Tensor:
        """Loss of each row of a batch: `[slot]`.

        Raises:
            BadQuery: The task's loss or predict cannot take rows as they are.
        """
        try:
            return task.losses_of(task.predict(model, batch), batch)
        except LookupError as error:
            needed = "a batch that the task's loss and predict can take"
            raise BadQuery(
                needed,
                f"on rows of the query's data they raise {type(error).__name__}: {error}. Use "
                "backtrail.Custom(function), or let them accept rows as they are",
            ) from error

    def __repr__(self) -> str:
        """The rows and the options in one line."""
        return self.selection.describe("Loss", {})


@final
class Logit(Query):
    """The output for one class: the row's own label, or `target`.

    The task's outputs are logits `[slot, class]` (or have them under the key `logits`).

    >>> Logit([(0.0, 1)] * 2, target=7).names
    ('logit 7[0]', 'logit 7[1]')

    Args:
        data: Map-style data set, or a list of rows.
        samples: Row numbers of `data`; all rows by default.
        target: Number of the class; None takes the label of each row.
        aggregate: "mean" or "sum" over the rows gives one query; None gives one query per row.
        mode: Mode of the model while it is read, "eval" or "train".
        collate: Makes a batch of a list of rows; the task's by default.
        batch: Rows per forward pass; 256 by default. Where the scores of rows depend on one another
            (a contrastive loss), every group of so many rows, in order, is read by itself.

    Raises:
        BadQuery: The data set does not have these rows.
        BadSetting: An option has a value that it cannot take.
    """

    def __init__(
        self,
        data: Rows,
        samples: Sequence[int] | None = None,
        *,
        target: int | None = None,
        aggregate: Aggregate = None,
        mode: Mode = "eval",
        collate: Collate | None = None,
        batch: int | None = None,
    ) -> None:
        self.target = None if target is None else arguments.whole("target", target, least=0)
        self.unit = "logit"
        self.mode: Mode = mode
        self.selection = RowSelection(
            label="logit" if target is None else f"logit {self.target}",
            data=data,
            rows=chosen_rows(data, samples),
            aggregate=aggregate,
            mode=mode,
            collate=collate,
            batch=batch,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Like `logit[17]`, or `logit 7[17]` for the class 7."""
        return self.selection.names

    def parts(self, task: Task, like: Tensor, *, together: bool) -> Iterator[Part]:
        """The logits of blocks of rows."""
        check = class_labels if self.target is None else None
        return self.selection.parts(task, like, together=together, score=self.score, check=check)

    def prepare(self, task: Task, *, params: Tree, buffers: Tree) -> None:
        """Look whether rows depend on one another.

        Raises:
            CoupledRows: They do, and it is not known which of them belong together.
        """
        self.selection.prepare(task, params, buffers, score=self.score)

    def score(self, task: Task, model: nn.Module, batch: Batch) -> Tensor:
        """Logit of the chosen class of each row of a batch: `[slot]`.

        Raises:
            NoClasses: The outputs are not scores of classes, or the labels are not classes.
            BadQuery: There is no class `target`.
        """
        scores = class_scores(task.predict(model, batch))
        if self.target is None:
            classes = labels_within(batch, scores)
        else:
            if self.target >= scores.shape[1]:
                raise BadQuery(f"class {self.target}", f"there are {scores.shape[1]} classes")
            classes = torch.full((len(scores),), self.target, device=scores.device)
        return scores.gather(1, classes[:, None])[:, 0]

    def __repr__(self) -> str:
        """The rows and the options in one line."""
        return self.selection.describe("Logit", {"target": repr(self.target)})


@final
class Margin(Query):
    r"""Log-odds of the row's label y: its logit minus the log-sum-exp of the other classes' logits.

    .. math:: q = \log \frac{p_y}{1 - p_y}

    This is the model output function of TRAK (Park et al., 2023, arXiv 2303.14186). The task's
    outputs are logits `[slot, class]` (or have them under the key `logits`).

    >>> Margin([(0.0, 1)] * 2).names
    ('margin[0]', 'margin[1]')

    Args:
        data: Map-style data set, or a list of rows.
        samples: Row numbers of `data`; all rows by default.
        aggregate: "mean" or "sum" over the rows gives one query; None gives one query per row.
        mode: Mode of the model while it is read, "eval" or "train".
        collate: Makes a batch of a list of rows; the task's by default.
        batch: Rows per forward pass; 256 by default. Where the scores of rows depend on one another
            (a contrastive loss), every group of so many rows, in order, is read by itself.

    Raises:
        BadQuery: The data set does not have these rows.
        BadSetting: An option has a value that it cannot take.
    """

    def __init__(
        self,
        data: Rows,
        samples: Sequence[int] | None = None,
        *,
        aggregate: Aggregate = None,
        mode: Mode = "eval",
        collate: Collate | None = None,
        batch: int | None = None,
    ) -> None:
        self.unit = "logit"
        self.mode: Mode = mode
        self.selection = RowSelection(
            label="margin",
            data=data,
            rows=chosen_rows(data, samples),
            aggregate=aggregate,
            mode=mode,
            collate=collate,
            batch=batch,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Like `margin[17]`."""
        return self.selection.names

    def parts(self, task: Task, like: Tensor, *, together: bool) -> Iterator[Part]:
        """The margins of blocks of rows."""
        return self.selection.parts(
            task, like, together=together, score=self.score, check=class_labels
        )

    def prepare(self, task: Task, *, params: Tree, buffers: Tree) -> None:
        """Look whether rows depend on one another.

        Raises:
            CoupledRows: They do, and it is not known which of them belong together.
        """
        self.selection.prepare(task, params, buffers, score=self.score)

    def score(self, task: Task, model: nn.Module, batch: Batch) -> Tensor:
        """Margin of each row of a batch: `[slot]`.

        Raises:
            NoClasses: The outputs are not scores of classes, or the labels are not classes.
        """
        scores = class_scores(task.predict(model, batch))
        labels = labels_within(batch, scores)[:, None]
        # log(1 - p_y) is the log-sum-exp of the others, up to the normaliser that cancels.
        others = scores.scatter(1, labels, -torch.inf).logsumexp(1)
        return scores.gather(1, labels)[:, 0] - others

    def __repr__(self) -> str:
        """The rows and the options in one line."""
        return self.selection.describe("Margin", {})


@final
class Feature(Query):
    """One hidden unit: entry `unit` of the last axis of a module's output.

    Axes between the first and the last, such as places in a sequence, are averaged over. For
    convolutional outputs `[slot, channel, ...]` name a module that puts channels last, or use
    :class:`backtrail.Custom`.

    >>> Feature([(0.0, 1)], layer="encoder.0", unit=5).names
    ('encoder.0[5][0]',)

    Args:
        data: Map-style data set, or a list of rows.
        samples: Row numbers of `data`; all rows by default.
        layer: Name of the module, as in `model.named_modules()`.
        unit: Index on the last axis of its output.
        aggregate: "mean" or "sum" over the rows gives one query; None gives one query per row.
        mode: Mode of the model while it is read, "eval" or "train".
        collate: Makes a batch of a list of rows; the task's by default.
        batch: Rows per forward pass; 256 by default. Where the scores of rows depend on one another
            (a contrastive loss), every group of so many rows, in order, is read by itself.

    Raises:
        BadQuery: The data set does not have these rows; when it is used, that the model does not
            have this layer.
        BadSetting: An option has a value that it cannot take.
    """

    def __init__(
        self,
        data: Rows,
        samples: Sequence[int] | None = None,
        *,
        layer: str,
        unit: int,
        aggregate: Aggregate = None,
        mode: Mode = "eval",
        collate: Collate | None = None,
        batch: int | None = None,
    ) -> None:
        self.layer = arguments.text("layer", layer, "the name of a module of the model")
        # `unit` of a query is the unit of its values, so the hidden unit goes by another name here.
        self.index = arguments.whole("unit", unit, least=0)
        self.unit = "activation"
        self.mode: Mode = mode
        self.selection = RowSelection(
            label=f"{layer}[{self.index}]",
            data=data,
            rows=chosen_rows(data, samples),
            aggregate=aggregate,
            mode=mode,
            collate=collate,
            batch=batch,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Like `encoder.0[5][17]`: layer, unit, row."""
        return self.selection.names

    def parts(self, task: Task, like: Tensor, *, together: bool) -> Iterator[Part]:
        """The activations of blocks of rows."""
        return self.selection.parts(task, like, together=together, score=self.score)

    def prepare(self, task: Task, *, params: Tree, buffers: Tree) -> None:
        """Look whether rows depend on one another.

        Raises:
            CoupledRows: They do, and it is not known which of them belong together.
        """
        self.selection.prepare(task, params, buffers, score=self.score)

    def score(self, task: Task, model: nn.Module, batch: Batch) -> Tensor:
        """Activation of the unit for each row of a batch: `[slot]`.

        Raises:
            BadQuery: The model does not have the layer, or the layer the unit.
        """
        outputs: list[Tensor] = []
        handle = _submodule(model, self.layer).register_forward_hook(
            lambda _module, _inputs, output: outputs.append(output)
        )
        try:
            task.predict(model, batch)
        finally:
            handle.remove()
        if not outputs or not isinstance(outputs[-1], Tensor) or outputs[-1].dim() < 2:
            raise BadQuery(
                f"a tensor [slot, ..., unit] from layer {self.layer!r}",
                "this layer was not called, or returns something else",
            )
        units = outputs[-1].shape[-1]
        if self.index >= units:
            raise BadQuery(
                f"unit {self.index} of layer {self.layer!r}", f"it has the units 0 to {units - 1}"
            )
        activations = outputs[-1][..., self.index]  # [slot], or [slot, ...] with axes between
        if activations.dim() == 1:
            return activations
        return activations.flatten(1).mean(1)

    def __repr__(self) -> str:
        """The rows and the options in one line."""
        return self.selection.describe(
            "Feature", {"layer": repr(self.layer), "unit": str(self.index)}
        )


@final
class Saliency(Query):
    r"""Derivative of the label's logit by chosen entries of the input, `batch[0]`.

    .. math:: q_i = \partial f_y(x) / \partial x_i

    Gives one query per row and entry. The task's outputs are logits `[slot, class]`.

    >>> Saliency([(0.0, 1)], inputs=[0, 9]).names
    ('saliency 0[0]', 'saliency 9[0]')

    Args:
        data: Map-style data set, or a list of rows.
        samples: Row numbers of `data`; all rows by default.
        inputs: Indices i into the flattened input of a row.
        aggregate: "mean" or "sum" over the rows gives one query per entry; None gives one query per
            row and entry.
        mode: Mode of the model while it is read, "eval" or "train".
        collate: Makes a batch of a list of rows; the task's by default.
        batch: Rows per forward pass; 256 by default. Where the scores of rows depend on one another
            (a contrastive loss), every group of so many rows, in order, is read by itself.

    Raises:
        BadQuery: The data set does not have these rows.
        BadSetting: An option has a value that it cannot take.
    """

    def __init__(
        self,
        data: Rows,
        samples: Sequence[int] | None = None,
        *,
        inputs: Sequence[int],
        aggregate: Aggregate = None,
        mode: Mode = "eval",
        collate: Collate | None = None,
        batch: int | None = None,
    ) -> None:
        expected = "one or more indices into the flattened input of a row"
        self.inputs = tuple(arguments.whole_numbers("inputs", inputs, expected=expected))
        self.unit = "logit per input"
        self.mode: Mode = mode
        self.selection = RowSelection(
            label="saliency",
            data=data,
            rows=chosen_rows(data, samples),
            columns=tuple(f" {entry}" for entry in self.inputs),
            aggregate=aggregate,
            mode=mode,
            collate=collate,
            batch=batch,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Like `saliency 9[17]`: entry of the input, row."""
        return self.selection.names

    def parts(self, task: Task, like: Tensor, *, together: bool) -> Iterator[Part]:
        """The saliencies of blocks of rows."""
        return self.selection.parts(
            task, like, together=together, score=self.score, check=class_labels
        )

    def prepare(self, task: Task, *, params: Tree, buffers: Tree) -> None:
        """Look whether rows depend on one another.

        Raises:
            CoupledRows: They do, and it is not known which of them belong together.
        """
        self.selection.prepare(task, params, buffers, score=self.score)

    def score(self, task: Task, model: nn.Module, batch: Batch) -> Tensor:
        """Derivatives by the chosen entries for each row of a batch: `[slot, entry]`.

        Raises:
            NoClasses: The outputs are not scores of classes, or the labels are not classes.
            BadQuery: The batch has no tensor of numbers in first place, or a row too few entries.
        """
        inputs = batch[0] if isinstance(batch, (tuple, list)) else None
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise BadQuery(
                "a batch (inputs, labels) with floating-point inputs",
                f"this one is a {type(batch).__name__}",
            )
        entries = inputs[0].numel()
        if max(self.inputs) >= entries:
            raise BadQuery(
                f"entry {max(self.inputs)} of an input", f"a row has the entries 0 to {entries - 1}"
            )

        def logit(x: Tensor) -> Tensor:
            scores = class_scores(task.predict(model, (x, *batch[1:])))
            # The gradient of the sum holds that of each row, as no row reads another in eval mode.
            return scores.gather(1, labels_within(batch, scores)[:, None]).sum()

        slopes: Tensor = grad(logit)(inputs)
        return flat_rows(slopes)[:, list(self.inputs)]

    def __repr__(self) -> str:
        """The rows and the options in one line."""
        inputs = f"[{join_items(self.inputs, most=6)}]"
        return self.selection.describe("Saliency", {"inputs": inputs})


RowQuery = Loss | Logit | Margin | Feature | Saliency


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = [name for name, _ in model.named_modules() if name]
        raise BadQuery(f"layer {name!r}", f"the model has {known}") from None
