"""Records a training beside its loop.

Decisions: a gradient hook says which batches a step consumed; the optimizer's pre-hook notes the update as it is about
to be made; the post-hook writes it down. So accumulation, `zero_grad` before or after, validation in between and steps
that a GradScaler skips all come out right. Nothing here draws from a generator or writes to a tensor of the training.
"""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from whence.errors import (
    BadOptimizer,
    ChangedOutside,
    Diverged,
    RunExists,
    StaleGradient,
    UnwatchedStep,
)
from whence.record.policy import CheckpointPolicy, Every
from whence.record.proof import Proof
from whence.record.randomness import generators, preserved
from whence.record.watch import Overheard, check_loader
from whence.replay.state import Fed, State, Step, settings_of
from whence.replay.transition import Transition
from whence.replay.update import Update, supported, tensors_of
from whence.run.check import layouts
from whence.run.manifest import NAME, Manifest
from whence.run.store import Writer
from whence.run.tensors import copied, digest
from whence.task import Batch, Task
from whence.tree import Tree, each, norm


@dataclass(frozen=True, slots=True)
class _Yielded:
    """A batch as it left the loader, and the world at that moment."""

    samples: tuple[int, ...]
    epoch: int
    digest: str
    content: Batch | None
    random: dict[str, bytes]
    buffers: Tree | None
    opens_epoch: bool


@final
class Recorder:
    """Records a training: `with Recorder(folder, task, optimizer) as recorder: for batch in recorder.watch(loader): ...`.

    Args:
        path: folder of the run; it must not hold one yet.
        task: model, data and loss; the model is the live one.
        optimizer: the one optimizer of the training.
        checkpoints: which states are kept.
        keep_batches: store what was fed, for rows that cannot be read again (random augmentation).
        tolerance: relative difference up to which a replayed gradient counts as the loop's; default 1e-9 in float64,
            else 1e-3.

    Raises:
        UnsupportedOptimizer: the optimizer has no derivative.
        BadOptimizer: several optimizers, or one that holds tensors that are not the model's.
        RunExists: the folder holds a run already.
    """

    def __init__(
        self,
        path: str | Path,
        task: Task,
        optimizer: Optimizer,
        *,
        checkpoints: CheckpointPolicy | None = None,
        keep_batches: bool = False,
        tolerance: float | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise BadOptimizer(f"got {type(optimizer).__name__}; a run has one torch.optim optimizer")
        self._kind = supported(type(optimizer))
        self._folder, self._task, self._optimizer = Path(path), task, optimizer
        self._policy = checkpoints or Every(50)
        self._keep_batches = keep_batches
        self._params = dict(task.model.named_parameters())
        self._groups = _group_names(self._params, optimizer)
        self._trained = [self._params[name] for group in self._groups for name in group]
        double = all(p.dtype == torch.float64 for p in self._trained)
        self._proof = Proof(tolerance or (1e-9 if double else 1e-3))
        self._overheard: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._step, self._epoch = 0, -1
        self._now: _Yielded | None = None
        self._fed: list[_Yielded] = []
        self._pending: Step | None = None
        self._versions: dict[str, int] = {}
        self._evaluating: tuple[str, ...] = ()
        self._hooks: dict[object, RemovableHandle] = {}

    def __enter__(self) -> "Recorder":
        """Create the run's folder and start listening."""
        if (self._folder / NAME).exists():
            raise RunExists(self._folder)
        params, buffers = self._task.parameters(), self._task.buffers()
        self._writer = Writer(
            self._folder,
            Manifest(
                id=uuid.uuid4().hex,
                optimizer=self._kind,
                groups=self._groups,
                params=layouts(params),
                buffers=layouts(buffers),
                samples=len(self._task.data),
                policy=str(self._policy),
                device=str(self._task.device),
                torch=str(torch.__version__),
            ),
        )
        self._kept: list[int] = []
        self._hooks["before"] = self._optimizer.register_step_pre_hook(self._before_step)
        self._hooks["after"] = self._optimizer.register_step_post_hook(self._after_step)
        self._listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening; keep the final state unless the loop failed."""
        for hook in self._hooks.values():
            hook.remove()
        if error is None:
            self._keep(State(self._live(), self._task.buffers(), self._moments()))
            self._writer.finish()

    def watch(self, loader: "DataLoader[Any]") -> "Watched":
        """The loader's batches, unchanged; the recorder notes which samples made each.

        Raises:
            UnwatchableLoader: the loader's batches could not be read again.
        """
        check_loader(loader, self._task)
        if loader not in self._overheard:
            self._overheard[loader] = Overheard(loader)
        return Watched(self, self._overheard[loader])

    def fed(self, batch: Batch) -> None:
        """Say that the model is fed this instead of the batch last yielded (mixup, augmentation on the GPU).

        It must have the same slots in the same order, and is stored in the run.

        Raises:
            UnwatchedStep: no batch was yielded yet.
        """
        if self._now is None:
            raise UnwatchedStep(self._step)
        content = copied(batch)
        self._now = replace(self._now, content=content, digest=digest(content), random=generators(self._task.device))

    def yielded(self, samples: tuple[int, ...], batch: Batch, *, opens_epoch: bool) -> None:
        """Note the batch that is about to be handed to the loop."""
        self._epoch += opens_epoch
        content = copied(batch) if self._keep_batches else None
        world = generators(self._task.device), self._buffers_if_kept(opens_epoch)
        self._now = _Yielded(samples, self._epoch, digest(batch), content, *world, opens_epoch)

    def _buffers_if_kept(self, opens_epoch: bool) -> Tree | None:  # noqa: FBT001
        """A copy of the buffers before the forward pass moves them, where the coming step's state is kept."""
        keeps = self._keeps(self._step, opens_epoch)
        return each(torch.clone, self._task.buffers()) if keeps else None

    def _keeps(self, step: int, opens_epoch: bool) -> bool:  # noqa: FBT001
        return step == 0 or self._policy.keeps(step, opens_epoch=self._epoch if opens_epoch else None)

    def _listen(self) -> None:
        """Hook every parameter that receives gradients by now."""
        for parameter in self._trained:
            if parameter.requires_grad and parameter not in self._hooks:
                self._hooks[parameter] = parameter.register_hook(self._on_gradient)  # type: ignore[no-untyped-call]

    def _on_gradient(self, _: Tensor) -> None:
        """The first gradient of a backward pass: its batch joins the step, or opens a new one if gradients are fresh."""
        now = self._now
        if now is None or (self._fed and self._fed[-1] is now):
            return
        if generators(self._task.device) == now.random:
            now = self._now = replace(now, random={})
        self._evaluating = tuple(name for name, module in self._task.model.named_modules() if not module.training)
        fresh = not any(p.grad is not None and bool(p.grad.any()) for p in self._trained)
        if not fresh and not self._fed:
            raise StaleGradient(self._step)
        self._fed = [now] if fresh else [*self._fed, now]

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args[1:] or kwargs.get("closure") is not None:
            raise BadOptimizer("step(closure) evaluates the loss inside the step; call step() without one")
        self._refuse_surprises()
        step = self._noted()
        state = State(self._live(), self._fed[0].buffers or self._task.buffers(), self._moments())
        if self._keeps(self._step, self._fed[0].opens_epoch):
            self._keep(state)
        if step.fed[0].stored:
            self._writer.keep_batches(step.index, tuple(y.content for y in self._fed))
        shape = (tuple(len(fed.samples) for fed in step.fed), step.idle, step.evaluating)
        if self._proof.due(step.index, shape):
            self._prove(step, state)
        self._pending = step

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del optimizer, args, kwargs
        if self._pending is None:
            return
        self._writer.log(self._pending)
        self._pending, last = None, self._fed[-1]
        self._step += 1
        self._fed = []
        # A second step on the same batch has a forward pass of its own, from here.
        world = generators(self._task.device), self._buffers_if_kept(opens_epoch=False)
        self._now = replace(last, random=world[0], buffers=world[1], opens_epoch=False)
        self._versions = {name: p._version for name, p in self._params.items()}
        self._listen()

    def _refuse_surprises(self) -> None:
        if not self._fed:
            raise UnwatchedStep(self._step)
        for name, version in self._versions.items():
            if self._params[name]._version != version:
                raise ChangedOutside(name, self._step)
        if _group_names(self._params, self._optimizer) != self._groups:
            raise BadOptimizer(f"its parameter groups changed before step {self._step}; a run has fixed groups")

    def _noted(self) -> Step:
        grads = self._grads()
        size = norm(grads)
        if not torch.isfinite(torch.tensor(size)):
            raise Diverged(self._step, size)
        return Step(
            index=self._step,
            fed=tuple(Fed(y.samples, y.epoch, y.digest, y.random or None, y.content is not None) for y in self._fed),
            settings=tuple(settings_of(group) for group in self._optimizer.param_groups),
            norm=size,
            idle=tuple(name for group in self._groups for name in group if name not in grads),
            evaluating=self._evaluating,
        )

    def _prove(self, step: Step, state: State) -> None:
        with preserved(self._task.data):
            stored = [y.content for y in self._fed]
            batches = tuple(
                self._task.batch(y.samples) if content is None else content
                for y, content in zip(self._fed, stored, strict=True)
            )
            update = Update(self._kind, self._groups, step.settings)
            self._proof.check(Transition(self._task, update, step, batches), state, self._grads())

    def _keep(self, state: State) -> None:
        self._writer.keep_state(self._step, state)
        self._kept.append(self._step)
        dropped = self._policy.drops(self._kept, self._step)
        self._writer.drop_states(dropped)
        self._kept = [number for number in self._kept if number not in dropped]

    def _live(self) -> Tree:
        return {name: parameter.detach() for name, parameter in self._params.items()}

    def _grads(self) -> Tree:
        names = [name for group in self._groups for name in group]
        return {name: grad for name in names if (grad := self._params[name].grad) is not None}

    def _moments(self) -> dict[str, Tree]:
        names = [name for group in self._groups for name in group]
        states = {name: self._optimizer.state.get(self._params[name]) for name in names}
        return {name: tree for name, state in states.items() if state and (tree := tensors_of(state))}


@final
@dataclass(frozen=True, slots=True)
class Watched:
    """The batches of a loader while the recorder notes them; one pass over it is one epoch."""

    recorder: Recorder
    overheard: Overheard

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.overheard)

    def __iter__(self) -> Iterator[Batch]:
        """The loader's batches, unchanged."""
        opens = True
        for samples, batch in self.overheard:
            self.recorder.yielded(samples, batch, opens_epoch=opens)
            opens = False
            yield batch


def _group_names(params: dict[str, nn.Parameter], optimizer: Optimizer) -> tuple[tuple[str, ...], ...]:
    names = {id(parameter): name for name, parameter in params.items()}
    groups = [[(id(p), tuple(p.shape)) for p in group["params"]] for group in optimizer.param_groups]
    foreign = [shape for group in groups for key, shape in group if key not in names]
    if foreign:
        raise BadOptimizer(
            f"it holds {len(foreign)} tensors that are not the task model's (shapes {foreign[:3]}); "
            "give the task the model whose parameters the optimizer was made of"
        )
    return tuple(tuple(names[key] for key, _ in group) for group in groups)
