r"""Backward passes that are not the derivative of the forward pass.

Stop-gradients (`detach`, `no_grad`), straight-through estimators, gradient reversal and some
options of torch's own layers train with a *surrogate* gradient. With θ the parameters, a training
consumes :math:`g(\theta)`, which the backward pass defines. The influence of a sample needs the
derivative :math:`\partial g / \partial \theta` of that function. Differentiating the graph of g
once more does not give it: the surrogate would be used a second time, where the value that flowed
forwards depends on θ by its true derivative.

So a tensor that has two derivatives carries both. `with_surrogate(true, surrogate)` has the value
of both. While a gradient is computed (`surrogate_gradients`), cotangents go to the surrogate, as
in the training; whenever that gradient is differentiated, they go to the true function. In forward
mode the tangent is the true one.

`TrueDerivatives` finds the places: while it is entered, it sees every call of torch.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from inspect import signature
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from backtrail.accel.second_order import is_eager
from backtrail.tree import base_of, tree_leaves, tree_map

# Whether a gradient is computed as the training computed it. A global, not a ContextVar: on a GPU
# the backward pass runs in a thread of its own. Public entries hold a lock (`backtrail.exclusive`).
_as_trained = False
_active: ContextVar["TrueDerivatives | None"] = ContextVar("true_derivatives", default=None)


@contextmanager
def surrogate_gradients() -> Iterator[None]:
    """Let backward passes of the block take the surrogate route, as the training did."""
    global _as_trained  # noqa: PLW0603 - read in the backward pass, perhaps in another thread
    before = _as_trained
    _as_trained = True
    try:
        yield
    finally:
        _as_trained = before


@final
class _WithSurrogate(Function):
    """The value of `surrogate`, with two derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(true: Tensor, surrogate: Tensor) -> Tensor:
        """Return the value."""
        del true
        return surrogate.view_as(surrogate)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: both derivatives are the identity."""

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Pass the cotangent on to the one or to the other."""
        del ctx
        return (None, cotangent) if _as_trained else (cotangent, None)

    @staticmethod
    def jvp(ctx: Any, true: Tensor | None, surrogate: Tensor | None) -> Tensor | None:
        """Pass the true tangent on."""
        del ctx, surrogate
        return true


@final
class _Stopped(Function):
    """A tensor whose surrogate is a constant: what `detach` returns, with its true derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        """Return a view, as `detach` does."""
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: the derivative is the identity."""

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor | None:
        """Pass the cotangent on, unless a gradient is computed as in training."""
        del ctx
        return None if _as_trained else cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        """Pass the tangent on."""
        del ctx
        return tangent.view_as(tangent)


def with_surrogate(true: Tensor, surrogate: Tensor) -> Tensor:
    """A tensor with the value of `surrogate`, which gradients are made of, and a true derivative.

    Args:
        true: the function itself, of the same value; a constant where its derivative is zero.
        surrogate: what the training's backward pass differentiates.
    """
    found: Tensor = _WithSurrogate.apply(true, surrogate)  # type: ignore[no-untyped-call]
    return found


def _is_differentiable(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.is_floating_point()


def _stopped(value: Any) -> Any:
    if not _is_differentiable(value):
        return value
    return _Stopped.apply(value)  # type: ignore[no-untyped-call]


def note_buffers(tensors: Iterable[Tensor]) -> None:
    """Note the buffers that the model is about to be called with, if a mode is entered."""
    mode = _active.get()
    if mode is not None:
        mode.note_buffers(tensors)


@final
class TrueDerivatives(TorchFunctionMode):
    """While entered, the graph that is recorded has the true derivative beside the surrogate.

    Attributes:
        cuts: names of the calls that have a surrogate, in order of their first occurrence.
    """

    def __init__(self) -> None:
        super().__init__()
        # Tensors by id, kept so that ids stay unique: the model's buffers, and what was computed
        # under no_grad from stopped tensors.
        self._buffers: dict[int, Tensor] = {}
        self._made_here: dict[int, Tensor] = {}
        self._saved: dict[int, list[_Saved]] = {}
        self._left_torch = False
        self._paused = False
        self.cuts: dict[str, None] = {}

    def __enter__(self) -> "TrueDerivatives":
        """Enter the mode."""
        _replace_apply()
        self._token = _active.set(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave the mode."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _active.reset(self._token)
        _restore_apply()

    def note_buffers(self, tensors: Iterable[Tensor]) -> None:
        """Note the model's buffers, which a forward pass may write to in place.

        They are not stopped: what is written to them is, and queries and later steps read it.
        """
        self._buffers.update((id(tensor), tensor) for tensor in tensors)

    def saving(self) -> saved_tensors_hooks:
        """While the context runs, what graphs keep may be written to later: it is copied first.

        A training under no_grad keeps nothing, and may write where it likes. Outside of no_grad
        this is needed only where the forward pass writes to buffers that it has read.
        """
        return saved_tensors_hooks(self._save, _Saved.value_of)

    def _save(self, tensor: Tensor) -> "_Saved":
        saved = _Saved(tensor)
        self._saved.setdefault(tensor.untyped_storage().data_ptr(), []).append(saved)
        return saved

    def _copy_saved(self, written: Tensor) -> None:
        """Copy what graphs keep of a tensor's memory, before it is written to."""
        if not self._saved:
            return
        for saved in self._saved.pop(written.untyped_storage().data_ptr(), []):
            saved.tensor = saved.tensor.clone()

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        kwargs = kwargs or {}
        if self._paused:
            return function(*args, **kwargs)
        if function in LEAVE_TORCH:
            self._left_torch = True
            # The user's code has detached it, and here it has a graph all the same.
            return function(args[0].detach(), *args[1:], **kwargs)
        if function in STOPS:
            return self._stop(function, args, kwargs)
        if torch.is_grad_enabled():
            return self._call(function, args, kwargs)
        return self._without_grad(function, args, kwargs)

    def _call(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Call a function, or what replaces it, while a graph is recorded."""
        replacement = REPLACED.get(function)
        if replacement is not None:
            found = replacement(*args, **kwargs)
            if found is not NotImplemented:
                if any(_is_differentiable(leaf) for leaf in tree_leaves((args, kwargs))):
                    self.cuts[getattr(function, "__name__", str(function))] = None
                return found
        return function(*args, **kwargs)

    def _stop(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Run `detach` or read `.data`."""
        tensor = args[0]
        if not _is_differentiable(tensor):
            return function(*args, **kwargs)
        with self._recording():
            if self._is_kept(tensor):
                return tensor.view_as(tensor)
            self.cuts["detach"] = None
            return _stopped(tensor)

    def _without_grad(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Run a function under no_grad or in inference mode, with a graph from stopped inputs."""
        if function in UNRECORDED or not any(
            _is_differentiable(leaf) for leaf in tree_leaves((args, kwargs))
        ):
            return function(*args, **kwargs)
        out = kwargs.pop("out", None)
        target = _written_tensor(function, args)

        def stop(leaf: Any) -> Any:
            if not _is_differentiable(leaf) or self._is_kept(leaf) or leaf is target:
                return leaf
            self.cuts["no_grad"] = None
            return _stopped(leaf)

        with self._recording():
            args, kwargs = tree_map(stop, (args, kwargs))
            if isinstance(target, Tensor):
                self._copy_saved(target)
            found = self._call(function, args, kwargs)
            if out is not None:
                # Functions with `out=` have no derivative.
                for into in tree_leaves(out):
                    self._copy_saved(into)
                return tree_map(Tensor.copy_, out, found)
        for leaf in tree_leaves(found):
            if _is_differentiable(leaf):
                self._made_here[id(leaf)] = leaf
        return found

    def _is_kept(self, tensor: Tensor) -> bool:
        """Whether nothing is to be stopped in a tensor: a buffer, or made from stopped ones."""
        base = base_of(tensor)
        return (
            id(tensor) in self._made_here
            or id(tensor) in self._buffers
            or (base is not None and id(base) in self._buffers)
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let torch alone, e.g. in the forward of a Function, whose graph is its backward."""
        before = self._paused
        self._paused = True
        try:
            yield
        finally:
            self._paused = before

    def apply(self, function: Any, args: Any) -> Any:
        """Apply a `torch.autograd.Function`: its backward is the surrogate of its forward."""
        if not torch.is_grad_enabled():
            # Without a gradient its forward is called, and nothing else.
            with self._recording():
                stopped = tree_map(
                    lambda leaf: leaf if self._is_kept_tensor(leaf) else _stopped(leaf), args
                )
                found = self._forward_of(function, stopped)
            return _own_apply(function, *args) if found is NotImplemented else found
        generator = torch.get_rng_state()
        with self.paused():
            surrogate = _own_apply(function, *args)
        with torch.random.fork_rng([]):
            torch.set_rng_state(generator)
            true = self._forward_of(function, args)
        with self.paused():
            agrees = true is not NotImplemented and _same_values(true, surrogate)
        if not agrees:
            return surrogate
        self.cuts[function.__name__] = None

        def join(of_true: Any, of_surrogate: Any) -> Any:
            if not _is_differentiable(of_surrogate):
                return of_surrogate
            return with_surrogate(of_true, of_surrogate)

        return tree_map(join, true, surrogate)

    def _forward_of(self, function: Any, args: Any) -> Any:
        """A Function's forward as plain operations; NotImplemented if it is not made of those."""
        context = _Context(args)
        has_setup = function.setup_context is not Function.setup_context
        before = self._left_torch
        self._left_torch = False
        try:
            with torch.enable_grad():
                found = function.forward(*args) if has_setup else function.forward(context, *args)
        except Exception:  # noqa: BLE001 - whatever it is, it is a Function that needs its context
            return NotImplemented
        finally:
            left_torch = self._left_torch
            self._left_torch = before
        return NotImplemented if left_torch or context.writes_inputs else found

    def _is_kept_tensor(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and self._is_kept(leaf)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        with ExitStack() as stack:
            if is_eager():  # torch.func refuses such hooks
                stack.enter_context(self.saving())
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(mode=False))
            stack.enter_context(torch.enable_grad())
            yield


@final
class _Saved:
    """A tensor that a graph keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def value_of(self) -> Tensor:
        """The tensor as it was when it was saved."""
        return self.tensor


@final
class _Context:
    """Stands for the `ctx` of a Function's forward that is called as a plain function."""

    def __init__(self, args: Any) -> None:
        self.needs_input_grad = tuple(_is_differentiable(arg) for arg in args)
        self.writes_inputs = False

    def save_for_backward(self, *tensors: Any) -> None:
        """Keep nothing: autograd does."""

    save_for_forward = save_for_backward
    mark_non_differentiable = save_for_backward

    def set_materialize_grads(self, value: object) -> None:
        """Change nothing."""

    def mark_dirty(self, *tensors: Any) -> None:
        """Note that the function writes to its inputs, so it cannot be called twice."""
        del tensors
        self.writes_inputs = True


def _same_values(left: Any, right: Any) -> bool:
    """Whether both hold tensors of the same shapes and values."""
    left_leaves = tree_leaves(left)
    right_leaves = tree_leaves(right)
    if len(left_leaves) != len(right_leaves):
        return False
    for one, other in zip(left_leaves, right_leaves, strict=True):
        if isinstance(one, Tensor) != isinstance(other, Tensor):
            return False
        if isinstance(one, Tensor):
            with torch.no_grad():
                if one.shape != other.shape or not torch.allclose(
                    one.to(other), other, equal_nan=True
                ):
                    return False
    return True


_own_apply = Function.apply.__func__  # type: ignore[attr-defined]
_lock = threading.Lock()
_entered = 0  # modes, in all threads


def _replace_apply() -> None:
    """Let Functions of the user's be seen; torch calls no mode for them."""
    global _entered  # noqa: PLW0603 - torch.autograd.Function is the process's
    with _lock:
        if _entered == 0:
            Function.apply = classmethod(_apply)  # type: ignore[method-assign, assignment]
        _entered += 1


def _restore_apply() -> None:
    global _entered  # noqa: PLW0603 - torch.autograd.Function is the process's
    with _lock:
        _entered -= 1
        if _entered == 0:
            Function.apply = classmethod(_own_apply)  # type: ignore[method-assign, assignment]


def _apply(function: Any, *args: Any, **kwargs: Any) -> Any:
    """In the place of `torch.autograd.Function.apply`; other threads get torch's own."""
    mode = _active.get()
    is_own = function.__module__.partition(".")[0] in {"torch", "backtrail"}
    if mode is None:
        return _own_apply(function, *args, **kwargs)
    if is_own or kwargs:
        with mode.paused():
            return _own_apply(function, *args, **kwargs)
    return mode.apply(function, args)


def _written_tensor(function: Any, args: Any) -> Any:
    """The tensor that a function writes to in place; None if it does not."""
    name = getattr(function, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    writes = in_place or name in {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}
    return args[0] if writes and args else None


def _with_all_arguments(
    function: Callable[..., Any], replacement: Callable[..., Any]
) -> Callable[..., Any]:
    """Call the replacement with the function's arguments by name, also those left out."""
    described = signature(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = described.bind(*args, **kwargs)
        bound.apply_defaults()
        return replacement(**bound.arguments)

    return call


def _embedding(
    *,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None,
    max_norm: float | None,
    scale_grad_by_freq: bool,
    **settings: Any,
) -> Any:
    """An embedding: the padding row gets no gradient, and gradients may be scaled by frequency.

    The padding row is read all the same; where it is another layer's weight as well, it is trained.
    """
    if max_norm is not None or (padding_idx is None and not scale_grad_by_freq):
        return NotImplemented
    true = functional.embedding(input, weight)
    surrogate = functional.embedding(input, weight, padding_idx, **settings)
    if scale_grad_by_freq:
        # torch scales the gradient, and forgets the scale in the derivative of the gradient.
        _, place, counts = torch.unique(input, return_inverse=True, return_counts=True)
        scale = (1 / counts[place]).unsqueeze(-1).to(surrogate.dtype)
        surrogate = surrogate * scale + (1 - scale) * surrogate.detach()
    return with_surrogate(true, surrogate)


def _gumbel_softmax(*, logits: Tensor, hard: bool, **settings: Any) -> Any:
    """A sample of one-hot vectors, trained with the gradient of the soft ones."""
    if not hard:
        return NotImplemented
    surrogate = functional.gumbel_softmax(logits, hard=True, **settings)
    return with_surrogate(surrogate.detach(), surrogate)


def _quantised(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A rounding, trained as if it were the identity."""

    def quantise(*args: Any, **kwargs: Any) -> Tensor:
        surrogate = function(*args, **kwargs)
        return with_surrogate(surrogate.detach(), surrogate)

    return quantise


def _hardsigmoid(*, input: Tensor, **settings: Any) -> Tensor:
    """Hardsigmoid by plain operations: torch's own has no second derivative."""
    del settings
    return functional.relu6(input + 3) / 6


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: object = None) -> Tensor:
    """Distances of all pairs by plain operations: torch's own have no second derivative."""
    del compute_mode
    distances: Tensor = torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1)
    return distances


def _embedding_bag(
    *,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None,
    max_norm: float | None,
    scale_grad_by_freq: bool,
    mode: str,
    sparse: bool,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
    **settings: Any,
) -> Any:
    """Bags of embeddings by plain operations: torch's own have no second derivative."""
    del sparse, settings
    if max_norm is not None or scale_grad_by_freq:
        return NotImplemented
    if input.dim() == 2:
        bags = len(input)
        bag = torch.arange(bags, device=input.device).repeat_interleave(input.shape[1])
        flat = input.reshape(-1)
    else:
        assert offsets is not None
        starts = offsets[:-1] if include_last_offset else offsets
        bags = len(starts)
        flat = input[: int(offsets[-1])] if include_last_offset else input
        places = torch.arange(len(flat), device=input.device)
        bag = torch.bucketize(places, starts, right=True) - 1
    vectors = functional.embedding(flat, weight)
    if per_sample_weights is not None:
        vectors = vectors * per_sample_weights.reshape(-1, 1)
    if padding_idx is not None:
        kept = flat != padding_idx % len(weight)
        vectors, bag = vectors[kept], bag[kept]
    index = bag.unsqueeze(1).expand_as(vectors)
    shape = (bags, weight.shape[1])
    if mode == "max":
        largest = vectors.new_zeros(shape)
        most: Tensor = largest.scatter_reduce(0, index, vectors, "amax", include_self=False)
        return most
    total = vectors.new_zeros(shape).scatter_add(0, index, vectors)
    if mode == "sum":
        return total
    count = torch.bincount(bag, minlength=bags).clamp(min=1)
    return total / count.unsqueeze(1).to(total.dtype)


def _multi_margin_loss(
    *,
    input: Tensor,
    target: Tensor,
    p: int,
    margin: float,
    weight: Tensor | None,
    reduction: str,
    **settings: Any,
) -> Tensor:
    """Multi-class hinge loss by plain operations: torch's own has no second derivative."""
    del settings
    scores = input.reshape(-1, input.shape[-1])
    labels = target.reshape(-1, 1)
    excess = (margin - scores.gather(1, labels) + scores).clamp(min=0) ** p
    if weight is not None:
        excess = excess * weight[labels]
    others = torch.ones_like(excess).scatter(1, labels, 0.0)
    losses = (excess * others).sum(1) / scores.shape[1]
    return _reduced(losses if input.dim() == 2 else losses.squeeze(0), reduction)


def _multilabel_margin_loss(
    *, input: Tensor, target: Tensor, reduction: str, **settings: Any
) -> Tensor:
    """Multi-label hinge loss by plain operations: torch's own has no second derivative."""
    del settings
    scores = input.reshape(-1, input.shape[-1])
    labels = target.reshape(-1, input.shape[-1])
    # The labels of a row end at the first negative one.
    valid = (labels >= 0).cumprod(1).bool()
    chosen = labels.clamp(min=0)
    is_label = torch.zeros_like(scores).scatter_reduce(1, chosen, valid.to(scores.dtype), "amax")
    excess = (1 - scores.gather(1, chosen).unsqueeze(2) + scores.unsqueeze(1)).clamp(min=0)
    counted = valid.unsqueeze(2) * (1 - is_label).unsqueeze(1)
    losses = (excess * counted).sum((1, 2)) / scores.shape[1]
    return _reduced(losses if input.dim() == 2 else losses.squeeze(0), reduction)


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    match reduction:
        case "mean":
            return losses.mean()
        case "sum":
            return losses.sum()
        case _:
            return losses


def _normal(mean: Any, std: Any = 1.0, *args: Any, **kwargs: Any) -> Any:
    """Normal noise with a mean or a deviation that is a tensor: torch's gradient of it is zero."""
    is_tensor = isinstance(mean, Tensor) or isinstance(std, Tensor)
    if args or "out" in kwargs or not is_tensor:
        return NotImplemented
    with torch.no_grad():
        drawn = torch.normal(mean, std, **kwargs)
        noise = (drawn - mean) / std
        noise = torch.nan_to_num(noise)  # a deviation of zero
    return with_surrogate(mean + std * noise, drawn)


def _normalised_weight(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Weight normalisation by plain operations: torch's own second derivative is wrong (2.13)."""
    if dim == -1:
        norm = v.square().sum().sqrt()
    else:
        axes = [axis for axis in range(v.dim()) if axis != dim % v.dim()]
        norm = v.square().sum(axes, keepdim=True).sqrt() if axes else v.abs()
    return v * (g / norm)


def _normalised_weight_and_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    weight = _normalised_weight(v, g, dim)
    axes = [axis for axis in range(v.dim()) if axis != dim % v.dim()]
    return weight, v.square().sum(axes, keepdim=True).sqrt()


def _batch_norm(
    *,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """Batch normalisation with running statistics, which torch does not differentiate."""
    if running_mean is None or running_var is None:
        return NotImplemented
    if not training:
        return _normalise(
            input, mean=running_mean, variance=running_var, weight=weight, bias=bias, eps=eps
        )
    axes = [axis for axis in range(input.dim()) if axis != 1]
    _update(running_mean, input.mean(axes), momentum)
    _update(running_var, input.var(axes), momentum)
    return functional.batch_norm(
        input, None, None, weight, bias, training=True, momentum=momentum, eps=eps
    )


def _instance_norm(
    *,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
) -> Any:
    """Instance normalisation with running statistics, which torch does not differentiate."""
    if running_mean is None or running_var is None:
        return NotImplemented
    if not use_input_stats:
        return _normalise(
            input, mean=running_mean, variance=running_var, weight=weight, bias=bias, eps=eps
        )
    axes = list(range(2, input.dim()))
    # Each instance has statistics of its own, and their mean over the batch is kept.
    _update(running_mean, input.mean(axes).mean(0), momentum)
    _update(running_var, input.var(axes).mean(0), momentum)
    return functional.instance_norm(
        input, None, None, weight, bias, use_input_stats=True, momentum=momentum, eps=eps
    )


def _update(running: Tensor, found: Tensor, momentum: float) -> None:
    """Move a running statistic. In training it has no gradient."""
    running.copy_((1 - momentum) * running + momentum * _stopped(found).to(running.dtype))


def _normalise(
    inputs: Tensor,
    *,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    by_channel = [1, -1] + [1] * (inputs.dim() - 2)
    return inputs * scale.view(by_channel) + shift.view(by_channel)


def _getter(kind: type, name: str) -> Any:
    """The function that modes see when an attribute is read."""
    return getattr(kind, name).__get__


STOPS = frozenset({Tensor.detach, torch.detach, _getter(Tensor, "data")})
# What a function does with what these return is not seen.
LEAVE_TORCH = frozenset(
    {Tensor.numpy, Tensor.__array__, Tensor.__float__, Tensor.tolist, Tensor.item}
)
# Under no_grad these return no value that a loss could depend on smoothly, or set what must be set.
UNRECORDED = frozenset({_getter(Tensor, "requires_grad"), _getter(Tensor, "grad"), Tensor.size})
# Functions of torch whose backward pass, or second derivative, is not the true one. A replacement
# returns NotImplemented where its arguments make it a plain function.
REPLACED: dict[Any, Callable[..., Any]] = {
    functional.embedding: _with_all_arguments(functional.embedding, _embedding),
    functional.gumbel_softmax: _with_all_arguments(functional.gumbel_softmax, _gumbel_softmax),
    functional.batch_norm: _with_all_arguments(functional.batch_norm, _batch_norm),
    functional.instance_norm: _with_all_arguments(functional.instance_norm, _instance_norm),
    functional.hardsigmoid: _with_all_arguments(functional.hardsigmoid, _hardsigmoid),
    functional.embedding_bag: _with_all_arguments(functional.embedding_bag, _embedding_bag),
    functional.multi_margin_loss: _with_all_arguments(
        functional.multi_margin_loss, _multi_margin_loss
    ),
    functional.multilabel_margin_loss: _with_all_arguments(
        functional.multilabel_margin_loss, _multilabel_margin_loss
    ),
    torch.cdist: _cdist,
    torch.normal: _normal,
    torch.fake_quantize_per_tensor_affine: _quantised(torch.fake_quantize_per_tensor_affine),
    torch.fake_quantize_per_channel_affine: _quantised(torch.fake_quantize_per_channel_affine),
    torch._weight_norm: _normalised_weight,
    torch._weight_norm_interface: _normalised_weight_and_norm,
}
