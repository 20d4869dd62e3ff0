"""Records a training from inside its loop.

The optimizer's pre-hook describes the update that is about to be made; its post-hook appends it to
the step log. A step that a GradScaler skips is not a step of the run. Nothing in this module draws
random numbers or writes to a tensor of the training.
"""

import logging
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.weak import WeakIdKeyDictionary

from backtrail import arguments
from backtrail.accel.allocator import trim
from backtrail.errors import (
    BadOptimizer,
    BadSetting,
    ChangedOptimizerState,
    ChangedOutside,
    ComplexParameter,
    Diverged,
    NotEntered,
    OtherOptimizer,
    RenormalizedEmbedding,
    RunExists,
    UnwatchedStep,
)
from backtrail.exclusive import exclusive
from backtrail.record.backward_hooks import BatchTracker
from backtrail.record.listeners import CaptureMethod
from backtrail.record.loaders import IdStream, TrackedLoader, check_data, check_loader
from backtrail.record.outside_changes import OutsideChanges
from backtrail.record.policy import CheckpointPolicy, Every
from backtrail.record.randomness import preserved_generators
from backtrail.record.self_check import GradientCheck, called_by_scaler, reread_batch
from backtrail.run.check import layouts
from backtrail.run.manifest import MANIFEST_NAME, Manifest
from backtrail.run.store import Writer
from backtrail.step.optimizers import find_rule
from backtrail.step.state import Setting, State, Step, settings_of
from backtrail.step.step import Transition
from backtrail.step.update import Update
from backtrail.task.preserved_objects import preserved_objects
from backtrail.task.task import Batch, Task
from backtrail.task.torch_compile import parameters
from backtrail.tree import Tree, norm
from backtrail.tree import cast as cast_to

log = logging.getLogger(__name__)


@final
class Recorder:
    """Context manager that records a training.

    Loop over `recorder.watch(loader)` instead of the loader, and change nothing else.

    >>> from tempfile import TemporaryDirectory
    >>> from backtrail.task.presets import regression
    >>> data = torch.utils.data.TensorDataset(torch.ones(4, 2), torch.zeros(4, 1))
    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> scratch = TemporaryDirectory()
    >>> folder = Path(scratch.name) / "run"
    >>> with Recorder(folder, regression(model, data), optimizer) as recorder:
    ...     for inputs, targets in recorder.watch(DataLoader(data, batch_size=2)):
    ...         nn.functional.mse_loss(model(inputs), targets).backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    >>> sorted(path.name for path in folder.iterdir())
    ['manifest.json', 'states', 'steps']
    >>> scratch.cleanup()

    Every step is written when it is made, so a training that is killed leaves a run that is
    complete up to its last step. At steps 0, 1, 4, 16, 64, ... the recorder computes the gradient
    itself. Where it differs from the loop's, the task does not describe the training, and
    `UnexplainedGradient` is raised.

    Args:
        path: Folder of the run; it must not hold a run yet.
        task: Model, data and loss; its model is the live one.
        optimizer: The only optimizer of the training.
        checkpoints: Which states are stored; by default `Every(50)`.
        keep_batches: Store the batches themselves, for rows that cannot be read again (random
            augmentation).
        tolerance: Relative difference up to which the replayed gradient counts as equal to the
            loop's; by default 1e-9 in float64, 5e-2 under autocast, else 1e-3.
        capture: A `DataValueEmbedding` that is to capture its per-sample gradients from the passes
            of the training itself.

    Raises:
        UnsupportedOptimizer: The optimizer's update has no derivative.
        BadOptimizer: There are several optimizers, or one that holds tensors outside of the model.
        ComplexParameter: The optimizer trains complex numbers.
        RenormalizedEmbedding: A trained embedding has `max_norm`.
        BadSetting: An argument has an invalid value.
        UnreadableData: The task's data set cannot be read by row number.
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
        capture: CaptureMethod | None = None,
    ) -> None:
        folder = arguments.folder("path", path)
        arguments.instance("task", task, Task, "a backtrail.Task")
        if not isinstance(optimizer, Optimizer):
            raise BadOptimizer(
                f"got a {type(optimizer).__name__}; a run has one torch.optim optimizer"
            )
        if capture is not None and not isinstance(capture, CaptureMethod):
            raise BadSetting("capture", capture, "a backtrail.DataValueEmbedding")
        check_data(task)
        if checkpoints is not None:
            expected = "a checkpoint policy such as backtrail.Every(50), or None"
            arguments.instance("checkpoints", checkpoints, CheckpointPolicy, expected)  # type: ignore[type-abstract]
        tolerance = arguments.tolerance("tolerance", tolerance)
        keep_batches = arguments.flag("keep_batches", keep_batches)
        self._folder = folder
        self._task = task
        self._optimizer = optimizer
        self._optimizer_name = find_rule(type(optimizer)).name
        self._policy = Every(50) if checkpoints is None else checkpoints
        # Where batches carry ids, nothing can be read by row number.
        self._keep_batches = keep_batches or task.ids is not None
        self._params = parameters(task.model)
        self._groups = _group_names(self._params, optimizer)
        self._trained = {name: self._params[name] for group in self._groups for name in group}
        for name, parameter in self._trained.items():
            if parameter.is_complex():
                raise ComplexParameter(name, parameter.dtype)
        _check_embeddings(task.model, self._trained)
        self._self_check = GradientCheck(tolerance)
        self._capture = capture
        self._tracker = BatchTracker(task, self._trained)
        # One wrapper per loader, so that a loader with persistent workers starts them only once.
        self._tracked_loaders: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._kept: list[int] = []
        self._epoch = -1
        self._last_epoch = -1  # of the last step
        self._pending: Step | None = None  # described by the pre-hook, not made yet
        self._upcoming_state: State | None = None  # before the coming step, if a listener needed it
        self._changes = OutsideChanges(self._params, self._trained, optimizer)
        # Writes to the parameters when the last batch was yielded; empty after a step.
        self._writes_at_batch: dict[str, int] = {}
        self._is_recording = False  # inside the `with` block

    def __enter__(self) -> "Recorder":
        """Create the folder of the run and install the hooks.

        Raises:
            RunExists: The folder holds a run already.
        """
        if (self._folder / MANIFEST_NAME).exists():
            raise RunExists(self._folder)
        manifest = self._manifest()
        self._kept = []
        self._writer = Writer(self._folder, manifest)
        if self._capture is not None:
            self._tracker.listener = self._capture.start_capture(
                self._task,
                manifest,
                self._trained,
                write_file=self._writer.add_file,
                upcoming_update=self._upcoming_update,
            )
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        self._tracker.install_hooks()
        self._is_recording = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the hooks; store the final state, unless the loop raised an error.

        Raises:
            OtherOptimizer: The gradient of the last batches was consumed by another optimizer.
        """
        self._is_recording = False
        self._tracker.remove_hooks()
        for hook in self._hooks:
            hook.remove()
        if self._tracker.listener is not None:
            self._tracker.listener.close()
        if error is not None:
            # The manifest keeps `finished: false`; the run is complete up to its last step.
            self._writer.close()
            return
        changed = self._changes.changed_parameters()
        consumed_elsewhere = bool(changed) and self._tracker.has_gradient()
        if changed and not consumed_elsewhere:
            # The run itself is complete, so a long training must not fail at its very end.
            log.warning(
                "parameter %r changed after the last step: "
                "the run ends with the state that the last step left",
                changed[0],
            )
        if not changed:
            buffers = self._tracker.buffers_after_last_step()
            self._keep_state(State(self._live_params(), buffers, self._changes.moments()))
        self._writer.finish()
        if consumed_elsewhere:
            raise OtherOptimizer(changed[0], self._tracker.step, self._optimizer_name)

    def watch(self, loader: Iterable[Batch]) -> "WatchedLoader":
        """Iterate over a loader's batches, unchanged, and record which samples are in each.

        Args:
            loader: A `DataLoader` over the task's data set; with `Task(ids=...)` any iterable of
                batches. Each pass over the result is one epoch.

        Raises:
            UnwatchableLoader: The loader's batches could not be read again.
        """
        if self._task.ids is not None:
            return WatchedLoader(self, IdStream(loader, self._task))
        check_loader(loader, self._task)
        if loader not in self._tracked_loaders:
            self._tracked_loaders[loader] = TrackedLoader(cast("DataLoader[Any]", loader))
        return WatchedLoader(self, self._tracked_loaders[loader])

    def fed(self, batch: Batch, *, depends_on_model: bool = True) -> None:
        """Declare that the model is fed `batch` instead of the batch last yielded.

        For transformations inside the loop, such as mixup or augmentation on the GPU. Call it right
        before the forward pass. The batch is stored in the run.

        Influence and retrainings hold what is fed constant. That is right for content that does not
        depend on the model. Where it does (outputs of a teacher that averages the model's weights,
        a hidden state carried over, targets or mined negatives computed from the model), both lack
        the way through it, so `trust` cannot see the difference, and says so.

        Args:
            batch: What the model is fed: the same samples in the same slots.
            depends_on_model: Whether its content may depend on the model at this or an earlier
                step; False says that it does not.

        Raises:
            NotEntered: The recorder is used without `with`.
            UnwatchedStep: No batch was yielded yet.
            OtherSlots: It has another number of rows, or is no batch.
        """
        if not self._is_recording:
            raise NotEntered(self._folder)
        self._tracker.batch_replaced(batch, may_depend_on_model=depends_on_model)

    def yielded(self, samples: tuple[int, ...], batch: Batch, *, opens_epoch: bool) -> None:
        """Record the batch that is about to be handed to the loop; `watch` calls this.

        Args:
            samples: Row numbers or ids, in slot order.
            batch: Its content.
            opens_epoch: Whether it is the first of its epoch.

        Raises:
            NotEntered: The recorder is used without `with`, so nothing would be stored.
            OtherOptimizer: Another optimizer consumed the gradient of the batch before.
        """
        if not self._is_recording:
            raise NotEntered(self._folder)
        self._check_consumption()
        if opens_epoch:
            self._epoch += 1
        self._tracker.batch_yielded(samples, batch, epoch=self._epoch, keep=self._keep_batches)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Describe the step that the optimizer is about to make, and check it where that is due.

        The step is logged afterwards, by `_after_step`. Its batches are on disk before the log
        entry that refers to them, so a process killed at any instant leaves no entry without its
        batches. A state may reach the disk later: a run is complete without it, except for state 0,
        which the writer waits for.

        Raises:
            BadOptimizer: step() was given a closure.
        """
        # Wrappers of an optimizer, such as Accelerate's, pass `closure=None` by position.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            raise BadOptimizer(
                "step(closure) evaluates the loss inside the step; call step() without one"
            )
        # A GradScaler calls a fused optimizer even where the step is skipped, and says so here.
        if bool(getattr(optimizer, "found_inf", None)):
            self._check_unchanged()
            return
        self._check_loop()
        step = self._describe_step()
        consumed = self._tracker.consumed
        # The buffers are those before the first forward pass of the step: where a replay starts.
        state = State(self._live_params(), consumed[0].buffers, self._changes.moments())
        if self._is_checkpoint(step):
            self._keep_state(state)
        if any(record.stored for record in step.fed):
            self._writer.keep_batches(step.index, tuple(live.content for live in consumed))
        check_gradient = self._self_check.is_due(step)
        check_capture = self._notify_listener(step, state)
        if check_gradient or check_capture:
            self._check_step(
                step, state, check_gradient=check_gradient, check_capture=check_capture
            )
        self._pending = step

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Log the step once the optimizer has made it; a skipped step has no description."""
        del optimizer, args, kwargs
        if self._pending is None:
            # A fused optimizer that skips a step counts it, and takes that back: two writes.
            if self._changes.started:
                self._changes.remember()
            return
        self._writer.log(self._pending)
        self._last_epoch = self._pending.fed[-1].epoch
        self._pending = None
        self._upcoming_state = None
        self._tracker.step_taken()
        self._changes.remember()
        self._writes_at_batch = {}

    def _check_loop(self) -> None:
        """Raise where the loop does something that a run cannot represent.

        Raises:
            UnwatchedStep: No watched batch led to the gradients.
            ChangedOutside: Something else than the optimizer wrote to a parameter.
            ChangedOptimizerState: Something else than its steps changed the optimizer's state.
            BadOptimizer: The parameter groups are not those of the start.
        """
        step = self._tracker.step
        if not any(live.contributes for live in self._tracker.consumed):
            raise UnwatchedStep(step)
        self._check_unchanged()
        if _group_names(self._params, self._optimizer) != self._groups:
            raise BadOptimizer(
                f"its parameter groups changed before step {step}; a run has fixed groups"
            )

    def _check_unchanged(self) -> None:
        """Raise where this step does not start from what the step before it left.

        Raises:
            ChangedOutside: Something else than the optimizer wrote to a parameter.
            ChangedOptimizerState: Something else than its steps changed the optimizer's state.
        """
        step = self._tracker.step
        changed = self._changes.changed_parameters()
        # Weights that are set before the first step are those that the run starts from.
        if changed and step > 0:
            raise ChangedOutside(changed[0], step)
        changed_moments = self._changes.changed_moments()
        if changed_moments:
            raise ChangedOptimizerState(changed_moments[0], step)

    def _check_consumption(self) -> None:
        """Raise where the gradient of a watched batch went into another optimizer's step.

        The recorded optimizer's hooks see nothing of such a step, so it is found when the next
        batch is requested: parameters changed without a recorded step. Weights that a loop swaps in
        for an evaluation, and out again before it goes on, are no such change.

        Raises:
            OtherOptimizer: Parameters were changed.
        """
        if not self._changes.started:
            self._changes.remember_parameters()
        writes = self._changes.parameter_writes()
        changed_since_batch = bool(self._writes_at_batch) and writes != self._writes_at_batch
        self._writes_at_batch = writes
        if not (changed_since_batch or self._tracker.has_gradient()):
            return
        changed = self._changes.changed_parameters()
        if changed:
            raise OtherOptimizer(changed[0], self._tracker.step, self._optimizer_name)

    def _describe_step(self) -> Step:
        """Return the log entry of the coming step.

        Raises:
            Diverged: The gradient is NaN or infinite.
        """
        tracker = self._tracker
        grads = self._consumed_gradient()
        size = norm(grads)
        if not math.isfinite(size):
            raise Diverged(tracker.step, size)
        return Step(
            index=tracker.step,
            fed=tuple(live.as_record() for live in tracker.consumed),
            settings=self._settings(),
            norm=size,
            unused=tuple(name for name in self._trained if name not in grads),
            evaluating=tracker.evaluating,
            autocast=tracker.autocast,
        )

    def _is_checkpoint(self, step: Step) -> bool:
        if step.index == 0:
            return True
        epoch = step.fed[-1].epoch
        opens_epoch = epoch if epoch != self._last_epoch else None
        return self._policy.keeps(step.index, opens_epoch=opens_epoch)

    def _keep_state(self, state: State) -> None:
        """Store the state before the coming step, then delete those that the policy drops."""
        number = self._tracker.step
        self._writer.keep_state(number, state)
        self._kept.append(number)
        dropped = self._policy.drops(self._kept, number)
        self._writer.drop_states(dropped)
        self._kept = [kept for kept in self._kept if kept not in dropped]

    def _notify_listener(self, step: Step, state: State) -> bool:
        """Hand the step to the listener, if there is one; return whether it wants a check."""
        listener = self._tracker.listener
        if listener is None:
            return False
        captured = [live.captured for live in self._tracker.consumed]
        batches = cast_to(tuple(one.batch for one in captured), None, self._task.device)
        transition = self._transition(step, batches)
        grads = self._consumed_gradient()
        # A listener may replay some samples with labels sampled from the model.
        before_step = exclusive(listener.before_step)
        return before_step(transition, state, captured, consumed=grads)

    @exclusive
    def _check_step(
        self, step: Step, state: State, *, check_gradient: bool, check_capture: bool
    ) -> None:
        """Replay the step from what was recorded, and compare it with what the loop did.

        It happens before the update, while the live parameters are still those of the state.
        """
        task = self._task
        holders = task.user_objects
        grads = self._consumed_gradient()
        # The loop's own pass left holes in the heap that a second pass would not fit into.
        trim()
        # Reading rows and running the model draws random numbers, which the loop must not notice.
        # Their own memory (a counter in the loss) must not change either.
        with preserved_objects(*holders, step=step.index), preserved_generators(holders):
            batches = tuple(reread_batch(task, step.index, live) for live in self._tracker.consumed)
            transition = self._transition(step, batches)
            if check_gradient:
                # The backward pass left the gradient multiplied by a GradScaler's scale.
                unclipped = None if called_by_scaler() else self._tracker.unclipped_norm()
                self._self_check.check(transition, state, grads, unclipped_norm=unclipped)
        if check_capture and self._tracker.listener is not None:
            tolerance = self._self_check.tolerance(step, grads)
            # From the same memory as the first check.
            with preserved_objects(*holders, step=step.index), preserved_generators(holders):
                self._tracker.listener.check(transition, state, tolerance=tolerance)
        trim()

    def _transition(self, step: Step, batches: tuple[Batch, ...]) -> Transition:
        return Transition(self._task, self._update(step.settings), step, batches)

    def _update(self, settings: tuple[dict[str, Setting], ...]) -> Update:
        return Update(self._optimizer_name, self._groups, settings)

    def _upcoming_update(self) -> tuple[Update, State]:
        """Update as the optimizer would make it now, and the state before it, without buffers."""
        if self._upcoming_state is None:
            self._upcoming_state = State(self._live_params(), {}, self._changes.moments())
        return self._update(self._settings()), self._upcoming_state

    def _settings(self) -> tuple[dict[str, Setting], ...]:
        """Every hyperparameter of every parameter group."""
        settings: list[dict[str, Setting]] = []
        for group in self._optimizer.param_groups:
            # torch stores names of its own here; the manifest has ours.
            options = {key: value for key, value in group.items() if key != "param_names"}
            settings.append(settings_of(options))
        return tuple(settings)

    def _live_params(self) -> Tree:
        return {name: parameter.detach() for name, parameter in self._params.items()}

    def _consumed_gradient(self) -> Tree:
        """Gradient that the optimizer is about to consume, without the scale of a GradScaler."""
        grads = {name: p.grad for name, p in self._trained.items() if p.grad is not None}
        # Only a fused optimizer has this attribute: it divides by the scale inside its own kernel.
        scale: Tensor | None = getattr(self._optimizer, "grad_scale", None)
        if scale is None:
            return grads
        return {name: grad / scale for name, grad in grads.items()}

    def _manifest(self) -> Manifest:
        return Manifest(
            id=uuid.uuid4().hex,
            optimizer=self._optimizer_name,
            groups=self._groups,
            params=layouts(self._task.parameters()),
            buffers=layouts(self._task.buffers()),
            samples=len(self._task.data) if self._task.ids is None else None,
            policy=str(self._policy),
            device=str(self._task.device),
            torch=str(torch.__version__),
        )


@final
@dataclass(frozen=True, slots=True, repr=False)
class WatchedLoader:
    """A loader whose batches are recorded: what :meth:`backtrail.Recorder.watch` returns.

    Iterate over it instead of the loader: the batches are the loader's own, unchanged, and one pass
    is one epoch.

    Attributes:
        recorder: The recorder that notes the samples of each batch.
        batches: The loader, with the samples of each batch.
    """

    recorder: Recorder
    batches: TrackedLoader | IdStream

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one epoch."""
        opens_epoch = True
        for samples, batch in self.batches:
            self.recorder.yielded(samples, batch, opens_epoch=opens_epoch)
            opens_epoch = False
            yield batch

    def __repr__(self) -> str:
        """The kind of the loader."""
        return f"WatchedLoader({type(self.batches).__name__})"


def _group_names(
    params: dict[str, nn.Parameter], optimizer: Optimizer
) -> tuple[tuple[str, ...], ...]:
    """Names of the parameters in every group of the optimizer.

    Raises:
        BadOptimizer: it holds tensors that are not the model's.
    """
    names = {id(parameter): name for name, parameter in params.items()}
    groups: list[tuple[str, ...]] = []
    foreign: list[tuple[int, ...]] = []
    for group in optimizer.param_groups:
        members: list[str] = []
        for parameter in group["params"]:
            if id(parameter) in names:
                members.append(names[id(parameter)])
            else:
                foreign.append(tuple(parameter.shape))
        groups.append(tuple(members))
    if foreign:
        raise BadOptimizer(
            f"it holds {len(foreign)} tensors that are not the task model's "
            f"(shapes {foreign[:3]}); pass the model whose parameters the optimizer holds to the "
            "task"
        )
    return tuple(groups)


def _check_embeddings(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
    """Check that no embedding writes to its own weight.

    Raises:
        RenormalizedEmbedding: one has `max_norm`, and is trained.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or module.max_norm is None:
            continue
        if any(module.weight is parameter for parameter in trained.values()):
            raise RenormalizedEmbedding(name, module.max_norm)
