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

`backtrail.task.true_derivatives` finds the places.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

from torch import Tensor
from torch.autograd import Function

# Whether a gradient is computed as the training computed it. A global, not a ContextVar: on a GPU
# the backward pass runs in a thread of its own. Public entries hold a lock (`backtrail.exclusive`).
_as_trained = False


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


def is_differentiable(value: object) -> bool:
    """Whether a value is a tensor that a gradient may flow through."""
    return isinstance(value, Tensor) and value.requires_grad and value.is_floating_point()


def stopped(value: Any) -> Any:
    """What `detach` returns, with its true derivative; other values as they are."""
    if not is_differentiable(value):
        return value
    return _Stopped.apply(value)  # type: ignore[no-untyped-call]
