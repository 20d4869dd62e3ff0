"""Records a training beside its loop.

Decisions: the optimizer's pre-hook notes the update as it is about to be made, the post-hook writes
it down; a step that a GradScaler skips is none. Nothing here draws from a generator or writes to a
tensor of the training.
"""

import logging
import math
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.weak import WeakIdKeyDictionary

from backtrail.accel.allocator import trim
from backtrail.errors import (
    BadOptimizer,
    BadSetting,
    ChangedOutside,
    Diverged,
    RunExists,
    UnwatchedStep,
)
from backtrail.exclusive import exclusive
from backtrail.record.backward_hooks import Feeding
from backtrail.record.listeners import Listener
from backtrail.record.loaders import IdStream, TrackedLoader, check_data, check_loader
from backtrail.record.policy import CheckpointPolicy, Every
from backtrail.record.randomness import preserved
from backtrail.record.self_check import Proof, read_again
from backtrail.run.check import layouts
from backtrail.run.manifest import NAME, Manifest
from backtrail.run.store import Writer
from backtrail.step.optimizers import find_rule
from backtrail.step.state import Setting, State, Step, settings_of
from backtrail.step.step import Transition
from backtrail.step.update import Update, tensors_of
from backtrail.task.task import Batch, Task
from backtrail.task.torch_compile import parameters
from backtrail.tree import Tree, norm
from backtrail.tree import cast as cast_to

log = logging.getLogger(__name__)


@final
class Recorder:
    """Records a training: loop over `recorder.watch(loader)` instead of the loader, and change nothing else.

    Args:
        path: folder of the run; it must not hold one yet.
        task: model, data and loss; the model is the live one.
        optimizer: the one optimizer of the training.
        checkpoints: which states are kept.
        keep_batches: store what was fed, for rows that cannot be read again (random augmentation).
        tolerance: relative difference up to which a replayed gradient counts as the loop's; default
            1e-9 in float64, 5e-2 under autocast, else 1e-3.
        capture: a `DataValueEmbedding` whose pass over the training is to be made by the training
            itself.

    Raises:
        UnsupportedOptimizer: the optimizer has no derivative.
        BadOptimizer: several optimizers, or one that holds tensors that are not the model's.
        BadSetting: something else than an embedding is to be captured.
        UnreadableData: the task's data set cannot be read by row number.
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
        capture: Listener | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise BadOptimizer(
                f"got a {type(optimizer).__name__}; a run has one torch.optim optimizer"
            )
        if capture is not None and not isinstance(capture, Listener):
            raise BadSetting("capture", capture, "a backtrail.DataValueEmbedding")
        check_data(task)
        self._kind = find_rule(type(optimizer)).name
        self._folder, self._task, self._optimizer = Path(path), task, optimizer
        self._policy = checkpoints or Every(50)
        self._keep_batches = keep_batches or task.ids is not None  # their rows cannot be read again
        self._params = parameters(task.model)
        self._groups = _group_names(self._params, optimizer)
        self._trained = {name: self._params[name] for group in self._groups for name in group}
        self._proof, self._capture = Proof(tolerance), capture
        self._feeding = Feeding(task, self._trained)
        self._overheard: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._epoch = self._last_epoch = -1
        self._pending: Step | None = None
        self._ahead: State | None = None  # before the coming step, where somebody asked
        self._versions: dict[str, int] = {}

    def __enter__(self) -> "Recorder":
        """Create the run's folder and start listening.

        Raises:
            RunExists: the folder holds a run already.
        """
        if (self._folder / NAME).exists():
            raise RunExists(self._folder)
        manifest, self._kept = self._manifest(), list[int]()
        self._writer = Writer(self._folder, manifest)
        if self._capture is not None:
            of = self._task, manifest, self._trained
            self._feeding.beside = self._capture.beside(*of, keep=self._writer.add, now=self._now)
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        self._feeding.listen()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop listening; keep the final state unless the loop failed."""
        self._feeding.stop()
        for hook in self._hooks:
            hook.remove()
        if self._feeding.beside is not None:
            self._feeding.beside.finish()
        if error is not None:
            self._writer.leave()
            return
        changed = self._changed_outside()
        if changed:
            # The run itself is whole, so a long training must not fail at its very end.
            log.warning(
                "%r changed after the last step; the run ends with the state that the step left",
                changed[0],
            )
        else:
            self._keep(State(self._live(), self._feeding.left(), self._moments()))
        self._writer.finish()

    def watch(self, loader: Iterable[Batch]) -> "Watched":
        """The loader's batches, unchanged; the recorder notes which samples made each.

        With `Task(ids=...)` it may be any iterable of batches.

        Raises:
            UnwatchableLoader: the loader's batches could not be read again.
        """
        if self._task.ids is not None:
            return Watched(self, IdStream(loader, self._task))
        check_loader(loader, self._task)
        if loader not in self._overheard:
            self._overheard[loader] = TrackedLoader(cast("DataLoader[Any]", loader))
        return Watched(self, self._overheard[loader])

    def fed(self, batch: Batch) -> None:
        """Say that the model is fed this instead of the batch last yielded (mixup, augmentation on the GPU).

        It must have the same slots in the same order, and is stored in the run.

        Raises:
            UnwatchedStep: no batch was yielded yet.
            OtherSlots: it has another number of rows.
        """
        self._feeding.replaced(batch)

    def yielded(self, samples: tuple[int, ...], batch: Batch, *, opens_epoch: bool) -> None:
        """Note the batch that is about to be handed to the loop."""
        self._epoch += opens_epoch
        self._feeding.yielded(samples, batch, epoch=self._epoch, keep=self._keep_batches)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        # Wrappers of an optimizer, such as Accelerate's, pass `closure=None` by position.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            raise BadOptimizer(
                "step(closure) evaluates the loss inside the step; call step() without one"
            )
        if bool(getattr(optimizer, "found_inf", None)):
            return  # a fused optimizer is called even where its GradScaler skips the step
        self._refuse_surprises()
        step, consumed = self._noted(), self._feeding.consumed
        state = State(self._live(), consumed[0].buffers, self._moments())
        if self._keeps(step):
            self._keep(state)
        if any(fed.stored for fed in step.fed):
            self._writer.keep_batches(step.index, tuple(y.content for y in consumed))
        due, beside = self._proof.due(step), False
        if self._feeding.beside is not None:
            heard = [y.heard for y in consumed]
            transition = self._transition(
                step, cast_to(tuple(one.batch for one in heard), None, self._task.device)
            )
            # It replays some samples with labels drawn from the model.
            stepped = exclusive(self._feeding.beside.stepped)
            beside = stepped(transition, state, heard, consumed=self._grads())
        if due or beside:
            self._prove(step, state, due=due, beside=beside)
        self._pending = step

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        del optimizer, args, kwargs
        if self._pending is None:
            return
        self._writer.log(self._pending)
        self._last_epoch = self._pending.fed[-1].epoch
        self._pending = self._ahead = None
        self._feeding.stepped()
        self._versions = {name: p._version for name, p in self._params.items()}

    def _refuse_surprises(self) -> None:
        step = self._feeding.step
        if not any(y.contributes for y in self._feeding.consumed):
            raise UnwatchedStep(step)
        changed = self._changed_outside()
        if changed:
            raise ChangedOutside(changed[0], step)
        if _group_names(self._params, self._optimizer) != self._groups:
            raise BadOptimizer(
                f"its parameter groups changed before step {step}; a run has fixed groups"
            )

    def _changed_outside(self) -> list[str]:
        """Parameters that something has written to since the last step."""
        return [
            name
            for name, version in self._versions.items()
            if self._params[name]._version != version
        ]

    def _noted(self) -> Step:
        feeding, grads = self._feeding, self._grads()
        size = norm(grads)
        if not math.isfinite(size):
            raise Diverged(feeding.step, size)
        return Step(
            index=feeding.step,
            fed=tuple(y.noted() for y in feeding.consumed),
            settings=self._settings(),
            norm=size,
            unused=tuple(name for name in self._trained if name not in grads),
            evaluating=feeding.evaluating,
            autocast=feeding.autocast,
        )

    def _keeps(self, step: Step) -> bool:
        epoch = step.fed[-1].epoch
        opens_epoch = epoch if epoch != self._last_epoch else None
        return step.index == 0 or self._policy.keeps(step.index, opens_epoch=opens_epoch)

    def _keep(self, state: State) -> None:
        number = self._feeding.step
        self._writer.keep_state(number, state)
        self._kept.append(number)
        dropped = self._policy.drops(self._kept, number)
        self._writer.drop_states(dropped)
        self._kept = [kept for kept in self._kept if kept not in dropped]

    @exclusive
    def _prove(self, step: Step, state: State, *, due: bool, beside: bool) -> None:
        task, grads, fed = self._task, self._grads(), self._feeding.consumed
        trim()  # a pass of our own would not fit into the holes that the loop's left
        with preserved((task.model, task.predict, task.loss, task.collate, task.data)):
            transition = self._transition(step, tuple(read_again(task, step.index, y) for y in fed))
            if due:
                self._proof.check(transition, state, grads)
            if beside and self._feeding.beside is not None:
                self._feeding.beside.prove(
                    transition, state, tolerance=self._proof.tolerance(step, grads)
                )
        trim()

    def _transition(self, step: Step, batches: tuple[Batch, ...]) -> Transition:
        return Transition(self._task, self._update(step.settings), step, batches)

    def _update(self, settings: tuple[dict[str, Setting], ...]) -> Update:
        return Update(self._kind, self._groups, settings)

    def _now(self) -> tuple[Update, State]:
        """What an update would be at this moment, and the state before it, but for buffers."""
        if self._ahead is None:
            self._ahead = State(self._live(), {}, self._moments())
        return self._update(self._settings()), self._ahead

    def _settings(self) -> tuple[dict[str, Setting], ...]:
        return tuple(map(settings_of, _plain_groups(self._optimizer)))

    def _live(self) -> Tree:
        return {name: parameter.detach() for name, parameter in self._params.items()}

    def _grads(self) -> Tree:
        """What the optimizer is about to consume; a fused one divides by the loss's scale itself."""
        found = {name: p.grad for name, p in self._trained.items() if p.grad is not None}
        scale: Tensor | None = getattr(self._optimizer, "grad_scale", None)
        return found if scale is None else {name: grad / scale for name, grad in found.items()}

    def _moments(self) -> dict[str, Tree]:
        states = {name: self._optimizer.state.get(p) for name, p in self._trained.items()}
        return {
            name: tree for name, state in states.items() if state and (tree := tensors_of(state))
        }

    def _manifest(self) -> Manifest:
        return Manifest(
            id=uuid.uuid4().hex,
            optimizer=self._kind,
            groups=self._groups,
            params=layouts(self._task.parameters()),
            buffers=layouts(self._task.buffers()),
            samples=len(self._task.data) if self._task.ids is None else None,
            policy=str(self._policy),
            device=str(self._task.device),
            torch=str(torch.__version__),
        )


@final
@dataclass(frozen=True, slots=True)
class Watched:
    """The batches of a loader while the recorder notes them; one pass over it is one epoch."""

    recorder: Recorder
    overheard: TrackedLoader | IdStream

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


def _group_names(
    params: dict[str, nn.Parameter], optimizer: Optimizer
) -> tuple[tuple[str, ...], ...]:
    names = {id(parameter): name for name, parameter in params.items()}
    groups = [
        [(id(p), tuple(p.shape)) for p in group["params"]] for group in optimizer.param_groups
    ]
    foreign = [shape for group in groups for key, shape in group if key not in names]
    if foreign:
        raise BadOptimizer(
            f"it holds {len(foreign)} tensors that are not the task model's (shapes {foreign[:3]}); "
            "give the task the model whose parameters the optimizer was made of"
        )
    return tuple(tuple(names[key] for key, _ in group) for group in groups)


def _plain_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The parameter groups without the names that torch keeps of their parameters; the manifest has our own."""
    return [
        {key: value for key, value in group.items() if key != "param_names"}
        for group in optimizer.param_groups
    ]
