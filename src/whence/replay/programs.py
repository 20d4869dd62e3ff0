r"""Curvature products as compiled programs: the same numbers to rounding, faster, for a minute or two of compilation.

The product of many directions with a piece's curvature is traced once for every kind of piece into one graph of tensor
operations, with weights, batch and directions as its inputs, and handed to `torch.compile`. The gradient, which the
directions depend on, is taken before, so a step costs one gradient more than uncompiled, whatever the queries.
"""

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from whence.replay.curvature import Curvature
from whence.replay.linearised import Linearised, Pull, free
from whence.replay.transition import Piece
from whence.tree import Tree, each

log = logging.getLogger(__name__)
Pulled = tuple[Tree, Tree, Tensor]
Inputs = tuple[Any, ...]  # parameters, buffers, weights, shares, batch
Product = Callable[[Inputs, Tree, Tree], Pulled]

# Loops that torch 2.13 puts side by side into one for a processor gave wrong numbers (a GPT's Hessian product, by 3 %).
OPTIONS: dict[str, Any] = {"cpp.max_horizontal_fusion_size": 1}
AGREES = {torch.float32: 1e-3, torch.float64: 1e-9}  # relative difference up to which a program is believed


@final
@dataclass(frozen=True, slots=True)
class Program:
    """A compiled product with a fixed number of directions."""

    run: Callable[..., list[Tensor]]
    spec: TreeSpec
    rows: int

    def __call__(self, inputs: Inputs, a: Tree, b: Tree) -> Pulled:
        """Products with up to `rows` directions; zeros fill the rest."""
        count = len(next(iter(a.values())))
        filled = [each(partial(_padded, rows=self.rows), tree) for tree in (a, b)]
        with torch.no_grad():
            found = self.run(*tree_flatten((*inputs, *filled))[0])
        second, before, scores = tree_unflatten(found, self.spec)
        return each(lambda t: t[:count], second), each(lambda t: t[:count], before), scores[:count]


class Programs:
    """The compiled products of a sweep, one for every kind of piece; where none can be made, the ordinary product.

    Args:
        rows: how many directions a program takes.
        sizes: numbers of slots of a micro-batch that are worth a program; others are rare.
        most: how many programs are made; kinds that come later (as many lengths of padding) are not compiled.
    """

    def __init__(self, rows: int, sizes: frozenset[int], *, most: int = 8) -> None:
        self._rows, self._sizes, self._most = rows, sizes, most
        self._made: dict[Hashable, Program | None] = {}

    def linearise(
        self, curvature: Curvature, piece: Piece, params: Tree, *, buffers: Tree, weights: Tensor
    ) -> Linearised:
        """Gradient of a piece and its transposed derivative, compiled where that is worth it and works."""
        plain = partial(curvature.linearise, piece, params, buffers, weights=weights)
        fed = piece.transition.step.fed[piece.index]
        # A graph of operations knows no state of the generators, and differences are ordinary gradients already.
        fit = piece.counted and fed.random is None and curvature.product == "autograd"
        if not fit or len(fed.samples) not in self._sizes:
            return plain()
        inputs = (params, buffers, weights, piece.share.to(weights), piece.batch)
        program = self._program(curvature, piece, inputs)
        if program is None:
            return plain()
        gradient, after, losses = piece.gradient(params, buffers, weights)
        many = partial(program, inputs)
        return Linearised(gradient, after, losses, partial(_alone, many), many)

    def _program(self, curvature: Curvature, piece: Piece, inputs: Inputs) -> Program | None:
        kind = _kind(piece)
        if kind not in self._made and sum(program is not None for program in self._made.values()) < self._most:
            moving, running = _moved(piece, inputs)
            directions = drawn(moving, self._rows), drawn(running, self._rows)
            self._made[kind] = _compiled(_product(curvature, piece), directions, inputs)
        return self._made.get(kind)


def _alone(many: Pull, a: Tree, b: Tree) -> Pulled:
    """One direction as a stack of one."""
    second, before, scores = many(each(lambda t: t[None], a), each(lambda t: t[None], b))
    return each(lambda t: t[0], second), each(lambda t: t[0], before), scores[0]


def _kind(piece: Piece) -> Hashable:
    """Pieces of one kind share a program: same shapes, same modes, same parameters in motion."""
    leaves, spec = tree_flatten(piece.batch)
    shapes = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
    return piece.index == 0, piece.transition.moving, piece.transition.step.evaluating, str(spec), shapes


def _compiled(product: Product, directions: tuple[Tree, Tree], inputs: Inputs) -> Program | None:
    """A program that has proved itself on random directions; None where it cannot be made, with a word why."""
    rows = len(next(iter(directions[0].values())))
    flat, given = tree_flatten((*inputs, *directions))
    expected, spec = tree_flatten(product(inputs, *directions))

    def flattened(*leaves: Tensor) -> list[Tensor]:
        *point, a, b = tree_unflatten(leaves, given)
        return tree_flatten(product(tuple(point), a, b))[0]

    try:
        with _told_to_be_compiling():
            traced = make_fx(flattened, tracing_mode="fake")(*flat)
        program = Program(torch.compile(traced, dynamic=False, options=OPTIONS), spec, rows)
        found = tree_flatten(program(inputs, *directions))[0]
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as problem:
        log.warning("this model's products cannot be compiled (%s); going on without", str(problem).partition("\n")[0])
        return None
    apart = max(_difference(x, y) for x, y in zip(found, expected, strict=True))
    if apart > AGREES.get(expected[-1].dtype, 1e-3):
        log.warning("the compiled product differs by %.1e from the ordinary one; going on without", apart)
        return None
    return program


@contextmanager
def _told_to_be_compiling() -> Iterator[None]:
    """Models that ask `torch.compiler.is_compiling` look at no number of a batch then (transformers' masks)."""
    before = torch.compiler.is_compiling()
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def _product(curvature: Curvature, piece: Piece) -> Product:
    """Products of a piece with many directions, as a function of tensors alone."""

    def product(inputs: Inputs, a: Tree, b: Tree) -> Pulled:
        params, buffers, weights, share, batch = inputs
        batches = tuple(batch if place == piece.index else None for place in range(len(piece.transition.batches)))
        here = Piece(replace(piece.transition, batches=batches), piece.index, share)
        linear = curvature.linearise(here, params, buffers, weights=weights)
        pulled: Pulled = vmap(linear.pull, randomness="same")(a, b)
        return pulled

    return product


def _moved(piece: Piece, inputs: Inputs) -> tuple[Tree, Tree]:
    """What directions are shaped like: the parameters in motion, and the running statistics."""
    params, buffers = inputs[:2]
    return {name: params[name] for name in piece.transition.moving}, free(piece, params, buffers)[1]


def drawn(like: Tree, rows: int) -> Tree:
    """Random directions of a tree's shapes, `[row, ...]`, always the same."""

    def draw(tensor: Tensor) -> Tensor:
        generator = torch.Generator(tensor.device).manual_seed(0)
        return torch.randn((rows, *tensor.shape), generator=generator, device=tensor.device, dtype=tensor.dtype)

    return each(draw, like)


def _padded(tensor: Tensor, *, rows: int) -> Tensor:
    """Zeros behind the rows that are there; contiguous, as the program was made for."""
    missing = rows - len(tensor)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor.contiguous()


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))
