"""Watches a forward pass for the uses of parameters, operation by operation.

Decisions: operations are watched, not modules, so a weight that is tied, used twice, or used
without its module is seen wherever it is used. What is recorded is a guess (which axis has the
slots, whether a use went unseen): `capture.py` proves it by numbers.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from backtrail.persample.rules import (
    Arranged,
    BroadcastRule,
    LookupRule,
    MatmulRule,
    PerSampleRule,
    ScaleRule,
    by_slot,
    channels_last,
    layout_of,
    patches,
    summed_to,
)
from backtrail.tree import Tree, tree_leaves

Call = dict[str, Any]


class OpTracer(TorchFunctionMode):
    """Records, while it is entered, how the leaves are used.

    Args:
        leaves: the parameters, by name.
        slots: how many samples the batch has.
        batch: what is fed; places in tables that come from it differ from sample to sample.
        aside: the pass is somebody else's. It stays as it is, whose batch statistics would else
            become constants; and what is made of parameters alone is made again, in a graph that
            the other's backward pass does not free.
    """

    def __init__(self, leaves: Tree, slots: int, batch: Any, *, aside: bool = False) -> None:
        TorchFunctionMode.__init__(self)
        self._aside = aside
        self.uses: list[PerSampleRule] = []
        self.froze_statistics = False  # batch statistics were taken for constants
        self._slots, self._flat = slots, "flat"
        # Not a method: uses must not hold what holds them, or a pass's memory would wait for the
        # garbage collector.
        self._by_channel = partial(_by_channel, slots=slots)
        self._names = {id(leaf): name for name, leaf in leaves.items()}
        self._leaves = leaves
        # The same as some tensors made of parameters alone, in a graph of our own; keys are theirs.
        self._twins = (
            {id(leaf): leaf.detach().requires_grad_() for leaf in leaves.values()} if aside else {}
        )
        self._alone: dict[int, tuple[Tensor, frozenset[str]]] = {
            id(leaf): (leaf, frozenset({name})) for name, leaf in leaves.items()
        }  # tensors made of parameters alone, and of which
        self._fed = {id(leaf): leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and note what it did with parameters."""
        del types
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensors = _tensors_of(args, kwargs)
        if name == "batch_norm":
            return self._batch_norm(func, args, kwargs)
        alone = [self._alone[id(t)] for t in tensors if id(t) in self._alone]
        if name == "multi_head_attention_forward":
            return self._attend(args, kwargs)
        if not alone:
            return self._follow(func(*args, **kwargs), tensors)
        if name in _RULES:
            call = _signature(name, args, kwargs)
            found = func(*args, **kwargs)
            getattr(self, _RULES[name])(call, found)
            return found
        return self._meet(name, partial(func, **kwargs), args)

    def _attend(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The attention of torch.nn lays the tokens of all samples in one row, sample by sample within a token."""
        self._flat = "flat, tokens first"
        with self:
            found = _OPENED(*args, **kwargs)
        self._flat = "flat"
        return found

    def _layout(self, x: Tensor) -> str | None:
        found = layout_of(x, self._slots)
        return self._flat if found == "flat" else found

    def _follow(self, found: Any, tensors: list[Tensor]) -> Any:
        """Whole numbers made of what was fed are fed, too."""
        if (
            isinstance(found, Tensor)
            and not found.is_floating_point()
            and any(id(t) in self._fed for t in tensors)
        ):
            self._fed[id(found)] = found
        return found

    def _add(
        self,
        kind: Callable[..., PerSampleRule],
        weight: Tensor | None,
        out: Tensor,
        *,
        arranged: Arranged,
        **rest: Any,
    ) -> None:
        name = self._names.get(id(weight))
        if name is not None and out.requires_grad:  # not under no_grad
            layout = rest.pop("layout", "first")
            self.uses.append(
                kind(
                    name,
                    get_gradient_edge(_whole(out)),
                    _shaped(arranged, out.shape),
                    layout,
                    **rest,
                )
            )

    def _linear(self, call: Call, out: Tensor) -> None:
        self._product(call["input"], call["weight"], call["bias"], out=out)

    def _addmm(self, call: Call, out: Tensor) -> None:
        if call["beta"] == 1 and call["alpha"] == 1:
            self._product(call["mat1"], call["mat2"], call["input"], out=out, turned=True)

    def _matmul(self, call: Call, out: Tensor) -> None:
        if isinstance(call["other"], Tensor) and call["other"].dim() == 2:
            self._product(call["input"], call["other"], None, out=out, turned=True)

    def _product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor, turned: bool = False
    ) -> None:
        layout = self._layout(x)
        if layout is None:
            return
        arranged = partial(by_slot, slots=self._slots, layout=layout)
        inputs = partial(arranged, x.detach())
        self._add(
            MatmulRule, weight, out, arranged=arranged, layout=layout, inputs=inputs, turned=turned
        )
        self._add(ScaleRule, bias, out, arranged=arranged, layout=layout)

    def _conv(self, call: Call, out: Tensor) -> None:
        x, weight = call["input"], call["weight"]
        if x.dim() != weight.dim() or len(x) % self._slots:
            return
        conv = {key: call[key] for key in ("stride", "padding", "dilation")}
        seen = partial(patches, x.detach(), weight.shape[2:], conv)
        inputs = _then(seen, partial(by_slot, slots=self._slots, layout="first"))
        self._add(
            MatmulRule, weight, out, arranged=self._by_channel, inputs=inputs, groups=call["groups"]
        )
        self._add(ScaleRule, call["bias"], out, arranged=self._by_channel)

    def _embedding(self, call: Call, out: Tensor) -> None:
        places = call["input"]
        rows = places.dim() > 1 and len(places) == self._slots
        if id(places) not in self._fed and not rows:
            self._keep_alone(out, [call["weight"]])  # like a table of positions: no sample's own
            if self._aside:
                self._twins[id(out)] = nn.functional.embedding(
                    **(call | {"weight": self._twin(call["weight"])})
                )
        elif places.dim() and places.numel() % self._slots == 0:
            layout = layout_of(out, self._slots) or "flat"
            arranged = partial(by_slot, slots=self._slots, layout=layout)
            of_slots = arranged(places[..., None])[..., 0]
            self._add(
                LookupRule,
                call["weight"],
                out,
                arranged=arranged,
                layout=layout,
                places=of_slots,
                ignored=call["padding_idx"],
            )

    def _layer_norm(self, call: Call, out: Tensor) -> None:
        x, shape = call["input"].detach(), tuple(call["normalized_shape"])
        eps = {} if call["eps"] is None else {"eps": call["eps"]}
        kind = nn.functional.layer_norm if "bias" in call else nn.functional.rms_norm
        flat = partial(torch.flatten, start_dim=x.dim() - len(shape))
        layout = self._layout(flat(x))
        if layout is None:
            return

        slots = self._slots

        def arranged(tensor: Tensor) -> Tensor:
            return by_slot(flat(tensor), slots, layout)

        inputs = _then(partial(kind, x, shape, **eps), arranged)
        self._add(ScaleRule, call["weight"], out, arranged=arranged, layout=layout, inputs=inputs)
        self._add(ScaleRule, call.get("bias"), out, arranged=arranged, layout=layout)

    def _group_norm(self, call: Call, out: Tensor) -> None:
        x = call["input"].detach()
        if len(x) % self._slots:
            return
        inputs = _then(
            partial(nn.functional.group_norm, x, call["num_groups"], eps=call["eps"]),
            self._by_channel,
        )
        self._add(ScaleRule, call["weight"], out, arranged=self._by_channel, inputs=inputs)
        self._add(ScaleRule, call["bias"], out, arranged=self._by_channel)

    def _batch_norm(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """A batch's own statistics become constants: otherwise every loss depends on every sample."""
        call = _signature("batch_norm", args, kwargs)
        x = call["input"]
        if call["training"] and self._aside:
            return func(*args, **kwargs)
        if call["training"]:
            self.froze_statistics = True
            axes = [axis for axis in range(x.dim()) if axis != 1]
            mean, variance = x.detach().mean(axes), x.detach().var(axes, correction=0)
        else:
            mean, variance = call["running_mean"], call["running_var"]
        statistics = {
            "running_mean": mean.detach(),
            "running_var": variance.detach(),
            "training": False,
        }
        out = func(**(call | statistics))
        if len(x) % self._slots == 0 and out.requires_grad:
            plain = statistics | {
                "weight": None,
                "bias": None,
                "input": x.detach(),
                "eps": call["eps"],
            }
            inputs = _then(partial(nn.functional.batch_norm, **plain), self._by_channel)
            self._add(ScaleRule, call["weight"], out, arranged=self._by_channel, inputs=inputs)
            self._add(ScaleRule, call["bias"], out, arranged=self._by_channel)
        return out

    def _meet(self, name: str, func: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Tensors of parameters alone stay so among themselves; where they are spread over samples is a use."""
        own = [
            place
            for place, arg in enumerate(args)
            if isinstance(arg, Tensor) and id(arg) in self._alone
        ]
        if (
            name in _ELEMENTWISE
            and len(own) == 1
            and len(args) == 2
            and isinstance(args[1 - own[0]], Tensor)
        ):
            source, other = args[own[0]], args[1 - own[0]]
            shape = torch.Size(np.broadcast_shapes(source.shape, other.shape))
            if self._spreads(source, shape):
                spread = self._spread(source, source.expand(shape))
                return func(*(spread if place == own[0] else other for place in (0, 1)))
        sources = [t for t in _tensors_of(args, {}) if t.requires_grad]
        twin = self._again(func, args) if self._aside and self._all_alone(sources) else None
        found = func(*args)
        if name in {"expand", "repeat"} and own == [0] and self._spreads(args[0], found.shape):
            return self._spread(args[0], found)
        if isinstance(found, Tensor) and found.requires_grad:
            self._keep_alone(found, sources)
            if twin is not None:
                self._twins[id(found)] = twin
        return found

    def _again(self, func: Callable[..., Any], args: Sequence[Any]) -> Any:
        """The same in our own graph, before it happens, and with the same random numbers."""
        with torch.random.fork_rng(
            [arg.device for arg in _tensors_of(args, {})[:1] if arg.is_cuda]
        ):
            return func(*map(self._twin, args))

    def _twin(self, value: Any) -> Any:
        """What stands for a value in our own graph."""
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._twin, value))
        return self._twins.get(id(value), value)

    def _spreads(self, source: Tensor, shape: torch.Size) -> bool:
        """Whether a broadcast to this shape gives every slot the same."""
        longer = len(shape) > source.dim() or source.shape[:1] == (1,)
        return len(shape) > 0 and shape[0] == self._slots and longer

    def _spread(self, source: Tensor, spread: Tensor) -> Tensor:
        arranged = partial(summed_to, shape=source.shape)
        for name in self._alone[id(source)][1]:
            leaf = self._leaves[name]
            own = {"leaf": self._twin(leaf), "source": self._twin(source)}
            self._add(BroadcastRule, leaf, spread, arranged=arranged, **own)
        return spread

    def _keep_alone(self, found: Tensor, sources: list[Tensor]) -> None:
        if self._all_alone(sources):
            names = frozenset(chain.from_iterable(self._alone[id(source)][1] for source in sources))
            self._alone[id(found)] = found, names

    def _all_alone(self, sources: list[Tensor]) -> bool:
        return all(id(source) in self._alone for source in sources)


def _then(make: Callable[[], Tensor], arranged: Arranged) -> Callable[[], Tensor]:
    """What a use needs of its inputs, made when it is asked for."""
    return lambda: arranged(make())


def _by_channel(x: Tensor, slots: int) -> Tensor:
    return by_slot(channels_last(x), slots, "first")


def _whole(out: Tensor) -> Tensor:
    """The tensor that an output is another shape of: if the output is overwritten, only that stays in the graph."""
    base = out._base
    fit = (
        base is not None
        and base.grad_fn is not None
        and base.numel() == out.numel()
        and base.is_contiguous()
    )
    return base if fit and base is not None and out.is_contiguous() else out


def _shaped(arranged: Arranged, shape: torch.Size) -> Arranged:
    return lambda cotangent: arranged(cotangent.reshape(shape))


def _tensors_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    found = []
    for arg in chain(args, kwargs.values()):
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            found += [entry for entry in arg if isinstance(entry, Tensor)]
    return found


def _opened(function: Any) -> Callable[..., Any]:
    """The same function, but for its test whether someone watches: so that what it calls is seen."""
    unseen = function.__globals__ | {"has_torch_function": lambda _: False}
    opened = FunctionType(
        function.__code__, unseen, function.__name__, function.__defaults__, function.__closure__
    )
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


_OPENED = _opened(nn.functional.multi_head_attention_forward)
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
_RULES = {
    "linear": "_linear",
    "addmm": "_addmm",
    "matmul": "_matmul",
    "mm": "_matmul",
    "conv1d": "_conv",
    "conv2d": "_conv",
    "embedding": "_embedding",
    "layer_norm": "_layer_norm",
    "rms_norm": "_layer_norm",
    "group_norm": "_group_norm",
}
# torch's own functions in C tell no signature.
_CONV = "input weight bias=None stride=1 padding=0 dilation=1 groups=1"
_SIGNATURES = {
    "linear": "input weight bias=None",
    "addmm": "input mat1 mat2 beta=1 alpha=1",
    "matmul": "input other",
    "mm": "input other",
    "conv1d": _CONV,
    "conv2d": _CONV,
}


def _signature(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Arguments by name, with defaults."""
    if name in _SIGNATURES:
        names = [part.partition("=") for part in _SIGNATURES[name].split()]
        found: Call = {
            key: None if value in {"", "None"} else int(value) for key, _, value in names
        }
        found.update(zip(list(found), args, strict=False))
        return found | dict(kwargs)
    bound = _functional(name).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


@cache
def _functional(name: str) -> inspect.Signature:
    return inspect.signature(getattr(nn.functional, name))
