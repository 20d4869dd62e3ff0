"""A training problem as pure functions of a dict of tensors.

Decisions:

* The user's model is copied once as a skeleton without weights, so that no replay can read or
  change the live model.
* Tied parameters are one entry, under the first of their names.
* A batch is whatever the collate function returns.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from itertools import chain
from typing import Any, Literal, Protocol, TypeVar, final, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import default_collate

from backtrail import arguments
from backtrail.accel.layers import mark_activation
from backtrail.errors import (
    BadIds,
    BadLoss,
    BadReduction,
    BadSetting,
    BadTotal,
    NoRowLosses,
    NoRows,
    NotCut,
    SharedStorage,
)
from backtrail.exclusive import exclusive
from backtrail.task import torch_compile
from backtrail.task.activation_checkpointing import computed_once, uses_checkpointing
from backtrail.task.batchnorm import STATISTICS, RunningStatistics, batchnorm_layers
from backtrail.task.clipping import ClipNorm, ClipValue
from backtrail.task.live_references import detach_from_live
from backtrail.task.noise import fixed_noise
from backtrail.task.true_derivatives import note_buffers
from backtrail.tree import Tree, cast, mapping_to_dict, precision_of, tree_leaves, tree_map

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
    """Call the model on a tuple's first item, on a mapping's entries, or on the batch itself."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = cast(batch, None, device)
    if isinstance(batch, (tuple, list)):
        return model(batch[0])
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch)


def _predict_without(column: str, model: nn.Module, batch: Batch) -> Any:
    """As `default_predict`, without the column of ids, which a model does not accept."""
    if isinstance(batch, Mapping):
        batch = {key: batch[key] for key in batch if key != column}
    return default_predict(model, batch)


def no_row_losses(outputs: Any, batch: Batch) -> Tensor:
    """Stand for the loss of a task that has a `total`.

    Raises:
        NoRowLosses: always.
    """
    del outputs, batch
    raise NoRowLosses


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
        total: In place of `loss`, where no value per row exists (dice, VICReg, a balance term over
            the batch, a weighted mean): `total(outputs, batch, weights) -> scalar`, the loss of one
            batch as a differentiable function of the weights `[slot]` of its samples. With ones it
            is the training's loss; a weight of 0 must leave the sample out. The influence of a slot
            is then that of its weight. No loss of single rows exists, so what needs one (`TracIn`,
            embeddings, `Loss` queries, renormalized denominators) is refused.
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
    loss: Callable[[Any, Batch], Tensor] = no_row_losses
    total: Callable[[Any, Batch, Tensor], Tensor] | None = field(default=None, kw_only=True)
    predict: Callable[[nn.Module, Batch], Any] = field(default=default_predict, kw_only=True)
    collate: Callable[[list[Any]], Batch] = field(default=default_collate, kw_only=True)
    penalty: Callable[[Tree], Tensor] | None = field(default=None, kw_only=True)
    reduce: Reduction = field(default="mean", kw_only=True)
    clip: ClipNorm | ClipValue | None = field(default=None, kw_only=True)
    draw: Draw | None = field(default=None, kw_only=True)
    ids: Ids | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the arguments; take the model out of `torch.compile`; hide a named column of ids.

        Raises:
            BadSetting: An argument has an invalid value; or there is both a `loss` and a `total`,
                or neither, or a `reduce` that `total` cannot have.
        """
        arguments.instance("model", self.model, nn.Module, "a torch.nn.Module")
        for name in ("loss", "predict", "collate"):
            arguments.function(name, getattr(self, name))
        for name in ("penalty", "draw", "total"):
            if getattr(self, name) is not None:
                arguments.function(name, getattr(self, name), "a function or None")
        if not callable(self.reduce):
            arguments.choice("reduce", self.reduce, ("mean", "sum"), "a function of the batches")
        if self.clip is not None and not isinstance(self.clip, (ClipNorm, ClipValue)):
            clips = "backtrail.ClipNorm(...), backtrail.ClipValue(...) or None"
            raise BadSetting("clip", self.clip, clips)
        is_place = isinstance(self.ids, str) or arguments.as_whole(self.ids) is not None
        if self.ids is not None and not is_place and not callable(self.ids):
            raise BadSetting("ids", self.ids, "a key, a place in a tuple, a function or None")
        if (self.loss is no_row_losses) == (self.total is None):
            raise BadSetting("loss", self.loss, "either Task(loss=...) or Task(total=...)")
        if self.total is not None and callable(self.reduce):
            raise BadSetting("reduce", self.reduce, "'mean' or 'sum' with Task(total=...)")
        object.__setattr__(self, "model", torch_compile.uncompiled(self.model))
        if isinstance(self.ids, str) and self.predict is default_predict:
            object.__setattr__(self, "predict", partial(_predict_without, self.ids))

    def __getstate__(self) -> dict[str, object]:
        """Pickle the arguments alone: the copy of the model is made again where it is needed."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def __repr__(self) -> str:
        """Model, size of the data and reduction in one line."""
        sized = isinstance(self.data, Sized)
        data = f"{len(self.data)} rows" if sized else type(self.data).__name__
        return f"Task({type(self.model).__name__}, {data}, reduce={self.reduce!r})"

    @cached_property
    @exclusive
    def binding(self) -> "_Binding":
        """The model's skeleton, ready to be called with tensors from outside; copied once."""
        return _Binding(skeleton(self.model))

    @cached_property
    def uses_checkpointing(self) -> bool:
        """Whether a call of the model may use activation checkpointing."""
        return uses_checkpointing(self.binding.model, self.predict)

    @cached_property
    def patched_modules(self) -> tuple[str, ...]:
        """Modules with a `forward` of their instance, which the skeleton may lack."""
        named = torch_compile.modules(self.model).items()
        return tuple(name or "the model" for name, module in named if "forward" in vars(module))

    @property
    def user_objects(self) -> tuple[object, ...]:
        """What a replay calls of the user's own code."""
        functions = (
            self.predict,
            self.loss,
            self.total,
            self.penalty,
            self.reduce,
            self.draw,
            self.collate,
        )
        return (*functions, self.ids, self.model, self.data)

    @cached_property
    def device(self) -> torch.device:
        """The device of the model when this was first read."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @cached_property
    def dtype(self) -> torch.dtype:
        """The precision of the model when this was first read: that of the training."""
        return precision_of(torch_compile.parameters(self.model))

    def fixed_noise(self, computed: torch.dtype) -> AbstractContextManager[Callable[[], None]]:
        """Draw the same random numbers at every reading of the model, whatever came before.

        Args:
            computed: precision of the reading.
        """
        return fixed_noise(self.device, self.dtype, computed)

    @cached_property
    @exclusive
    def needs_graph(self) -> bool:
        """Whether a forward pass differentiates by itself, and so fails under `torch.no_grad`.

        As in a loss with a derivative by the inputs. Found by a pass on the first row.
        """
        if not isinstance(self.data, Rows) or not len(self.data):
            return False
        params = self.parameters()
        batch = cast(self.batch([0]), None, self.device)
        try:
            with self.binding.in_modes(None), self.fixed_noise(self.dtype), torch.no_grad():
                self.losses(params, self.buffers(), batch)
        except RuntimeError as error:
            return "does not require grad" in str(error)
        except Exception:  # noqa: BLE001 - whatever it is, it is raised where a row is needed
            return False
        return False

    def without_graph(self) -> AbstractContextManager[object]:
        """Compute without a graph of the operations, unless the model needs one itself."""
        return torch.enable_grad() if self.needs_graph else torch.no_grad()

    def parameters(self) -> Tree:
        """The live model's parameters under unique names (shared, not copied, detached)."""
        refuse_shared_storage(self.model)
        return {name: p.detach() for name, p in torch_compile.parameters(self.model).items()}

    def buffers(self) -> Tree:
        """The live model's buffers under unique names (shared, not copied)."""
        return {name: b.detach() for name, b in torch_compile.buffers(self.model).items()}

    @property
    def running(self) -> tuple[str, ...]:
        """Names of the buffers that forward passes change: running statistics and the like.

        BatchNorm's are known from the model; other ones once a run was opened with this task.
        """
        return (*self.batchnorm_statistics, *sorted(self.binding.moving))

    @cached_property
    def batchnorm_statistics(self) -> tuple[str, ...]:
        """Names of BatchNorm's running statistics."""
        names: list[str] = []
        for layer in batchnorm_layers(self.model):
            prefix = f"{layer}." if layer else ""
            names += [prefix + key for key in STATISTICS]
        return tuple(names)

    def batch(self, samples: Sequence[int]) -> Batch:
        """Read rows from the data set and collate them, as a loader would."""
        if hasattr(self.data, "__getitems__"):
            return mapping_to_dict(self.collate(self.data.__getitems__(list(samples))))
        return mapping_to_dict(self.collate([self.data[int(i)] for i in samples]))

    def ids_of(self, batch: Batch) -> tuple[int, ...]:
        """Read the ids of a batch's samples from the batch.

        Raises:
            BadIds: it has none, or they are not one whole number for every row.
        """
        try:
            entry = self.ids(batch) if callable(self.ids) else batch[self.ids]
        except (KeyError, IndexError, TypeError) as error:
            raise BadIds(self.ids, _no_ids_in(batch, error)) from error
        try:
            ids = torch.as_tensor(entry)
        except (TypeError, ValueError, RuntimeError) as error:
            raise BadIds(self.ids, f"its ids are {_described(entry)}") from error
        is_whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        rows = size_of(batch)
        if not is_whole or ids.dim() != 1 or len(ids) != rows or bool((ids < 0).any()):
            some = ids.flatten()[:4].tolist()
            given = f"{ids.dtype} of shape {list(ids.shape)}, {some}..."
            raise BadIds(self.ids, f"the batch has {rows} rows, and its ids are {given}")
        return tuple(ids.tolist())

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

        def forward(model: nn.Module) -> tuple[Any, Tree]:
            outputs = self.predict(model, batch)
            # A module may also have assigned new tensors to its buffers.
            return outputs, dict(model.named_buffers(remove_duplicate=False))

        # A module may write to its buffers in place.
        copies = {name: tensor.clone() for name, tensor in buffers.items()}
        note_buffers(copies.values())
        with self.binding.statistics.collect() as statistics:
            outputs, assigned = self.bind(params, copies, forward)
        after = {name: assigned.get(name, copy) for name, copy in copies.items()}
        return outputs, after | statistics

    def losses_of(self, outputs: Any, batch: Batch) -> Float[Tensor, " slot"]:
        """Loss of every row of a batch.

        Raises:
            BadLoss: the loss is not a tensor with one axis.
            NoRowLosses: the task has a loss of the whole batch.
        """
        losses = self.loss(outputs, batch)
        if not isinstance(losses, Tensor):
            raise BadLoss(type(losses).__name__)
        if losses.dim() != 1:
            raise BadLoss(tuple(losses.shape))
        return losses

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

    def real_dtype(self, outputs: Any) -> torch.dtype:
        """Precision of the first floating-point tensor of the outputs."""
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                return leaf.dtype
        return torch.get_default_dtype()

    def total_of(self, outputs: Any, batch: Batch, weights: Float[Tensor, " slot"]) -> Tensor:
        """Loss of a whole batch, `[]`, as a function of its samples' weights.

        Raises:
            BadTotal: it is not a scalar.
        """
        if self.total is None:
            raise BadTotal("None")
        value = self.total(outputs, batch, weights)
        if not isinstance(value, Tensor):
            raise BadTotal(type(value).__name__)
        if value.dim() != 0:
            raise BadTotal(f"shape {list(value.shape)}")
        return value

    def shares(
        self, batches: Sequence[Batch], sizes: Sequence[int]
    ) -> list[Float[Tensor, " slot"]]:
        """The share c of every slot in a step's loss, for each micro-batch of the step.

        Args:
            batches: the micro-batches whose gradients the step consumed.
            sizes: their numbers of slots.

        Raises:
            BadReduction: the task's own reduction returns another number of shares.
        """
        total = sum(sizes)
        if self.total is not None:
            # One factor for the batch as a whole; `total` itself averages over its slots.
            factor = 1 / len(sizes) if self.reduce == "mean" else 1.0
            return [torch.full((n,), factor, dtype=torch.float64) for n in sizes]
        match self.reduce:
            case "mean":
                # The mean over the micro-batches of their means.
                of_each = [
                    torch.full((n,), 1 / (n * len(sizes)), dtype=torch.float64) for n in sizes
                ]
                c = torch.cat(of_each)
            case "sum":
                c = torch.ones(total, dtype=torch.float64)
            case function:
                c = torch.as_tensor(function(batches)).detach()
        if c.shape != (total,):
            raise BadReduction(tuple(c.shape), total)
        # Copies: a graph that keeps one micro-batch's shares must not keep those of all.
        return [part.clone() for part in torch.split(c, list(sizes))]


@final
class _Binding(nn.Module):
    """Calls functions of the skeleton: `functional_call` itself only calls a module's `forward`.

    Attributes:
        model: the skeleton.
        statistics: what its BatchNorm layers would have written.
        modules_by_name: all modules of the skeleton.
        one_by_one: rows of this model cannot be differentiated under `vmap`.
        moving: names of the buffers, other than BatchNorm's, that forward passes change.
        surrogates: calls of torch and Functions whose backward pass is not the derivative of their
            forward pass.
        left_torch: calls by which values that depend on the parameters left torch.
        no_second_derivative: what torch cannot differentiate twice in it; empty if it can.
        coupled: whether the rows of a selection depend on one another, for those looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.statistics = RunningStatistics(model)
        self.modules_by_name = dict(model.named_modules())
        self.one_by_one = False
        self.moving: set[str] = set()
        self.surrogates: tuple[str, ...] = ()
        self.left_torch: tuple[str, ...] = ()
        self.no_second_derivative = ""
        self.coupled: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        """Call the function on the skeleton, while its tensors are swapped."""
        return function(self.model)

    def note_calls(self, surrogates: Iterable[str], left_torch: Iterable[str]) -> None:
        """Note calls of a forward pass whose derivative is another one, or none."""
        self.surrogates = tuple(dict.fromkeys((*self.surrogates, *surrogates)))
        self.left_torch = tuple(dict.fromkeys((*self.left_torch, *left_torch)))

    def note_one_by_one(self, error: Exception) -> None:
        """Note that rows cannot be differentiated at once; the first time, log why."""
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


def _no_ids_in(batch: Batch, error: Exception) -> str:
    there = f"it has {list(batch)}" if hasattr(batch, "keys") else f"it is a {type(batch).__name__}"
    return f"the batch has no such entry ({error!r}); {there}"


def _described(entry: object) -> str:
    kinds = "things"
    if isinstance(entry, (list, tuple)):
        kinds = ", ".join(sorted({type(item).__name__ for item in entry}))
    return f"a {type(entry).__name__} of {kinds}"


def skeleton(model: nn.Module) -> nn.Module:
    """Copy the model's structure without its values: all tensors are on the meta device."""
    memo = {id(t): _without_values(t) for t in chain(model.parameters(), model.buffers())}
    copied = torch_compile.deepcopy_uncompiled(model, memo)
    detach_from_live(model, copied, memo)
    for module in copied.modules():
        _keep_activations(module)
        mark_activation(module)
    return copied


def _keep_activations(module: nn.Module) -> None:
    """Turn off Hugging Face's gradient checkpointing.

    It computes activations twice, to the same numbers, and `torch.func` refuses it.
    """
    if getattr(module, "gradient_checkpointing", False) is True:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
            del module._forward_hooks[key]


def _without_values(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, tensor.requires_grad)
    return empty


def refuse_shared_storage(model: nn.Module) -> None:
    """Refuse two different parameters on one storage.

    The optimizer updates such a storage twice a step, and a replay, which gives each parameter a
    tensor of its own, could not follow.

    Raises:
        SharedStorage: names both.
    """
    owner: dict[int, str] = {}
    for name, parameter in torch_compile.parameters(model).items():
        address = parameter.untyped_storage().data_ptr()
        if address and owner.setdefault(address, name) != name:
            raise SharedStorage(owner[address], name)


def size_of(batch: Batch) -> int:
    """Number of rows of a batch: the length of its first tensor with an axis.

    Raises:
        NoRows: It has no such tensor.
    """
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    raise NoRows(type(batch).__name__)


def select_rows(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of a batch, from every tensor in it that has an axis.

    Raises:
        NotCut: a tensor has another number of rows than the batch.
    """
    size = size_of(batch)

    def select(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        if len(leaf) != size:
            raise NotCut(tuple(leaf.shape), size)
        return leaf[rows]

    return tree_map(select, batch)


def logits_of(outputs: Any) -> Tensor:
    """The tensor of scores: what the model returns, or its entry `logits`."""
    logits: Tensor = outputs if isinstance(outputs, Tensor) else outputs["logits"]
    return logits


def labels_of(batch: Batch) -> Tensor:
    """The targets in a batch: its second item, or its entry `labels`."""
    labels: Tensor = batch["labels"] if isinstance(batch, Mapping) else batch[1]
    return labels


@contextmanager
def in_eval_mode(task: Task, computed: torch.dtype | None = None) -> Iterator[Callable[[], None]]:
    """All modules in eval mode, without gradients, and the attention kernel that `vmap` allows.

    Random numbers that the model draws are the same in every such block.

    Args:
        task: The model.
        computed: Precision of the readings, if it is not the training's.

    Yields:
        A function that sets the random generators to their state at the beginning of the block.
    """
    kernel = sdpa_kernel(SDPBackend.MATH)
    noise = task.fixed_noise(computed or task.dtype)
    with task.binding.in_modes(None), task.without_graph(), kernel, noise as reset_generators:
        yield reset_generators
