"""Several threads: every answer is that of one thread, and the process is left as it was."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils.data import DataLoader

import backtrail
from backtrail.exclusive import exclusive
from backtrail.run.run import Run
from tests.loops import Loop, bytes_of, mlp, recorded_loop, stochastic_mlp
from tests.processes import in_fresh_process

# The answers of one run, by name: what a thread may ask for, and gets as comparable bytes.
Answers = Mapping[str, Callable[[], object]]
PATIENCE = 120.0  # seconds after which a thread that waits counts as deadlocked


@pytest.fixture
def switching() -> Iterator[None]:
    """Let threads take turns fifty times as often as Python does by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def dropout_and_batchnorm(path: Path) -> Run:
    """A recorded training that draws masks and moves statistics."""
    loop = Loop.of(stochastic_mlp())
    return recorded_loop(loop, path, partial(loop.train, epochs=1))


def plain(answer: object) -> object:
    """An answer as something whose equality is that of its bits."""
    if isinstance(answer, np.ndarray):
        return answer.dtype, answer.shape, answer.tobytes()
    if isinstance(answer, Tensor):
        return plain(answer.detach().numpy())
    if isinstance(answer, pl.DataFrame):
        return answer.to_dicts()
    if isinstance(answer, dict):
        return {name: plain(entry) for name, entry in answer.items()}
    return answer


def answers_of(run: Run) -> Answers:
    """Public entries that replay the run, and differ in what they change meanwhile."""
    queries = backtrail.Loss(run.task.data, samples=[0, 1, 2])
    embedding = backtrail.DataValueEmbedding(rank=8)
    few_states = backtrail.DiffIn(checkpoints=2, batch=8)
    return {
        "sweep": lambda: backtrail.DIT().attribute(run, queries, observed_at="epochs").total(),
        "tracin": lambda: backtrail.TracIn().attribute(run, queries).total(),
        "gradient dot": lambda: backtrail.GradientDot().attribute(run, queries).total(),
        "embedding": lambda: embedding.attribute(run, queries).total(),
        "diff-in": lambda: few_states.self_influence(run, [0, 1, 2]),
        "re-runs": lambda: backtrail.leave_one_out(run, queries, samples=[0, 1]),
        "verification": lambda: run.verify().difference,
        "states": lambda: [bytes_of(state) for _, state in run.walk(0, run.steps)],
        "mislabeled": lambda: backtrail.find_mislabeled(run, method="el2n"),
    }


def together(*works: Callable[[], object]) -> list[object]:
    """Results of functions that each run in a thread of their own, all at once.

    An error in one of them is raised here.
    """
    results: list[object] = [None] * len(works)
    errors: list[BaseException] = []
    ready = threading.Barrier(len(works))

    def work(place: int) -> None:
        try:
            ready.wait(PATIENCE)
            results[place] = works[place]()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread waits for another one that waits for it"
    for error in errors:
        raise error
    return results


def ask(answers: Answers, names: Sequence[str]) -> dict[str, object]:
    """Some of the answers, in an order of the thread's own."""
    return {name: plain(answers[name]()) for name in names}


def assert_threads_agree(first: Answers, second: Answers, rounds: Iterable[Sequence[str]]) -> None:
    """Ask the same in two threads at once, in opposite orders, and compare with one thread."""
    expected_first = ask(first, list(first))
    expected_second = expected_first if second is first else ask(second, list(second))
    for names in rounds:
        found = together(partial(ask, first, names), partial(ask, second, names[::-1]))
        assert found[0] == {name: expected_first[name] for name in names}
        assert found[1] == {name: expected_second[name] for name in names}


def some(answers: Answers) -> Answers:
    """Few of them, for a test that takes a few seconds."""
    return {name: answers[name] for name in ("sweep", "states", "re-runs")}


@pytest.mark.usefixtures("switching")
def test_two_threads_with_a_run_each_get_the_bits_of_one(tmp_path: Path) -> None:
    """Generators, attention kernels and checkpoint functions belong to the whole process."""
    first = some(answers_of(dropout_and_batchnorm(tmp_path / "first")))
    second = some(answers_of(dropout_and_batchnorm(tmp_path / "second")))
    assert_threads_agree(first, second, [list(first)])


@pytest.mark.usefixtures("switching")
def test_two_threads_on_one_run_get_the_bits_of_one(tmp_path: Path) -> None:
    """Train/eval modes, and the statistics that BatchNorm layers collect, belong to the task."""
    answers = some(answers_of(dropout_and_batchnorm(tmp_path / "run")))
    assert_threads_agree(answers, answers, [list(answers)])


@pytest.mark.slow
@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize("runs", [1, 2])
def test_threads_agree_for_twenty_rounds(runs: int, tmp_path: Path) -> None:
    """Every entry beside every other one: a race may need several tries."""
    first = answers_of(dropout_and_batchnorm(tmp_path / "first"))
    second = answers_of(dropout_and_batchnorm(tmp_path / "second")) if runs == 2 else first
    names = list(first) * 4
    assert_threads_agree(first, second, [names[start : start + 3] for start in range(20)])


@pytest.mark.usefixtures("switching")
def test_a_thread_that_makes_tensors_meanwhile_gets_float32(tmp_path: Path) -> None:
    """The default dtype is never touched, not even for the first step of a new optimizer."""
    run = dropout_and_batchnorm(tmp_path / "run")
    queries = backtrail.Loss(run.task.data, samples=[0, 1])
    finished = threading.Event()
    seen: set[torch.dtype] = set()

    def make_tensors() -> None:
        while not finished.is_set():
            seen.add(torch.tensor([1.0, 2.0]).dtype)

    def attribute() -> None:
        try:
            backtrail.DIT().attribute(run, queries)
            backtrail.DataValueEmbedding(rank=8, follow="optimizer").embed(run)
        finally:
            finished.set()

    together(make_tensors, attribute)
    assert seen == {torch.float32}


def process_state(task: backtrail.Task) -> dict[str, object]:
    """What calls change while they run, as it is now."""
    modules = {"live": task.model, "skeleton": task.binding}
    cuda = torch.backends.cuda
    return {
        "generator": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "default dtype": torch.get_default_dtype(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "attention": (
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
        ),
        "checkpoint": (
            checkpoint._checkpoint_without_reentrant_generator,
            checkpoint.CheckpointFunction,
        ),
        "grad": torch.is_grad_enabled(),
        "modes": {
            (kind, name): module.training
            for kind, model in modules.items()
            for name, module in model.named_modules()
        },
    }


def test_the_process_is_left_as_it_was(tmp_path: Path) -> None:
    """Generators, default dtype, kernels and modes are the same after every call."""
    run = dropout_and_batchnorm(tmp_path / "run")
    before = process_state(run.task)
    for name, answer in answers_of(run).items():
        answer()
        assert process_state(run.task) == before, name


class BrokenLossError(Exception):
    """What the loss below raises."""


class BreakingLoss:
    """A loss that can be told to fail at one of its next calls."""

    def __init__(self) -> None:
        self.calls_left = sys.maxsize

    def __call__(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of each row.

        Raises:
            BrokenLossError: No call is left.
        """
        self.calls_left -= 1
        if self.calls_left < 0:
            raise BrokenLossError
        return nn.functional.cross_entropy(outputs, batch[1], reduction="none")


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_call_that_fails_leaves_the_process_as_it_was(calls: int, tmp_path: Path) -> None:
    """Also the lock is free again, for any thread."""
    recording = dropout_and_batchnorm(tmp_path / "run")
    loss = BreakingLoss()
    task = replace(recording.task, loss=loss)
    run = backtrail.open_run(recording.path, task)
    before = process_state(run.task)
    failed = set()
    for name, answer in answers_of(run).items():
        loss.calls_left = calls
        try:
            answer()
        except BrokenLossError:
            failed.add(name)
        assert process_state(run.task) == before, name
        assert together(enter_and_leave) == [True]
    assert {"sweep", "tracin", "embedding", "diff-in"} <= failed


@exclusive
def enter_and_leave() -> bool:
    """A call that needs the lock, and nothing else."""
    return True


def test_a_generator_holds_nothing_between_its_steps(tmp_path: Path) -> None:
    """Another thread may call while the first looks at a state."""
    run = dropout_and_batchnorm(tmp_path / "run")
    before = process_state(run.task)
    expected = [bytes_of(state) for _, state in run.walk(0, run.steps)]
    found = []
    for _, state in run.walk(0, run.steps):
        assert together(enter_and_leave) == [True]
        assert process_state(run.task) == before
        found.append(bytes_of(state))
    assert found == expected


@exclusive
def wait_inside(inside: threading.Event, leave: threading.Event) -> None:
    """Say that the call is inside, and stay there."""
    inside.set()
    leave.wait(PATIENCE)


@contextmanager
def another_thread_inside() -> Iterator[None]:
    """While the block runs, another thread is inside a call."""
    inside, leave = threading.Event(), threading.Event()
    thread = threading.Thread(target=wait_inside, args=(inside, leave), daemon=True)
    thread.start()
    assert inside.wait(PATIENCE)
    try:
        yield
    finally:
        leave.set()
        thread.join(PATIENCE)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Have SIGINT raise KeyboardInterrupt: background jobs of a shell start with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_thread_that_waits_can_be_interrupted(tmp_path: Path) -> None:
    """Ctrl-C ends a call that waits for another thread, as it ends any other."""
    run = dropout_and_batchnorm(tmp_path / "run")
    main = threading.main_thread().ident
    assert main == threading.get_ident()
    interrupt = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
    with another_thread_inside():
        interrupt.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run.verify()
        assert time.monotonic() - began < PATIENCE / 2
    assert together(run.verify)[0] == run.verify()


def fork_beside_a_call() -> int:
    """Exit status of a child that was forked while another thread is inside a call."""
    with another_thread_inside():
        return exit_status_of_child()


@exclusive
def fork_inside_a_call() -> int:
    """Exit status of a child whose own thread is inside the call, and leaves it there."""
    return exit_status_of_child()


def exit_status_of_child() -> int:
    """Fork; the child makes a call. A child that hangs is killed, whose status is negative."""
    child = os.fork()
    if child == 0:
        signal.alarm(int(PATIENCE))
        os._exit(0 if enter_and_leave() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
@pytest.mark.parametrize("fork", [fork_beside_a_call, fork_inside_a_call])
def test_a_forked_child_waits_for_no_thread_of_its_parent(fork: Callable[[], int]) -> None:
    """The workers of a loader are such children."""
    assert in_fresh_process(fork) == 0


def in_order(loop: Loop) -> "DataLoader[Any]":
    """Batches that take no random number: a loader draws a seed, so it has a generator."""
    return loop.loader(shuffle=False, generator=torch.Generator())


@pytest.mark.usefixtures("switching")
def test_a_training_that_draws_nothing_may_go_on_beside(tmp_path: Path) -> None:
    """Its weights, its recording and the other thread's answers are those of one thread."""
    alone = Loop.of(mlp())
    alone.train(lambda loader: loader, in_order(alone), epochs=4)
    run = dropout_and_batchnorm(tmp_path / "run")
    queries = backtrail.Loss(run.task.data, samples=[0, 1, 2])

    def attribute() -> object:
        return plain(backtrail.DIT().attribute(run, queries).total())

    expected = attribute()
    beside = Loop.of(mlp())
    finished = threading.Event()

    def train() -> None:
        try:
            with beside.recorder(tmp_path / "beside") as recorder:
                beside.train(recorder.watch, in_order(beside), epochs=4)
        finally:
            finished.set()

    def attribute_meanwhile() -> list[object]:
        found = [attribute()]
        while not finished.is_set():
            found.append(attribute())
        return found

    _, found = together(train, attribute_meanwhile)
    assert isinstance(found, list)
    assert all(answer == expected for answer in found)
    assert bytes_of(beside.current_state()) == bytes_of(alone.current_state())
    assert backtrail.open_run(tmp_path / "beside", beside.task()).verify().difference == 0.0
