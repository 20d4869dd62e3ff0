"""Which batches a step consumed, and how it was made, whatever the shape of the loop."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, WeightedRandomSampler

import whence
from tests.loops import CLASSES, FEATURES, Loop, adam, mlp, moody, recorded, rows
from whence.errors import UnexplainedGradient
from whence.run.run import Run

Watch = Callable[[Any], Any]
ORDER = {"shuffle": False}


def samples(run: Run) -> list[list[tuple[int, ...]]]:
    """Row numbers by step and batch."""
    return [[fed.samples for fed in step.fed] for step in run.log]


def in_order(count: int, size: int) -> list[tuple[int, ...]]:
    """Row numbers of the batches of a loader that does not shuffle."""
    return [tuple(range(first, min(first + size, count))) for first in range(0, count, size)]


def halves(batches: Sequence[Sequence[Tensor]]) -> Tensor:
    """What a loop divides by that accumulates two batches and divides by two, even when the last group has one."""
    return torch.cat([torch.full((len(labels),), 1 / (2 * len(labels))) for _, labels in batches])


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["zero_grad before", "zero_grad after"])
def test_accumulated_batches_form_one_step(set_to_none: bool, first: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """Two batches a step, a last group of one, gradients cleared before or after, to None or to zero."""
    loop = Loop.of(moody(), data=rows(19), options={"reduce": halves})
    loader = loop.loader(**ORDER)

    def train(watch: Watch) -> None:
        for _ in range(3):
            for number, batch in enumerate(watch(loader), 1):
                if first and number % 2:
                    loop.optimizer.zero_grad(set_to_none=set_to_none)
                (cross_entropy(loop.model(batch[0]), batch[1]) / 2).backward()  # type: ignore[no-untyped-call]
                if number % 2 == 0 or number == len(loader):
                    loop.optimizer.step()
                    if not first:
                        loop.optimizer.zero_grad(set_to_none=set_to_none)

    run = recorded(loop, tmp_path / "run", train)
    one, two, three, four, five = in_order(19, 4)
    assert samples(run) == [[one, two], [three, four], [five]] * 3
    assert run.epochs == (3, 6, 9)


def test_epochs_that_end_within_a_step_keep_their_states(tmp_path: Path) -> None:
    """Steps of two batches that straddle epochs: a state is kept where the last batch opens a new epoch."""
    loop = Loop.of(mlp(), data=rows(12))
    loader, waiting = loop.loader(**ORDER), 0

    def train(watch: Watch) -> None:
        nonlocal waiting
        for _ in range(4):
            for batch in watch(loader):
                (cross_entropy(loop.model(batch[0]), batch[1]) / 2).backward()  # type: ignore[no-untyped-call]
                waiting += 1
                if waiting % 2 == 0:
                    loop.step()

    run = recorded(loop, tmp_path / "run", train, checkpoints=whence.Epochs())
    assert [[fed.epoch for fed in step.fed] for step in run.log] == [[0, 0], [0, 1], [1, 1], [2, 2], [2, 3], [3, 3]]
    assert set(run.epochs) <= set(run.kept)


def test_validation_in_between_is_not_a_step(tmp_path: Path) -> None:
    """Validation with and without gradients, over its own loader or the training's, belongs to no step."""
    loop = Loop.of(moody())
    loader, other = loop.loader(**ORDER), DataLoader(rows(9, seed=4), batch_size=3, shuffle=True)

    def validate(batches: Iterable[Any]) -> None:
        loop.model.eval()
        with torch.no_grad():
            for batch in batches:
                loop.model(batch[0])
        batch = next(iter(other))
        loss = cross_entropy(loop.model(batch[0]), batch[1])
        torch.autograd.grad(loss, list(loop.model.parameters()), retain_graph=True)
        loss.backward()  # type: ignore[no-untyped-call]
        loop.optimizer.zero_grad()
        loop.model.train()

    def train(watch: Watch) -> None:
        for _ in range(2):
            for number, batch in enumerate(watch(loader)):
                loop.backward(batch)
                loop.step()
                if number % 2:
                    validate(other)
            validate(loader)
            validate(watch(loader))

    run = recorded(loop, tmp_path / "run", train)
    assert samples(run) == [[batch] for batch in in_order(22, 4)] * 2
    assert [step.evaluating for step in run.log] == [()] * run.steps


def test_a_loop_that_draws_before_its_forward_pass_says_so(tmp_path: Path) -> None:
    """Random numbers drawn between the loader and dropout are an error that names the cure, and the cure works."""

    def train(loop: Loop, recorder: whence.Recorder, *, cured: bool) -> None:
        with recorder:
            for batch in recorder.watch(loop.loader()):
                torch.randn(3)
                if cured:
                    recorder.fed(batch)
                loop.backward(batch)
                loop.step()

    loop = Loop.of(moody())
    with pytest.raises(UnexplainedGradient, match=r"random numbers drawn .* recorder.fed"):
        train(loop, loop.recorder(tmp_path / "run"), cured=False)
    loop = Loop.of(moody())
    train(loop, loop.recorder(tmp_path / "cured"), cured=True)
    assert whence.open_run(tmp_path / "cured", loop.task()).verify().difference < 1e-5


def test_several_losses_on_one_batch_are_one_feeding(tmp_path: Path) -> None:
    """Two backward passes on one batch make a step whose batch counts once."""

    def twice(model: nn.Module, batch: Any) -> Any:
        return model(batch[0]), model(2 * batch[0])

    def loss(outputs: Any, batch: Any) -> Tensor:
        return sum((cross_entropy(o, batch[1], reduction="none") for o in outputs), torch.zeros(()))

    loop = Loop.of(moody())

    def train(watch: Watch) -> None:
        for batch in watch(loop.loader(**ORDER)):
            first, second = twice(loop.model, batch)
            cross_entropy(first, batch[1]).backward()  # type: ignore[no-untyped-call]
            cross_entropy(second, batch[1]).backward()  # type: ignore[no-untyped-call]
            loop.step()

    task = whence.Task(loop.model, loop.data, loss, predict=twice)
    with whence.Recorder(tmp_path / "run", task, loop.optimizer, checkpoints=whence.Every(3)) as recorder:
        train(recorder.watch)
    run = whence.open_run(tmp_path / "run", task)
    assert run.verify().difference < 1e-5
    assert samples(run) == [[batch] for batch in in_order(22, 4)]


def test_two_steps_on_one_batch_are_two_steps(tmp_path: Path) -> None:
    """Each of them has its own dropout mask, and the same samples."""
    loop = Loop.of(moody())

    def train(watch: Watch) -> None:
        for batch in watch(loop.loader(**ORDER)):
            for _ in range(2):
                loop.backward(batch)
                loop.step()

    run = recorded(loop, tmp_path / "run", train, checkpoints=whence.Every(3))
    assert samples(run) == [[batch] for batch in in_order(22, 4) for _ in range(2)]


def test_a_skipped_step_is_none(tmp_path: Path) -> None:
    """Where the loop throws a gradient away, as a GradScaler does, the batch belongs to no step."""
    loop = Loop.of(mlp(nn.Dropout(0.2)))

    def train(watch: Watch) -> None:
        for _ in range(2):
            for number, batch in enumerate(watch(loop.loader(**ORDER))):
                loop.backward(batch)
                if number in {0, 3}:
                    loop.optimizer.zero_grad()
                else:
                    loop.step()

    run = recorded(loop, tmp_path / "run", train, checkpoints=whence.Epochs())
    kept = [batch for number, batch in enumerate(in_order(22, 4)) if number not in {0, 3}]
    assert samples(run) == [[batch] for batch in kept] * 2
    assert run.kept == (0, 4, 8)


@pytest.mark.parametrize("fused", [False, True])
def test_a_real_gradient_scaler_skips_and_scales(fused: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """The scale overflows at first and is halved: those steps are none; later ones record the unscaled gradient."""
    loop = Loop.of(mlp(), lambda model: torch.optim.Adam(model.parameters(), lr=0.01, fused=fused), data=rows(40))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127 * 1.9)
    made: list[int] = []

    def train(watch: Watch) -> None:
        for number, batch in enumerate(watch(loop.loader(**ORDER))):
            scaler.scale(20 * cross_entropy(loop.model(batch[0]), batch[1])).backward()
            before, scale = loop.model[0].weight.clone(), scaler.get_scale()  # type: ignore[index]
            scaler.step(loop.optimizer)
            scaler.update()
            loop.optimizer.zero_grad()
            if scaler.get_scale() == scale:
                made.append(number)
            assert bool((loop.model[0].weight != before).any()) is (number in made)  # type: ignore[index]

    loop.options["reduce"] = lambda _: torch.full((4,), 5.0)
    run = recorded(loop, tmp_path / "run", train)
    assert samples(run) == [[batch] for number, batch in enumerate(in_order(40, 4)) if number in made]
    assert 0 < len(made) < 10


def test_an_epoch_may_end_early(tmp_path: Path) -> None:
    """A loop that breaks off leaves no trace of the batches that workers had fetched ahead."""
    loop = Loop.of(moody())
    loader = loop.loader(num_workers=2, **ORDER)

    def train(watch: Watch) -> None:
        for _ in range(3):
            for number, batch in enumerate(watch(loader)):
                loop.backward(batch)
                loop.step()
                if number == 1:
                    break

    run = recorded(loop, tmp_path / "run", train)
    assert samples(run) == [[batch] for batch in in_order(22, 4)[:2]] * 3
    assert run.epochs == (2, 4, 6)


def with_replacement() -> Any:
    """A sampler that draws rows again."""
    return RandomSampler(range(22), replacement=True, num_samples=30)


def weighted() -> Any:
    """A sampler that prefers some rows."""
    return WeightedRandomSampler([1.0] * 11 + [3.0] * 11, 25)


@pytest.mark.parametrize("sampler", [with_replacement, weighted])
def test_sampled_rows_are_the_fed_rows(sampler: Callable[[], Any], tmp_path: Path) -> None:
    """With replacement or weights, the noted row numbers are those of the rows that were fed."""
    loop, seen = Loop.of(mlp()), []

    def train(watch: Watch) -> None:
        for batch in watch(DataLoader(loop.data, batch_size=4, sampler=sampler())):
            seen.append(batch[0])
            loop.backward(batch)
            loop.step()

    run = recorded(loop, tmp_path / "run", train)
    assert all(
        torch.equal(loop.data.tensors[0][list(step.samples)], fed) for step, fed in zip(run.log, seen, strict=True)
    )


def test_a_batch_sampler_of_ones_own_is_followed(tmp_path: Path) -> None:
    """Batches of changing size, from any iterable of row numbers."""
    chosen = [[3, 1, 1], [0], [21, 20, 19, 18], [5, 6]]
    loop = Loop.of(mlp())
    run = recorded(loop, tmp_path / "run", lambda watch: loop.train(watch, DataLoader(loop.data, batch_sampler=chosen)))
    assert samples(run) == [[tuple(batch)] for batch in chosen] * 2
    sampler = BatchSampler(SequentialSampler(loop.data), 5, drop_last=True)
    again = Loop.of(mlp())
    run = recorded(
        again, tmp_path / "b", lambda watch: again.train(watch, DataLoader(again.data, batch_sampler=sampler))
    )
    assert samples(run) == [[batch] for batch in in_order(22, 5)[:4]] * 2


def test_two_loaders_take_turns(tmp_path: Path) -> None:
    """Batches of two loaders over one data set, in turn."""
    loop = Loop.of(mlp())

    def train(watch: Watch) -> None:
        for pair in zip(watch(loop.loader(**ORDER)), watch(loop.loader(batch_size=3, **ORDER)), strict=False):
            loop.backward(pair[1])
            loop.step()

    run = recorded(loop, tmp_path / "run", train)
    assert samples(run)[:2] == [[(0, 1, 2)], [(3, 4, 5)]]


def test_settings_of_every_group_are_those_of_the_update(tmp_path: Path) -> None:
    """One-cycle schedules move rate and momentum of two groups: each step notes what it used."""
    model = mlp()
    groups = [{"params": model[0].named_parameters()}, {"params": model[2].named_parameters(), "weight_decay": 0.1}]
    loop = Loop(model, torch.optim.SGD(groups, lr=0.1, momentum=0.9))
    schedule = torch.optim.lr_scheduler.OneCycleLR(loop.optimizer, max_lr=[0.1, 0.2], total_steps=12)
    used: list[list[tuple[float, float]]] = []

    def train(watch: Watch) -> None:
        for _ in range(2):
            for batch in watch(loop.loader()):
                loop.backward(batch)
                used.append([(group["lr"], group["momentum"]) for group in loop.optimizer.param_groups])
                loop.step()
                schedule.step()

    run = recorded(loop, tmp_path / "run", train)
    assert [[(s["lr"], s["momentum"]) for s in step.settings] for step in run.log] == used
    assert run.table()["lr"].to_list() == [[lr for lr, _ in step] for step in used]
    assert len({momentum for step in used for _, momentum in step}) > 5


def test_frozen_and_unused_parameters_stay(tmp_path: Path) -> None:
    """Frozen layers, layers without a gradient, and layers unfrozen later are noted as they were."""
    model = mlp()
    model.add_module("extra", nn.Identity())
    model.extra.register_parameter("unused", nn.Parameter(torch.ones(2)))  # type: ignore[operator,union-attr]
    model[0].requires_grad_(False)  # noqa: FBT003
    loop = Loop.of(model)

    def train(watch: Watch) -> None:
        for number, batch in enumerate(watch(loop.loader())):
            model[0].requires_grad_(number > 2)
            loop.backward(batch)
            loop.step()

    run = recorded(loop, tmp_path / "run", train)
    frozen = ("0.weight", "0.bias", "extra.unused")
    assert [step.idle for step in run.log] == [frozen] * 3 + [frozen[2:]] * 3
    assert torch.equal(run.state(3, replay=True).params["0.weight"], mlp()[0].weight)


def test_everything_may_be_frozen_but_what_comes_later(tmp_path: Path) -> None:
    """A parameter that alone receives gradients is heard, though it was frozen when the recording began."""
    model = mlp()
    model[0].requires_grad_(False)  # noqa: FBT003
    loop = Loop.of(model)

    def train(watch: Watch) -> None:
        loop.train(watch, epochs=1)
        model.requires_grad_(False)  # noqa: FBT003
        model[0].bias.requires_grad_(True)  # noqa: FBT003
        loop.train(watch, epochs=1)

    assert recorded(loop, tmp_path / "run", train).steps == 12


class Tied(nn.Module):
    """Two layers with one matrix."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        torch.manual_seed(5)
        self.inner, self.outer = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)
        self.outer.weight = self.inner.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """The matrix twice."""
        found: Tensor = self.outer(torch.tanh(self.inner(inputs)))
        return found


def test_tied_parameters_are_one(tmp_path: Path) -> None:
    """A tied matrix is in the run once, under its first name."""
    run = recorded(Loop.of(Tied()), tmp_path / "run")
    assert run.trained == ("inner.weight", "inner.bias", "outer.bias")


def square(params: dict[str, Tensor]) -> Tensor:
    """A penalty."""
    return 0.1 * sum((p.square().sum() for p in params.values()), torch.zeros(()))


def test_a_penalty_counts_once_a_step(tmp_path: Path) -> None:
    """A regulariser that the loop adds once to the loss of two batches."""
    loop = Loop.of(mlp(), options={"penalty": square})

    def train(watch: Watch) -> None:
        for number, batch in enumerate(watch(loop.loader())):
            (cross_entropy(loop.model(batch[0]), batch[1]) / 2).backward()  # type: ignore[no-untyped-call]
            if number % 2:
                square(dict(loop.model.named_parameters())).backward()  # type: ignore[no-untyped-call]
                loop.step()

    recorded(loop, tmp_path / "run", train)


@pytest.mark.parametrize(
    "clip", [whence.ClipNorm(0.3), whence.ClipNorm(0.2, float("inf")), whence.ClipValue(0.05)], ids=str
)
@pytest.mark.parametrize("unused", [False, True])
def test_clipping_is_part_of_the_update(
    clip: whence.ClipNorm | whence.ClipValue,
    unused: bool,
    tmp_path: Path,  # noqa: FBT001
) -> None:
    """Norm and value clipping, with and without a parameter that has no gradient."""
    model = mlp()
    loop = Loop.of(model, options={"clip": clip})
    parameters = list(model.parameters())
    if unused:
        model[0].bias.requires_grad_(False)  # noqa: FBT003

    def train(watch: Watch) -> None:
        for batch in watch(loop.loader()):
            loop.backward(batch)
            match clip:
                case whence.ClipNorm():
                    nn.utils.clip_grad_norm_(parameters, clip.max_norm, clip.norm_type)
                case whence.ClipValue():
                    nn.utils.clip_grad_value_(parameters, clip.max_value)
            loop.step()

    recorded(loop, tmp_path / "run", train)


@pytest.mark.parametrize(
    "kind", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "ASGD"]
)
def test_every_supported_optimizer_replays(kind: str, tmp_path: Path) -> None:
    """All of torch's elementwise optimizers, with their moments."""
    loop = Loop.of(moody(), lambda model: getattr(torch.optim, kind)(model.parameters(), lr=0.01))
    assert recorded(loop, tmp_path / "run").manifest.optimizer == kind


def test_sums_and_own_reductions_replay(tmp_path: Path) -> None:
    """A loss that is summed, and one that is divided by a constant."""
    loop = Loop.of(mlp(), options={"reduce": "sum"})
    other = Loop.of(mlp(), options={"reduce": lambda batches: torch.full((sum(len(b[1]) for b in batches),), 1 / 7)})
    for number, (each, scale) in enumerate(((loop, 1.0), (other, 1 / 7))):

        def train(watch: Watch, each: Loop = each, scale: float = scale) -> None:
            for batch in watch(each.loader()):
                (cross_entropy(each.model(batch[0]), batch[1], reduction="sum") * scale).backward()  # type: ignore[no-untyped-call]
                each.step()

        recorded(each, tmp_path / str(number), train)


def test_weights_changed_after_the_last_step_are_not_the_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Loading other weights before the recorder closes does not damage the run, and is said."""
    loop = Loop.of(moody(), adam)

    def train(watch: Watch) -> None:
        loop.train(watch)
        with torch.no_grad():
            loop.model[0].weight.zero_()  # type: ignore[index,operator,union-attr]

    run = recorded(loop, tmp_path / "run", train)
    assert run.steps not in run.kept
    assert run.manifest.finished
    assert "'0.weight' changed after the last step" in caplog.text
