"""Traces a forward pass: which operations use which parameters.

Decisions: operations are traced, not modules, so a weight that is tied, used twice, or used without
its module is seen wherever it is used. What is recorded is a guess (which axis has the slots,
whether a use went unseen), which `check.py` verifies numerically.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from backtrail.persample.attention import attend, is_written_out
from backtrail.persample.rules import (
    BroadcastRule,
    Layout,
    LookupRule,
    MatmulRule,
    PerSampleRule,
    ScaleRule,
    ToSlots,
    by_slot,
    channels_last,
    layout_of,
    patches,
    sum_to_shape,
)
from backtrail.tree import Tree, base_of, tree_leaves

Call = dict[str, Any]  # arguments of an operation, by name
# A tensor made of parameters alone, and the names of these parameters.
Derived = tuple[Tensor, frozenset[str]]


class OpTracer(TorchFunctionMode):
    """Records, while it is active, how a forward pass uses the parameters.

    Args:
        leaves: The parameters, by name.
        slots: Number of samples in the batch.
        batch: What the model is called on; indices into tables that come from it differ from
            sample to sample.
        observing: The pass belongs to a training loop, so its values must not change: batch
            statistics do not become constants. And what is made of parameters alone is computed
            once more, in a graph that the loop's backward pass does not free.

    Attributes:
        uses: The uses of parameters, in order.
        froze_statistics: Whether batch statistics were taken as constants.
    """

    def __init__(self, leaves: Tree, slots: int, batch: Any, *, observing: bool = False) -> None:
        TorchFunctionMode.__init__(self)
        self.uses: list[PerSampleRule] = []
        self.froze_statistics = False
        self._observing = observing
        self._slots = slots
        self._in_attention = False
        # A function, not a method: a use that referred to the tracer would close a cycle, and a
        # pass's memory would wait for the garbage collector.
        self._by_channel = partial(_by_channel, slots=slots)
        self._leaves = leaves
        self._names = {id(leaf): name for name, leaf in leaves.items()}
        self._derived: dict[int, Derived] = {}  # by id of the tensor
        # The same tensors in a graph of our own, by id of the loop's.
        self._twins: dict[int, Tensor] = {}
        for name, leaf in leaves.items():
            self._derived[id(leaf)] = leaf, frozenset({name})
            if observing:
                self._twins[id(leaf)] = leaf.detach().requires_grad_()
        # Tensors of the batch, and integers computed from them, by id.
        self._from_batch: dict[int, Tensor] = {}
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Tensor):
                self._from_batch[id(leaf)] = leaf

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and record how it uses parameters."""
        del types
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "batch_norm":
            return self._run_batch_norm(func, args, kwargs)
        if name == "multi_head_attention_forward":
            return self._run_attention(func, args, kwargs)
        tensors = _tensors_of(args, kwargs)
        if not any(id(tensor) in self._derived for tensor in tensors):
            found = func(*args, **kwargs)
            self._note_from_batch(found, tensors)
            return found
        if name in _RULES:
            call = _arguments(name, args, kwargs)
            found = func(*args, **kwargs)
            _RULES[name](self, call, found)
            return found
        return self._run_on_parameters(name, partial(func, **kwargs), args)

    def _note_from_batch(self, found: Any, tensors: list[Tensor]) -> None:
        """Integers computed from the batch still differ from sample to sample."""
        is_index = isinstance(found, Tensor) and not found.is_floating_point()
        if is_index and any(id(tensor) in self._from_batch for tensor in tensors):
            self._from_batch[id(found)] = found

    def _layout(self, x: Tensor) -> Layout | None:
        if self._in_attention:
            # Attention has the tokens first, whatever the number of slots suggests.
            if x.dim() == 3 and x.shape[1] == self._slots:
                return "second"
            if layout_of(x, self._slots) == "flat":
                return "flat, tokens first"
        return layout_of(x, self._slots)

    def _add(
        self,
        rule: Callable[..., PerSampleRule],
        parameter: Tensor | None,
        out: Tensor,
        *,
        to_slots: ToSlots,
        layout: Layout = "first",
        **attributes: Any,
    ) -> None:
        """Record a use, if it is one of a parameter and outside of `torch.no_grad`."""
        name = self._names.get(id(parameter))
        if name is None or not out.requires_grad:
            return
        edge = get_gradient_edge(_base_of(out))
        reshaped = _reshape_first(to_slots, out.shape)
        self.uses.append(rule(name, edge, reshaped, layout, **attributes))

    def _trace_linear(self, call: Call, out: Tensor) -> None:
        self._trace_product(call["input"], call["weight"], call["bias"], out)

    def _trace_addmm(self, call: Call, out: Tensor) -> None:
        if call["beta"] == 1 and call["alpha"] == 1:
            self._trace_product(call["mat1"], call["mat2"], call["input"], out, transposed=True)

    def _trace_matmul(self, call: Call, out: Tensor) -> None:
        other = call["other"]
        if isinstance(other, Tensor) and other.dim() == 2:
            self._trace_product(call["input"], other, None, out, transposed=True)

    def _trace_product(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        *,
        transposed: bool = False,
    ) -> None:
        layout = self._layout(x)
        if layout is None:
            return
        to_slots = partial(by_slot, slots=self._slots, layout=layout)
        inputs = partial(to_slots, x.detach())
        self._add(
            MatmulRule,
            weight,
            out,
            to_slots=to_slots,
            layout=layout,
            inputs=inputs,
            transposed=transposed,
        )
        self._add(ScaleRule, bias, out, to_slots=to_slots, layout=layout)

    def _trace_conv(self, call: Call, out: Tensor) -> None:
        x = call["input"]
        weight = call["weight"]
        if x.dim() != weight.dim() or len(x) % self._slots:
            return
        conv = {key: call[key] for key in ("stride", "padding", "dilation")}
        all_patches = partial(patches, x.detach(), weight.shape[2:], conv)
        self._add(
            MatmulRule,
            weight,
            out,
            to_slots=self._by_channel,
            inputs=_then(all_patches, partial(by_slot, slots=self._slots, layout="first")),
            groups=call["groups"],
        )
        self._add(ScaleRule, call["bias"], out, to_slots=self._by_channel)

    def _trace_embedding(self, call: Call, out: Tensor) -> None:
        places = call["input"]
        weight = call["weight"]
        has_slots = places.dim() > 1 and len(places) == self._slots
        if id(places) not in self._from_batch and not has_slots:
            # The same places for every sample, as in a table of positions.
            self._note_derived(out, [weight])
            if self._observing:
                twin_call = call | {"weight": self._twin(weight)}
                self._twins[id(out)] = nn.functional.embedding(**twin_call)
            return
        if places.dim() == 0 or places.numel() % self._slots:
            return
        layout = layout_of(out, self._slots) or "flat"
        to_slots = partial(by_slot, slots=self._slots, layout=layout)
        self._add(
            LookupRule,
            weight,
            out,
            to_slots=to_slots,
            layout=layout,
            places=to_slots(places[..., None])[..., 0],
            ignored=call["padding_idx"],
        )

    def _trace_layer_norm(self, call: Call, out: Tensor) -> None:
        x = call["input"].detach()
        shape = tuple(call["normalized_shape"])
        eps = {} if call["eps"] is None else {"eps": call["eps"]}
        # RMSNorm has no bias.
        norm = nn.functional.layer_norm if "bias" in call else nn.functional.rms_norm
        flatten = partial(torch.flatten, start_dim=x.dim() - len(shape))
        layout = self._layout(flatten(x))
        if layout is None:
            return
        to_slots = _then_by_slot(flatten, slots=self._slots, layout=layout)
        inputs = _then(partial(norm, x, shape, **eps), to_slots)
        self._add(ScaleRule, call["weight"], out, to_slots=to_slots, layout=layout, inputs=inputs)
        self._add(ScaleRule, call.get("bias"), out, to_slots=to_slots, layout=layout)

    def _trace_group_norm(self, call: Call, out: Tensor) -> None:
        x = call["input"].detach()
        if len(x) % self._slots:
            return
        normal = partial(nn.functional.group_norm, x, call["num_groups"], eps=call["eps"])
        inputs = _then(normal, self._by_channel)
        self._add(ScaleRule, call["weight"], out, to_slots=self._by_channel, inputs=inputs)
        self._add(ScaleRule, call["bias"], out, to_slots=self._by_channel)

    def _run_batch_norm(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run BatchNorm with its statistics as constants.

        Otherwise every sample's loss would depend on every other sample.
        """
        call = _arguments("batch_norm", args, kwargs)
        x = call["input"]
        if call["training"] and self._observing:
            return func(*args, **kwargs)
        if call["training"]:
            self.froze_statistics = True
            axes = [axis for axis in range(x.dim()) if axis != 1]
            mean = x.detach().mean(axes)
            variance = x.detach().var(axes, correction=0)
        else:
            mean = call["running_mean"]
            variance = call["running_var"]
        constants = {
            "running_mean": mean.detach(),
            "running_var": variance.detach(),
            "training": False,
        }
        out = func(**(call | constants))
        if len(x) % self._slots == 0 and out.requires_grad:
            normal = partial(
                nn.functional.batch_norm,
                x.detach(),
                weight=None,
                bias=None,
                eps=call["eps"],
                **constants,
            )
            inputs = _then(normal, self._by_channel)
            self._add(ScaleRule, call["weight"], out, to_slots=self._by_channel, inputs=inputs)
            self._add(ScaleRule, call["bias"], out, to_slots=self._by_channel)
        return out

    def _run_attention(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run torch.nn's attention written out, with the tracer active, so that it sees inside."""
        call = _arguments("multi_head_attention_forward", args, kwargs)
        if not is_written_out(call):
            return func(*args, **kwargs)
        self._in_attention = True
        try:
            with self:
                return attend(call)
        finally:
            self._in_attention = False

    def _run_on_parameters(self, name: str, func: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Run an operation on parameters that no rule knows.

        What is made of parameters alone is noted as such. Where it is broadcast over the samples,
        that is a use.
        """
        own = [place for place, arg in enumerate(args) if self._is_derived(arg)]
        if name in _ELEMENTWISE and len(own) == 1 and len(args) == 2:
            broadcast = self._broadcast(args[own[0]], args[1 - own[0]])
            if broadcast is not None:
                operands = list(args)
                operands[own[0]] = broadcast
                return func(*operands)
        sources = [tensor for tensor in _tensors_of(args, {}) if tensor.requires_grad]
        twin = None
        if self._observing and self._are_derived(sources):
            twin = self._compute_twin(func, args)
        found = func(*args)
        is_expanded = name in {"expand", "repeat"} and own == [0]
        if is_expanded and self._repeats_by_slot(args[0], found.shape):
            return self._trace_broadcast(args[0], found)
        if isinstance(found, Tensor) and found.requires_grad:
            self._note_derived(found, sources)
            if twin is not None:
                self._twins[id(found)] = twin
        return found

    def _broadcast(self, source: Any, other: Any) -> Tensor | None:
        """What an elementwise operation makes of parameters before it: the same for every slot."""
        if not isinstance(other, Tensor):
            return None
        shape = torch.Size(np.broadcast_shapes(source.shape, other.shape))
        if not self._repeats_by_slot(source, shape):
            return None
        return self._trace_broadcast(source, source.expand(shape))

    def _repeats_by_slot(self, source: Tensor, shape: torch.Size) -> bool:
        """Whether a broadcast to this shape gives every slot the same."""
        adds_first_axis = len(shape) > source.dim() or source.shape[:1] == (1,)
        return len(shape) > 0 and shape[0] == self._slots and adds_first_axis

    def _trace_broadcast(self, source: Tensor, broadcast: Tensor) -> Tensor:
        to_slots = partial(sum_to_shape, shape=source.shape)
        _, names = self._derived[id(source)]
        for name in names:
            leaf = self._leaves[name]
            self._add(
                BroadcastRule,
                leaf,
                broadcast,
                to_slots=to_slots,
                leaf=self._twin(leaf),
                source=self._twin(source),
            )
        return broadcast

    def _compute_twin(self, func: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Run an operation in our own graph, before it happens, with the same random numbers."""
        devices = [tensor.device for tensor in _tensors_of(args, {})[:1] if tensor.is_cuda]
        with torch.random.fork_rng(devices):
            return func(*map(self._twin, args))

    def _twin(self, value: Any) -> Any:
        """The counterpart of a value in our own graph; the value itself where there is none."""
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._twin, value))
        return self._twins.get(id(value), value)

    def _note_derived(self, found: Tensor, sources: list[Tensor]) -> None:
        if not self._are_derived(sources):
            return
        names: set[str] = set()
        for source in sources:
            names |= self._derived[id(source)][1]
        # The tensor is kept with its id, which would be free for another one otherwise.
        self._derived[id(found)] = found, frozenset(names)

    def _is_derived(self, value: Any) -> bool:
        return isinstance(value, Tensor) and id(value) in self._derived

    def _are_derived(self, sources: list[Tensor]) -> bool:
        return all(self._is_derived(source) for source in sources)


def _then(compute: Callable[[], Tensor], to_slots: ToSlots) -> Callable[[], Tensor]:
    """Compute something by slot, but only when it is needed."""
    return lambda: to_slots(compute())


def _then_by_slot(flatten: ToSlots, *, slots: int, layout: Layout) -> ToSlots:
    return lambda tensor: by_slot(flatten(tensor), slots, layout)


def _by_channel(x: Tensor, slots: int) -> Tensor:
    return by_slot(channels_last(x), slots, "first")


def _base_of(out: Tensor) -> Tensor:
    """The tensor that an output is another shape of, if any.

    An output that is overwritten in place leaves the graph; its base stays in it.
    """
    base = base_of(out)
    if base is None or base.grad_fn is None or base.numel() != out.numel():
        return out
    return base if base.is_contiguous() and out.is_contiguous() else out


def _reshape_first(to_slots: ToSlots, shape: torch.Size) -> ToSlots:
    return lambda cotangent: to_slots(cotangent.reshape(shape))


def _tensors_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Tensors among arguments, also in lists such as those of `torch.cat`."""
    found: list[Tensor] = []
    for arg in chain(args, kwargs.values()):
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            found += [entry for entry in arg if isinstance(entry, Tensor)]
    return found


_ELEMENTWISE = frozenset(
    {
        "add",
        "add_",
        "sub",
        "sub_",
        "mul",
        "mul_",
        "div",
        "div_",
        "__radd__",
        "__rsub__",
        "__rmul__",
        "__iadd__",
    }
)
_RULES: dict[str, Callable[[OpTracer, Call, Tensor], None]] = {
    "linear": OpTracer._trace_linear,
    "addmm": OpTracer._trace_addmm,
    "matmul": OpTracer._trace_matmul,
    "mm": OpTracer._trace_matmul,
    "conv1d": OpTracer._trace_conv,
    "conv2d": OpTracer._trace_conv,
    "embedding": OpTracer._trace_embedding,
    "layer_norm": OpTracer._trace_layer_norm,
    "rms_norm": OpTracer._trace_layer_norm,
    "group_norm": OpTracer._trace_group_norm,
}
# Parameters with their defaults, of functions written in C, which `inspect` cannot read.
_CONV: Call = {
    "input": None,
    "weight": None,
    "bias": None,
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
}
_C_SIGNATURES: dict[str, Call] = {
    "linear": {"input": None, "weight": None, "bias": None},
    "addmm": {"input": None, "mat1": None, "mat2": None, "beta": 1, "alpha": 1},
    "matmul": {"input": None, "other": None},
    "mm": {"input": None, "other": None},
    "conv1d": _CONV,
    "conv2d": _CONV,
}


def _arguments(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Arguments of an operation by name, with defaults."""
    if name in _C_SIGNATURES:
        defaults = _C_SIGNATURES[name]
        positional = dict(zip(defaults, args, strict=False))
        return defaults | positional | dict(kwargs)
    bound = _signature(name).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


@cache
def _signature(name: str) -> inspect.Signature:
    return inspect.signature(getattr(nn.functional, name))
