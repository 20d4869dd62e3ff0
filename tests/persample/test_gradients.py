"""Rows are the samples' sketched gradients: against a loop over samples with whole gradients."""

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from backtrail.errors import CoupledLoss
from backtrail.methods.dve.projection import Projection, projection
from backtrail.persample import check
from backtrail.persample.gradients import trace_gradient
from backtrail.persample.rules import Loss, Reductions, Rows
from backtrail.persample.sketch import KroneckerSketch
from backtrail.run.run import open_run
from backtrail.step.state import BatchRecord, Step
from backtrail.step.step import MicroBatch, Transition
from backtrail.step.update import Update
from backtrail.task.batchnorm import batchnorm_layers
from backtrail.task.language import language_model
from backtrail.task.task import Task
from backtrail.tree import Tree, add, cast
from bench.models import GPT, sentences
from tests.cases import CASES, Case, normed, record, rows
from tests.persample.layers import LAYERS, SLOTS, WIDTH, Layer, Mapped, nonlinear_loss


def other_loss(outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
    """Of the same outputs."""
    return (outputs.flatten(1) - batch[1][:, None]).square().sum(1)


def piece_of(layer: Layer, *, reduce: Any = "mean", loss: Any = nonlinear_loss) -> list[MicroBatch]:
    """A step that trains on random rows."""
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    try:
        model, batch = layer.model(), (layer.inputs(), torch.randn(SLOTS))
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    random = {"cpu": bytes(torch.get_rng_state().tolist())}
    fed = (BatchRecord(tuple(range(SLOTS)), 0, "", random=random),)
    learning = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    step = Step(0, fed, ({"lr": 0.1},), 0.0)
    task = Task(model, [], loss, reduce=reduce)
    return Transition(
        task, Update("SGD", (learning,), ({"lr": 0.1},)), step, (batch,)
    ).micro_batches()


@dataclass
class Captured:
    """Everything about a micro-batch at once."""

    rows: Sequence[Rows]  # by loss, and by set of reductions
    losses: Tensor
    gradient: Tree
    buffers: Tree


def captured(
    micro_batch: MicroBatch,
    params: Tree,
    buffers: Tree,
    *,
    sides: Sequence[Reductions],
    losses: Sequence[Loss] = (),
) -> Captured:
    """Rows of the task's loss and of further ones."""
    found = trace_gradient(micro_batch, params, buffers)
    rows = [found.rows([(loss, one) for one in sides]) for loss in (None, *losses)]
    return Captured(rows, found.losses, found.gradient, found.buffers)


def drawn(micro_batch: MicroBatch, rank: int = 9, **options: Any) -> Projection:
    """Of the parameters that learn."""
    params = micro_batch.transition.task.parameters()
    shapes = {name: tuple(params[name].shape) for name in micro_batch.transition.trained}
    return projection(shapes, rank=rank, like=torch.zeros((), dtype=torch.float64), **options)


def slopes(
    micro_batch: MicroBatch,
    params: Tree,
    buffers: Tree,
    loss: Callable[..., Tensor] = nonlinear_loss,
) -> list[Tree]:
    """Sample by sample, by autograd; a batch's statistics are constants."""
    transition = micro_batch.transition
    transition.task.binding.set_modes(transition.step.evaluating)
    leaves = {
        name: params[name].clone().requires_grad_() for name in micro_batch.transition.updated
    }
    with micro_batch.recorded_randomness(params):
        outputs, _ = micro_batch.transition.task.outputs(
            params | leaves, buffers, micro_batch.batch
        )
    found = []
    for one in loss(outputs, micro_batch.batch):
        grads = torch.autograd.grad(
            one, list(leaves.values()), retain_graph=True, allow_unused=True
        )
        found.append(
            {
                n: torch.zeros_like(params[n]) if g is None else g
                for n, g in zip(leaves, grads, strict=True)
            }
        )
    return found


def by_hand(slopes: Sequence[Tree], drawn: Projection) -> Tensor:
    """Whole gradients times whole matrices, made of what unit vectors become."""
    rows = []
    for slope in slopes:
        parts = []
        for name, sides in drawn.sides.items():
            left = sides.left.reduce(torch.eye(sides.left.size).double())
            right = (
                torch.ones(1, 1).double()
                if sides.right is None
                else sides.right.reduce(torch.eye(sides.right.size).double())
            )
            parts.append(
                torch.einsum(
                    "ij,ip,jq->pq", slope[name].reshape(len(left), len(right)), left, right
                ).flatten()
            )
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def with_constant_statistics(micro_batch: MicroBatch, buffers: Tree) -> tuple[MicroBatch, Tree]:
    """The model in eval mode, with the batch's statistics as its running ones (first layer)."""
    normed = tuple(batchnorm_layers(micro_batch.transition.task.model))
    x = micro_batch.batch[0]
    axes = [axis for axis in range(x.dim()) if axis != 1]
    for name in normed:
        buffers = buffers | {
            f"{name}.running_mean": x.mean(axes),
            f"{name}.running_var": x.var(axes, correction=0),
        }
    step = msgspec.structs.replace(micro_batch.transition.step, evaluating=normed)
    return replace(micro_batch, transition=replace(micro_batch.transition, step=step)), buffers


def gap(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


def unverified(micro_batch: MicroBatch) -> set[str]:
    """Parameters that were differentiated sample by sample."""
    return set().union(
        *(names for _, names in check._RESULTS[micro_batch.transition.task.binding].values())
    )


@pytest.mark.parametrize("kind", ["gaussian", "mask"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_rows_are_projected_gradients_of_single_samples(layer: Layer, kind: Any) -> None:
    """For every kind of layer, two losses and two sets of reductions, from one pass."""
    (micro_batch,) = piece_of(layer)
    params, buffers = (
        micro_batch.transition.task.parameters(),
        micro_batch.transition.task.buffers(),
    )
    plain = drawn(micro_batch, kind=kind)
    factors = {
        n: tuple(torch.rand(s).double() for s in KroneckerSketch.sizes(params[n].shape))
        for n in plain.sides
    }
    sets = (plain, plain.scaled(factors))
    found = captured(
        micro_batch, params, buffers, sides=[one.sides for one in sets], losses=(other_loss,)
    )
    assert unverified(micro_batch) == set(layer.slow)
    at, statistics = with_constant_statistics(micro_batch, buffers)
    for of_loss, one in zip(found.rows, (nonlinear_loss, other_loss), strict=True):
        wanted = slopes(at, params, statistics, one)
        assert (
            max(gap(got, by_hand(wanted, own)) for got, own in zip(of_loss, sets, strict=True))
            <= 1e-10
        )


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_pass_gives_the_gradient_of_the_step_too(layer: Layer) -> None:
    """As plain autograd takes it, with the losses and the buffers that the forward pass left."""
    (micro_batch,) = piece_of(layer)
    params, buffers = (
        micro_batch.transition.task.parameters(),
        micro_batch.transition.task.buffers(),
    )
    found = captured(micro_batch, params, buffers, sides=(drawn(micro_batch).sides,))
    singles = slopes(micro_batch, params, buffers)
    for name, gradient in found.gradient.items():
        wanted = torch.stack([single[name] for single in singles]).mean(0)
        assert (gradient - wanted).abs().max() <= 1e-10 * wanted.abs().max()
    with micro_batch.recorded_randomness(params):
        losses, after = micro_batch.transition.task.losses(params, buffers, micro_batch.batch)
    torch.testing.assert_close(found.losses, losses, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.buffers, after, rtol=0, atol=0)


def gpt(slots: int, context: int = 8) -> MicroBatch:
    """A small language model and a batch for it."""
    torch.manual_seed(2)
    data = sentences(slots, context)
    task = language_model(GPT(width=16, layers=2, context=context), data)
    trained = tuple(task.parameters())
    fed = (BatchRecord(tuple(range(slots)), 0, ""),)
    update = Update("SGD", (trained,), ({"lr": 0.1},))
    return Transition(
        task, update, Step(0, fed, ({"lr": 0.1},), 0.0), (task.batch(range(slots)),)
    ).micro_batches()[0]


@pytest.mark.parametrize("slots", [1, 5, 8])
def test_a_language_model_needs_one_pass(slots: int) -> None:
    """Also with as many tokens as slots; its gradient is the replay's to the last bit."""
    micro_batch = gpt(slots)
    task = micro_batch.transition.task
    params = cast(task.parameters(), torch.float64)
    own = drawn(micro_batch, rank=12)
    found = captured(micro_batch, params, {}, sides=(own.sides,))
    assert unverified(micro_batch) == set()
    assert (
        gap(found.rows[0][0], by_hand(slopes(micro_batch, params, {}, task.losses_of), own))
        <= 1e-10
    )
    floats = task.parameters()
    small = projection({name: tuple(floats[name].shape) for name in floats}, rank=12)
    gradient = captured(micro_batch, floats, {}, sides=(small.sides,)).gradient
    torch.testing.assert_close(
        gradient, micro_batch.traceable_gradient(floats, {}, None)[0], rtol=0, atol=0
    )


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_nothing_of_a_pass_outlives_it(layer: Layer) -> None:
    """No cycle of references keeps a graph until the garbage collector comes."""
    (micro_batch,) = piece_of(layer)
    params, buffers = (
        micro_batch.transition.task.parameters(),
        micro_batch.transition.task.buffers(),
    )
    own = drawn(micro_batch)
    gc.collect()
    gc.disable()
    try:
        found = trace_gradient(micro_batch, params, buffers)
        found.rows([(None, own.sides)])
        assert found.graph is not None
        kept = [weakref.ref(held) for held in (found.graph.losses, *found.graph.uses)]
        del found
        assert [ref() for ref in kept if ref() is not None] == []
    finally:
        gc.enable()


def test_under_autocast_rows_are_as_coarse_as_the_training() -> None:
    """And still come from one pass."""
    micro_batch = gpt(5)
    params = micro_batch.transition.task.parameters()
    own = projection({name: tuple(params[name].shape) for name in params}, rank=12)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        coarse = captured(micro_batch, params, {}, sides=(own.sides,)).rows[0][0]
    assert unverified(micro_batch) == set()
    assert coarse.dtype == torch.float32
    fine = captured(micro_batch, params, {}, sides=(own.sides,)).rows[0][0]
    assert 0 < (coarse - fine).norm() <= 0.03 * fine.norm()


def test_reductions_may_depend_on_the_gradient() -> None:
    """Rows are asked for afterwards, loss by loss, and are those of a capture at once."""
    (micro_batch,) = piece_of(LAYERS[1])
    params, own = micro_batch.transition.task.parameters(), drawn(micro_batch)
    found = trace_gradient(micro_batch, params, {})
    factors = {
        name: (g.abs().sum(-1),) if g.dim() > 1 else (g.abs(),)
        for name, g in found.gradient.items()
    }
    scaled = own.scaled(factors)
    asked = [
        (other_loss, own.sides),
        (None, scaled.sides),
        (None, own.sides),
        (other_loss, scaled.sides),
    ]
    for together, one in zip(
        trace_gradient(micro_batch, params, {}).rows(asked), asked, strict=True
    ):
        torch.testing.assert_close(found.rows([one])[0], together, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_pieces_of_a_step_add_up_to_its_gradient(case: Case, tmp_path: Path) -> None:
    """With accumulation, penalties, frozen, tied, unused parameters, and batches without a step."""
    record(case, case.built(), rows(), tmp_path / "run")
    run = open_run(tmp_path / "run", case.task(case.built(), rows()))
    for number in (0, 1, 2):
        transition, state = run.transition(number), run.state(number, replay=True)
        shapes = {name: tuple(state.params[name].shape) for name in run.trained}
        own = projection(shapes, kind="orthonormal", rank=100, like=state.params[run.trained[0]])
        total: Tree = {}
        buffers, sums = state.buffers, []
        for micro_batch in transition.micro_batches():
            found = captured(micro_batch, state.params, buffers, sides=(own.sides,))
            total, buffers = add(total, found.gradient), found.buffers
            sums.append((micro_batch.share[:, None] * found.rows[0][0]).sum(0))
            assert found.rows[0][0].shape == (len(micro_batch.share), own.rank)
        gradient, after, _ = transition.raw_gradient(state)
        torch.testing.assert_close(total, gradient, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(buffers, after, rtol=0, atol=0)
        if case.model is not normed and not case.penalty:
            whole = own.of_gradient({name: gradient[name][None] for name in gradient})[0]
            torch.testing.assert_close(torch.stack(sums).sum(0), whole, rtol=1e-10, atol=1e-12)


def test_a_slot_without_a_share_has_no_row() -> None:
    """Under the task's loss; the other loss is not weighted."""
    (micro_batch,) = piece_of(LAYERS[0], reduce=lambda _: torch.tensor([0.5, 0.0, 2.0]))
    params, own = micro_batch.transition.task.parameters(), drawn(micro_batch)
    found = captured(micro_batch, params, {}, sides=(own.sides,), losses=(nonlinear_loss,))
    wanted = by_hand(slopes(micro_batch, params, {}), own)
    assert gap(found.rows[1][0], wanted) <= 1e-10
    assert gap(found.rows[0][0], wanted * torch.tensor([[1.0], [0.0], [1.0]])) <= 1e-10


def test_parameters_that_a_step_does_not_move_have_zeros() -> None:
    """They keep their place."""
    (micro_batch,) = piece_of(LAYERS[0])
    step = msgspec.structs.replace(micro_batch.transition.step, unused=("weight",))
    unused = replace(micro_batch, transition=replace(micro_batch.transition, step=step))
    params, own = micro_batch.transition.task.parameters(), drawn(micro_batch)
    found, whole = (
        captured(one, params, {}, sides=(own.sides,)).rows[0][0] for one in (unused, micro_batch)
    )
    assert not found[:, own.layout["weight"]].any()
    torch.testing.assert_close(found[:, own.layout["bias"]], whole[:, own.layout["bias"]])


def test_a_loss_that_reads_other_samples_is_refused() -> None:
    """Its gradient is nobody's own."""

    def contrastive(outputs: Tensor, batch: Any) -> Tensor:
        del batch
        return (outputs @ outputs.T).log_softmax(1).diagonal()

    (micro_batch,) = piece_of(LAYERS[0], loss=contrastive)
    with pytest.raises(CoupledLoss, match=r"backtrail.DIT\(\)"):
        captured(
            micro_batch,
            micro_batch.transition.task.parameters(),
            {},
            sides=(drawn(micro_batch).sides,),
        )


class Hidden(torch.autograd.Function):
    """A product that nobody can watch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """A product."""
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor, Tensor]:
        """Both factors."""
        x, weight = ctx.saved_tensors
        return b @ weight.mT, torch.einsum("...i,...o->io", x, b)


def hidden() -> nn.Module:
    """The weight is used twice, once unseen."""
    return Mapped(lambda m, x: Hidden.apply(torch.tanh(x @ m.w), m.w), w=torch.randn(WIDTH, WIDTH))


def square() -> Tensor:
    """As many places as slots."""
    return torch.randn(SLOTS, SLOTS, WIDTH)


TRAPS = [
    Layer("unseen use", hidden, slow=("w",)),
    Layer(
        "slots second, as many places",
        lambda: Mapped(
            lambda m, x: m.core(x.mT.permute(2, 0, 1).mT.mT).transpose(0, 1), core=nn.Linear(4, 6)
        ),
        square,
        ("core.weight", "core.bias"),
    ),
    Layer(
        "positions, as many",
        lambda: Mapped(lambda m, x: torch.tanh(x + m.p), p=torch.randn(3, WIDTH)),
        square,
    ),
]


@pytest.mark.parametrize("trap", TRAPS, ids=str)
def test_what_was_misread_is_found_out(trap: Layer) -> None:
    """Rows that do not add up to the gradient are taken sample by sample instead."""
    (micro_batch,) = piece_of(trap)
    params, own = micro_batch.transition.task.parameters(), drawn(micro_batch)
    found = captured(micro_batch, params, {}, sides=(own.sides,))
    assert unverified(micro_batch) == set(trap.slow)
    assert gap(found.rows[0][0], by_hand(slopes(micro_batch, params, {}), own)) <= 1e-10
