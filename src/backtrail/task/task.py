"""A training problem as pure functions of a dict of tensors.

Decisions: the user's model is copied once as a skeleton without weights, so nothing here can read
or change the live model; tied parameters are one entry, under the first of their names; a batch is
whatever the collate function returns.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import Any, Literal, Protocol, TypeVar, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import default_collate

from backtrail.accel.layers import mark_activation
from backtrail.errors import BadIds, BadLoss, BadReduction, NotCut, SharedStorage
from backtrail.exclusive import exclusive
from backtrail.task import torch_compile
from backtrail.task.activation_checkpointing import computed_once, uses_checkpointing
from backtrail.task.batchnorm import STATISTICS, RunningStatistics, tracking
from backtrail.task.clipping import ClipNorm, ClipValue
from backtrail.tree import Tree, cast, mapping_to_dict, tree_leaves, tree_map

log = logging.getLogger(__name__)

Batch = Any  # whatever the collate function returns
Result = TypeVar("Result")
Reduction = Literal["mean", "sum"] | Callable[[Sequence[Batch]], Tensor]
Draw = Callable[[Any, Batch, torch.Generator], Tensor]
Ids = str | int | Callable[[Batch], Sequence[int] | Tensor]


@runtime_checkable
class Rows(Protocol):
    """A map-style data set."""

    def __len__(self) -> int:
        """Count the rows."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Read one row."""
        ...


def default_predict(model: nn.Module, batch: Batch) -> Any:
    """Call the model on the first item of a tuple, on the keywords of a mapping, or on the batch itself."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = cast(batch, None, device)
    if isinstance(batch, (tuple, list)):
        return model(batch[0])
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch)


def _predict_without(column: str, model: nn.Module, batch: Batch) -> Any:
    """As `default_predict`, but a model has no use for the ids of its samples."""
    named = isinstance(batch, Mapping)
    return default_predict(
        model, {key: batch[key] for key in batch if key != column} if named else batch
    )


@final
@dataclass(frozen=True, repr=False)
class Task:
    r"""Model, data and loss of a training: what is needed to replay it.

    With c the reduction and w the sample weights (1 as it happened), the loss of step t is

    .. math:: L_t(\theta; w) = \sum_b c_{t,b} w_{t,b} \ell(z_b; \theta) + R(\theta)

    Args:
        model: Gives structure only. Weights and modes are never read after `open_run` and never
            changed. Of a compiled model the module inside is taken.
        data: The training set, map-style; a *sample* is a row number of it.
        loss: `loss(outputs, batch) -> [slot]`, one unreduced value per row of the batch.
        predict: `predict(model, batch) -> outputs`; default `model(batch[0])` for a tuple,
            `model(**batch)` for a dict.
        collate: Turns a list of rows into a batch; must be the loader's.
        penalty: R, a function of the dict of parameters (a regulariser that the loop adds to its
            loss).
        reduce: "mean" (each micro-batch's mean, averaged over the micro-batches of a step), "sum",
            or a function of the batches of one step that returns c for all their slots, `[slot]`.
        clip: `ClipNorm(x)` or `ClipValue(x)` where the loop clips the gradient before the
            optimizer's step.
        draw: `draw(outputs, batch, generator) -> [slot]`: losses with labels drawn from the model;
            their gradients g have a sample's Gauss-Newton matrix as the mean of :math:`g g^\top`.
            Only `DataValueEmbedding` asks for it.
        ids: For data that cannot be read by row number: where a batch tells the ids of its samples
            (whole numbers, 0 or more), a key, a place in a tuple, or a function of the batch. A
            *sample* is then such an id.

    >>> model = torch.nn.Linear(2, 1)
    >>> data = torch.utils.data.TensorDataset(torch.ones(4, 2), torch.zeros(4, 1))
    >>> task = Task(model, data, loss=lambda outputs, batch: (outputs - batch[1]).square().mean(1))
    >>> losses, _ = task.losses(task.parameters(), {}, task.batch([0, 1]))
    >>> losses.shape
    torch.Size([2])
    """

    model: nn.Module
    data: Any
    loss: Callable[[Any, Batch], Tensor]
    predict: Callable[[nn.Module, Batch], Any] = field(default=default_predict, kw_only=True)
    collate: Callable[[list[Any]], Batch] = field(default=default_collate, kw_only=True)
    penalty: Callable[[Tree], Tensor] | None = field(default=None, kw_only=True)
    reduce: Reduction = field(default="mean", kw_only=True)
    clip: ClipNorm | ClipValue | None = field(default=None, kw_only=True)
    draw: Draw | None = field(default=None, kw_only=True)
    ids: Ids | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Look through `torch.compile`; keep a named column of ids from the model."""
        object.__setattr__(self, "model", torch_compile.uncompiled(self.model))
        if isinstance(self.ids, str) and self.predict is default_predict:
            object.__setattr__(self, "predict", partial(_predict_without, self.ids))

    def __repr__(self) -> str:
        """Model, size of the data and reduction in one line."""
        sized = isinstance(self.data, Sized)
        data = f"{len(self.data)} rows" if sized else type(self.data).__name__
        return f"Task({type(self.model).__name__}, {data}, reduce={self.reduce!r})"

    @cached_property
    @exclusive
    def binding(self) -> "_Binding":
        """The skeleton of the model, ready to be called with tensors from outside."""
        return _Binding(skeleton(self.model))

    @cached_property
    def uses_checkpointing(self) -> bool:
        """Whether a call of the model may use activation checkpointing."""
        return uses_checkpointing(self.binding.model, self.predict)

    @cached_property
    def device(self) -> torch.device:
        """Where the model lived when it was first asked."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def parameters(self) -> Tree:
        """The live model's parameters under unique names (shared, not copied, detached)."""
        refuse_shared_storage(self.model)
        return {name: p.detach() for name, p in torch_compile.parameters(self.model).items()}

    def buffers(self) -> Tree:
        """The live model's buffers under unique names (shared, not copied)."""
        return {name: b.detach() for name, b in torch_compile.buffers(self.model).items()}

    @cached_property
    def running(self) -> tuple[str, ...]:
        """Names of the BatchNorm statistics, which training changes and evaluation reads."""
        return tuple(
            f"{name}.{key}".lstrip(".") for name in tracking(self.model) for key in STATISTICS
        )

    def batch(self, samples: Sequence[int]) -> Batch:
        """Read rows from the data set and collate them, as a loader would."""
        if hasattr(self.data, "__getitems__"):
            return mapping_to_dict(self.collate(self.data.__getitems__(list(samples))))
        return mapping_to_dict(self.collate([self.data[int(i)] for i in samples]))

    def ids_of(self, batch: Batch) -> tuple[int, ...]:
        """The ids of a batch's samples, as the batch tells them.

        Raises:
            BadIds: it has none, or they are not one whole number for every row.
        """
        try:
            told = self.ids(batch) if callable(self.ids) else batch[self.ids]
        except (KeyError, IndexError, TypeError) as error:
            there = (
                f"it has {list(batch)}"
                if hasattr(batch, "keys")
                else f"it is a {type(batch).__name__}"
            )
            raise BadIds(self.ids, f"this batch has no such entry ({error!r}); {there}") from error
        try:
            found = torch.as_tensor(told)
        except (TypeError, ValueError, RuntimeError) as error:
            kinds = (
                {type(entry).__name__ for entry in told}
                if isinstance(told, (list, tuple))
                else {"things"}
            )
            raise BadIds(
                self.ids, f"this batch gives a {type(told).__name__} of {', '.join(sorted(kinds))}"
            ) from error
        whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
        if not whole or found.dim() != 1 or len(found) != size_of(batch) or bool((found < 0).any()):
            told = f"{found.dtype} of shape {list(found.shape)}, {found.flatten()[:4].tolist()}..."
            raise BadIds(self.ids, f"this batch has {size_of(batch)} rows and gives {told}")
        return tuple(found.tolist())

    @exclusive
    def bind(self, params: Tree, buffers: Tree, function: Callable[[nn.Module], Result]) -> Result:
        """Evaluate `function(model)` with the given tensors in place of the model's own."""
        tensors = {f"model.{name}": tensor for name, tensor in (params | buffers).items()}
        with computed_once() if self.uses_checkpointing else nullcontext():
            result: Result = functional_call(self.binding, tensors, (function,))
        return result

    @exclusive
    def outputs(self, params: Tree, buffers: Tree, batch: Batch) -> tuple[Any, Tree]:
        """What `predict` returns for a batch, and the buffers as the forward pass leaves them."""
        copies = {
            name: tensor.clone() for name, tensor in buffers.items()
        }  # a module may write to them in place
        with self.binding.statistics.collected() as updates:
            found, left = self.bind(
                params, copies, lambda model: (self.predict(model, batch), _buffers(model))
            )
        return found, {name: left.get(name, copy) for name, copy in copies.items()} | updates

    def losses_of(self, outputs: Any, batch: Batch) -> Float[Tensor, " slot"]:
        """Loss of every row of a batch.

        Raises:
            BadLoss: the loss is not a tensor with one axis.
        """
        found = self.loss(outputs, batch)
        if not isinstance(found, Tensor) or found.dim() != 1:
            raise BadLoss(tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__)
        return found

    @exclusive
    def losses(
        self, params: Tree, buffers: Tree, batch: Batch
    ) -> tuple[Float[Tensor, " slot"], Tree]:
        """Loss of every row of a batch, and the buffers as the forward pass leaves them.

        Raises:
            BadLoss: the loss is not a tensor with one axis.
        """
        outputs, after = self.outputs(params, buffers, batch)
        return self.losses_of(outputs, batch), after

    def shares(
        self, batches: Sequence[Batch], sizes: Sequence[int]
    ) -> list[Float[Tensor, " slot"]]:
        """The factor c of every slot, for each micro-batch of one step.

        Raises:
            BadReduction: the task's own reduction gives another number of factors.
        """
        total = sum(sizes)
        match self.reduce:
            case "mean":
                c = torch.cat(
                    [torch.full((n,), 1 / (n * len(sizes)), dtype=torch.float64) for n in sizes]
                )
            case "sum":
                c = torch.ones(total, dtype=torch.float64)
            case function:
                c = torch.as_tensor(function(batches)).detach()
        if c.shape != (total,):
            raise BadReduction(tuple(c.shape), total)
        return list(torch.split(c, list(sizes)))


class _Binding(nn.Module):
    """Holds the skeleton, so that `functional_call` can reach any attribute of it, not only its forward."""

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.statistics = RunningStatistics(model)
        self.modules_by_name = dict(model.named_modules())
        self.one_by_one = False

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        """Hand the model, with the swapped tensors, to the function."""
        return function(self.model)

    def note_one_by_one(self, error: Exception) -> None:
        """Say once that rows cannot be differentiated at once, and why."""
        if not self.one_by_one:
            log.warning(
                "rows of this model are differentiated one by one: %s",
                str(error).partition("\n")[0],
            )
        self.one_by_one = True

    def set_modes(self, evaluating: Sequence[str] | None) -> None:
        """Put the named modules into eval mode and all others into train mode.

        Args:
            evaluating: names of modules; None: all of them.
        """
        names = self.modules_by_name if evaluating is None else frozenset(evaluating)
        for name, module in self.modules_by_name.items():
            module.training = name not in names

    @contextmanager
    def in_modes(self, evaluating: Sequence[str] | None) -> Iterator[None]:
        """Set modes as `set_modes` does, and restore the previous ones afterwards."""
        previous = {name: module.training for name, module in self.modules_by_name.items()}
        self.set_modes(evaluating)
        try:
            yield
        finally:
            for name, module in self.modules_by_name.items():
                module.training = previous[name]


def _buffers(model: nn.Module) -> Tree:
    """A module may also assign new tensors to its buffers, which the given ones do not show."""
    return dict(model.named_buffers(remove_duplicate=False))


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model's structure that owns no weights (its tensors live on the meta device)."""
    tensors = chain(model.parameters(), model.buffers())
    memo = {id(tensor): _without_values(tensor) for tensor in tensors}
    copied = torch_compile.copied(model, memo)
    for module in copied.modules():
        _keep_activations(module)
        mark_activation(module)
    return copied


def _keep_activations(module: nn.Module) -> None:
    """Hugging Face's gradient checkpointing computes activations twice: the same numbers, but torch.func refuses it."""
    if getattr(module, "gradient_checkpointing", False) is True:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
            del module._forward_hooks[key]


def _without_values(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def refuse_shared_storage(model: nn.Module) -> None:
    """Two different parameters on one storage are updated twice a step: no replay can tell them apart.

    Raises:
        SharedStorage: names both.
    """
    owner: dict[int, str] = {}
    for name, parameter in torch_compile.parameters(model).items():
        address = parameter.untyped_storage().data_ptr()
        if address and owner.setdefault(address, name) != name:
            raise SharedStorage(owner[address], name)


def size_of(batch: Batch) -> int:
    """Number of rows of a batch: the length of its first tensor."""
    return next(len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())


def cut(batch: Batch, slots: Tensor) -> Batch:
    """Some rows of a batch.

    Raises:
        NotCut: a tensor of it has another number of rows.
    """
    rows = size_of(batch)

    def some(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        if len(leaf) != rows:
            raise NotCut(tuple(leaf.shape), rows)
        return leaf[slots]

    return tree_map(some, batch)


def logits_of(outputs: Any) -> Tensor:
    """The tensor of scores in whatever the model returns: itself, or the output's entry `logits`."""
    found: Tensor = outputs if isinstance(outputs, Tensor) else outputs["logits"]
    return found


def labels_of(batch: Batch) -> Tensor:
    """The targets in a batch: its second item, or its entry `labels`."""
    found: Tensor = batch["labels"] if isinstance(batch, Mapping) else batch[1]
    return found


@contextmanager
def evaluating(task: Task) -> Iterator[None]:
    """All modules in eval mode, and attention that can be differentiated under `vmap`."""
    with task.binding.in_modes(None), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        yield
