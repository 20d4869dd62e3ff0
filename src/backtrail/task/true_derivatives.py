"""Finds the places where a training's backward pass is not the derivative of its forward pass.

While `TrueDerivatives` is entered, it sees every call of torch. Stop-gradients, calls under
`no_grad`, functions of `backtrail.task.replaced` and autograd Functions of the user's get a true
derivative beside the one that the training uses (`backtrail.task.surrogate`).
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from backtrail.accel.second_order import is_eager
from backtrail.task.replaced import REPLACED
from backtrail.task.replacement import Replacement
from backtrail.task.surrogate import is_differentiable, stopped, with_surrogate
from backtrail.tree import base_of, tree_leaves, tree_map

_active: ContextVar["TrueDerivatives | None"] = ContextVar("true_derivatives", default=None)


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
        left: names of the calls by which values with a derivative left torch.
        once: names of the Functions whose backward passes cannot be differentiated.
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
        self.left: dict[str, None] = {}
        self.once: dict[str, None] = {}

    def __enter__(self) -> "TrueDerivatives":
        """Enter the mode."""
        _APPLY.begin()
        self._token = _active.set(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave the mode."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _active.reset(self._token)
        _APPLY.end()

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
            if is_differentiable(args[0]):
                self.left[_name(function)] = None
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
                if any(is_differentiable(leaf) for leaf in tree_leaves((args, kwargs))):
                    self.cuts[_name(function)] = None
                return found
        return function(*args, **kwargs)

    def _stop(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Run `detach` or read `.data`."""
        tensor = args[0]
        if not is_differentiable(tensor):
            return function(*args, **kwargs)
        with self._recording():
            if self._is_kept(tensor):
                return tensor.view_as(tensor)
            self.cuts["detach"] = None
            return stopped(tensor)

    def _without_grad(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Run a function under no_grad or in inference mode, with a graph from stopped inputs."""
        if function in UNRECORDED or not any(
            is_differentiable(leaf) for leaf in tree_leaves((args, kwargs))
        ):
            return function(*args, **kwargs)
        out = kwargs.pop("out", None)
        target = _written_tensor(function, args)

        def stop(leaf: Any) -> Any:
            if not is_differentiable(leaf) or self._is_kept(leaf) or leaf is target:
                return leaf
            self.cuts["no_grad"] = None
            return stopped(leaf)

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
            if is_differentiable(leaf):
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
                    lambda leaf: leaf if self._is_kept_tensor(leaf) else stopped(leaf), args
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
            if _is_once_differentiable(function):
                self.once[function.__name__] = None
            return surrogate
        self.cuts[function.__name__] = None

        def join(of_true: Any, of_surrogate: Any) -> Any:
            if not is_differentiable(of_surrogate):
                return of_surrogate
            return with_surrogate(of_true, of_surrogate)

        return tree_map(join, true, surrogate)

    def _forward_of(self, function: Any, args: Any) -> Any:
        """A Function's forward as plain operations; NotImplemented if it is not made of those."""
        context = _Context(args)
        has_setup = function.setup_context is not Function.setup_context
        before = self._left_torch
        left_before = dict(self.left)
        self._left_torch = False
        try:
            with torch.enable_grad():
                found = function.forward(*args) if has_setup else function.forward(context, *args)
        except Exception:  # noqa: BLE001 - whatever it is, it is a Function that needs its context
            return NotImplemented
        finally:
            left_torch = self._left_torch
            self._left_torch = before
            # Of a Function, its backward says what the derivative is.
            self.left = left_before
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
        self.needs_input_grad = tuple(is_differentiable(arg) for arg in args)
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


def _own_apply(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the apply of torch for a class derived from Function."""
    return _APPLY.originals["apply"].__get__(None, function)(*args, **kwargs)


def _apply(function: Any, *args: Any, **kwargs: Any) -> Any:
    """In the place of `torch.autograd.Function.apply`; other threads get torch's own."""
    mode = _active.get()
    is_own = function.__module__.partition(".")[0] in {"torch", "backtrail"}
    if mode is None:
        return _own_apply(function, *args, **kwargs)
    if is_own or kwargs:
        if _is_once_differentiable(function) and torch.is_grad_enabled():
            mode.once[function.__name__] = None
        with mode.paused():
            return _own_apply(function, *args, **kwargs)
    return mode.apply(function, args)


# So that Functions of the user's are seen, for which torch calls no mode. The original is a method
# in Python up to torch 2.13, and one in C since 2.14.
_APPLY = Replacement(Function, {"apply": classmethod(_apply)})


def _is_once_differentiable(function: Any) -> bool:
    """Whether torch takes a second derivative of a Function's backward pass to be zero.

    `once_differentiable` promises an error. It is raised only where a second backward pass goes to
    all leaves, not by `torch.autograd.grad` with the inputs that are asked for.
    """
    backward = getattr(function.backward, "__code__", None)
    return backward is _ONCE_DIFFERENTIABLE


@once_differentiable
def _example(ctx: Any) -> None:
    """Have the code that `once_differentiable` gives every backward pass."""


_ONCE_DIFFERENTIABLE = _example.__code__


def _name(function: Any) -> str:
    return getattr(function, "__name__", str(function))


def _written_tensor(function: Any, args: Any) -> Any:
    """The tensor that a function writes to in place; None if it does not."""
    name = getattr(function, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    writes = in_place or name in {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}
    return args[0] if writes and args else None
