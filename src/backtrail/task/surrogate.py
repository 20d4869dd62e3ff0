r"""Backward passes that are not the derivative of the forward pass.

Stop-gradients (`detach`, `no_grad`), straight-through estimators, gradient reversal and some options
of torch's own layers train with a *surrogate* gradient. With θ the parameters, a training consumes
:math:`g(\theta)`, which the backward pass defines. The influence of a sample needs the derivative
:math:`\partial g / \partial \theta` of that function. Differentiating the graph of g once more
does not give it: the surrogate would be used a second time, where the value that flowed forwards
depends on θ by its true derivative.

So a tensor that has two derivatives carries both. `with_surrogate(true, surrogate)` has the value of
both. While a gradient is computed (`surrogate_gradients`), cotangents go to the surrogate, as in
the training; whenever that gradient is differentiated, they go to the true function. In forward
mode the tangent is the true one.

`TrueDerivatives` finds the places: while it is entered, it sees every call of torch.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from inspect import signature
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from backtrail.tree import tree_leaves, tree_map

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
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        """Pass the cotangent on to the one or to the other."""
        del ctx
        return (None, cotangent) if _as_trained else (cotangent, None)

    @staticmethod
    def jvp(ctx: Any, true: Tensor | None, surrogate: Tensor | None) -> Tensor | None:  # type: ignore[override]
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
    def backward(ctx: Any, cotangent: Tensor) -> Tensor | None:  # type: ignore[override]
        """Pass the cotangent on, unless a gradient is computed as in training."""
        del ctx
        return None if _as_trained else cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        """Pass the tangent on."""
        del ctx
        return tangent.view_as(tangent)


def with_surrogate(true: Tensor, surrogate: Tensor) -> Tensor:
    """A tensor with the value of `surrogate`, which gradients are made of, and a true derivative.

    Args:
        true: the function itself, of the same value; a constant where its derivative is zero.
        surrogate: what the training's backward pass differentiates.
    """
    found: Tensor = _WithSurrogate.apply(true, surrogate)
    return found


def _is_differentiable(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.is_floating_point()


def _stopped(value: Any) -> Any:
    return _Stopped.apply(value) if _is_differentiable(value) else value


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
        self.cuts: dict[str, None] = {}

    def __enter__(self) -> "TrueDerivatives":
        """Enter the mode."""
        self._token = _active.set(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave the mode."""
        super().__exit__(*error)
        _active.reset(self._token)

    def note_buffers(self, tensors: Iterable[Tensor]) -> None:
        """Note the model's buffers, which a forward pass may write to in place.

        They are not stopped: what is written to them is, and queries and later steps read it.
        """
        self._buffers.update((id(tensor), tensor) for tensor in tensors)

    def is_buffer(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the memory of a noted buffer."""
        address = tensor.untyped_storage().data_ptr()
        return any(
            buffer.untyped_storage().data_ptr() == address for buffer in self._buffers.values()
        )

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        kwargs = kwargs or {}
        replacement = REPLACED.get(function)
        if replacement is not None:
            found = replacement(*args, **kwargs)
            if found is not NotImplemented:
                self._note(function, args)
                return found
        if function in STOPS:
            return self._stop(function, args, kwargs)
        if torch.is_grad_enabled():
            return function(*args, **kwargs)
        return self._without_grad(function, args, kwargs)

    def _note(self, function: Any, args: Any) -> None:
        if any(_is_differentiable(leaf) for leaf in tree_leaves(args)):
            self.cuts[getattr(function, "__qualname__", None) or str(function)] = None

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
            found = function(*args, **kwargs)
            if out is not None:
                # Functions with `out=` have no derivative.
                return tree_map(Tensor.copy_, out, found)
        for leaf in tree_leaves(found):
            if _is_differentiable(leaf):
                self._made_here[id(leaf)] = leaf
        return found

    def _is_kept(self, tensor: Tensor) -> bool:
        """Whether a tensor's graph has no surrogate to stop: a buffer, or made from stopped ones."""
        base = tensor if tensor._base is None else tensor._base
        return (
            id(tensor) in self._made_here
            or id(tensor) in self._buffers
            or id(base) in self._buffers
        )

    @contextmanager
    def _recording(self) -> Iterator[None]:
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(mode=False))
            stack.enter_context(torch.enable_grad())
            yield


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
    surrogate = functional.embedding(
        input, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq, **settings
    )
    return with_surrogate(functional.embedding(input, weight), surrogate)


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


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Weight normalisation by plain operations: torch's own second derivative is wrong (2.13)."""
    if dim == -1:
        norm = v.square().sum().sqrt()
    else:
        axes = [axis for axis in range(v.dim()) if axis != dim % v.dim()]
        norm = v.square().sum(axes, keepdim=True).sqrt() if axes else v.abs()
    return v * (g / norm)


def _weight_norm_interface(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    weight = _weight_norm(v, g, dim)
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


STOPS = frozenset({Tensor.detach, torch.detach, Tensor.data.__get__})
# Under no_grad these return no value that a loss could depend on smoothly, or set what must be set.
UNRECORDED = frozenset({Tensor.requires_grad.__get__, Tensor.grad.__get__, Tensor.size})
# Functions of torch whose backward pass, or second derivative, is not the true one. Each replacement
# returns NotImplemented where its arguments make it a plain function.
REPLACED: dict[Any, Callable[..., Any]] = {
    functional.embedding: _with_all_arguments(functional.embedding, _embedding),
    functional.gumbel_softmax: _with_all_arguments(functional.gumbel_softmax, _gumbel_softmax),
    functional.batch_norm: _with_all_arguments(functional.batch_norm, _batch_norm),
    functional.instance_norm: _with_all_arguments(functional.instance_norm, _instance_norm),
    torch.normal: _normal,
    torch.fake_quantize_per_tensor_affine: _quantised(torch.fake_quantize_per_tensor_affine),
    torch.fake_quantize_per_channel_affine: _quantised(torch.fake_quantize_per_channel_affine),
    torch._weight_norm: _weight_norm,
    torch._weight_norm_interface: _weight_norm_interface,
}
