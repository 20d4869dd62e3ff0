"""The states that a run stores are those that the loop went through."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import backtrail
from backtrail.record.policy import CheckpointPolicy
from backtrail.run import journal
from backtrail.run.store import journal_file
from backtrail.step.state import State
from tests.loops import Augmented, Loop, backward, bytes_of, mlp, recorded_loop, stochastic_mlp

POLICIES: list[tuple[CheckpointPolicy, tuple[int, ...]]] = [
    (backtrail.Every(5), (0, 5, 10, 15, 18)),
    (backtrail.Every(100), (0, 18)),
    (backtrail.Epochs(), (0, 6, 12, 18)),
    (backtrail.Epochs(2), (0, 12, 18)),
    (backtrail.Geometric(2.0), (0, 1, 2, 4, 8, 16, 18)),
    (backtrail.Only((3, 17)), (0, 3, 17, 18)),
    (backtrail.Last(3), (0, 16, 17, 18)),
]


def on_disk(path: Path) -> list[int]:
    """Return the states that have a file."""
    return sorted(int(file.stem) for file in (path / "states").iterdir())


@pytest.mark.parametrize(("policy", "kept"), POLICIES, ids=str)
def test_states_are_those_of_the_live_loop(
    policy: CheckpointPolicy, kept: tuple[int, ...], tmp_path: Path
) -> None:
    """Stored states have the bits of the loop's, and the others replay to them."""
    loop = Loop.of(stochastic_mlp())
    run = recorded_loop(
        loop, tmp_path / "run", lambda watch: loop.train(watch, epochs=3), checkpoints=policy
    )
    assert run.kept == kept == tuple(on_disk(run.path))
    assert len(loop.states) == run.steps + 1 == 19
    for number, lived in enumerate(loop.states):
        if number in kept:
            assert bytes_of(run.state(number)) == bytes_of(lived)
        assert_close(run.state(number, replay=True), lived)


def assert_close(found: State, lived: State) -> None:
    """Assert that two states are equal up to rounding."""
    torch.testing.assert_close(
        (found.params, found.buffers, found.moments), (lived.params, lived.buffers, lived.moments)
    )


def test_a_state_has_the_buffers_before_the_first_of_its_batches(tmp_path: Path) -> None:
    """State t has the statistics before the first forward pass of step t."""
    loop = Loop.of(stochastic_mlp())

    def train(watch: Any) -> None:
        for number, batch in enumerate(loop.saving_states(watch(loop.loader()))):
            backward(cross_entropy(loop.model(batch[0]), batch[1]) / 2)
            if number % 2:
                loop.step()

    run = recorded_loop(loop, tmp_path / "run", train, checkpoints=backtrail.Every(1))
    for number, lived in enumerate(loop.states[::2]):
        assert bytes_of(run.state(number)) == bytes_of(lived)


def test_the_final_state_is_what_the_last_step_left(tmp_path: Path) -> None:
    """Evaluation after the last step does not change the last state."""
    loop = Loop.of(stochastic_mlp())

    def train(watch: Any) -> None:
        loop.train(watch)
        loop.model.eval()
        loop.model(loop.data.tensors[0])

    run = recorded_loop(loop, tmp_path / "run", train)
    assert bytes_of(run.state(run.steps)) == bytes_of(loop.current_state())


class Wandering(nn.Module):
    """A layer whose output depends on buffers that its forward pass changes in several ways."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("seen", torch.ones(8))
        self.register_buffer("drift", torch.zeros(8))
        self.register_buffer("large", torch.ones(70_000))
        self.count: Tensor
        self.seen: Tensor
        self.drift: Tensor
        self.large: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        """Scale by what was seen so far."""
        if self.training:
            self.count += 1
            self.large += 0.5
            self.seen = self.seen + inputs.detach().mean(0)
            self.drift.mul_(0.9).add_(inputs.detach().mean(0), alpha=0.1)
        return inputs * self.seen * self.large[0] / self.count + self.drift


def test_buffers_of_any_kind_are_replayed(tmp_path: Path) -> None:
    """Buffers changed in place or by assignment, large or small, are stored and replayed."""
    loop = Loop.of(mlp(Wandering()))
    run = recorded_loop(loop, tmp_path / "run", checkpoints=backtrail.Every(3))
    for number in run.kept:
        assert bytes_of(run.state(number)) == bytes_of(loop.states[number])


def test_views_of_one_memory_are_kept_apart(tmp_path: Path) -> None:
    """Two buffers that share memory are two tensors in the run."""
    base = torch.arange(6.0)
    layer = nn.Identity()
    layer.register_buffer("all", base)
    layer.register_buffer("again", base.view(2, 3))
    run = recorded_loop(Loop.of(mlp(layer)), tmp_path / "run")
    assert run.state(0).buffers["1.again"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("workers", [0, 2])
def test_stored_batches_replay_random_rows(workers: int, tmp_path: Path) -> None:
    """With `keep_batches=True` rows that read differently every time replay."""
    loop = Loop.of(stochastic_mlp(), data=Augmented(lambda: float(torch.randn(()))))
    run = recorded_loop(
        loop,
        tmp_path / "run",
        lambda watch: loop.train(watch, loop.loader(num_workers=workers)),
        keep_batches=True,
    )
    assert all(fed.stored for step in run.log for fed in step.fed)
    assert_close(run.state(3, replay=True), loop.states[3])
    assert_close(run.state(11, replay=True), loop.states[11])


def mixed(batch: Any) -> Any:
    """Mix a batch with itself in reverse."""
    share = float(torch.rand(()))
    return share * batch[0] + (1 - share) * batch[0].flip(0), batch[1]


@pytest.mark.parametrize("every", [1, 2], ids=["all", "every second"])
def test_what_the_loop_made_of_a_batch_is_replayed(every: int, tmp_path: Path) -> None:
    """Batches given to `fed` are stored, and others of the same step are read again."""
    loop = Loop.of(stochastic_mlp())

    def train(watch: Any) -> None:
        for number, given in enumerate(watch(loop.loader())):
            batch = given
            if number % every == 0:
                batch = mixed(given)
                recorder.fed(batch)
            backward(cross_entropy(loop.model(batch[0]), batch[1]) / 2)
            if number % 2:
                loop.step()

    with loop.recorder(tmp_path / "run") as recorder:
        train(recorder.watch)
    run = backtrail.open_run(tmp_path / "run", loop.task())
    assert run.verify().difference < 1e-5
    stored = [fed.stored for step in run.log for fed in step.fed]
    assert stored == list(itertools.islice(itertools.cycle([True] + [False] * (every - 1)), 6))


class Odd:
    """A value whose text is only its address."""


def collated(items: list[Any]) -> dict[Any, Any]:
    """Collate to nested dicts, lists and plain values, with one tensor in two places."""
    inputs = torch.stack([item[0] for item in items])
    return {
        "x": inputs,
        3: [inputs, None, 1.5, "text"],
        "y": {"label": torch.stack([item[1] for item in items])},
    }


@pytest.mark.parametrize("keep", [True, False])
def test_batches_may_be_nested(tmp_path: Path, *, keep: bool) -> None:
    """Dicts, lists and plain values of a batch are restored from disk."""
    loop = Loop.of(mlp())
    task = backtrail.Task(
        loop.model,
        loop.data,
        lambda outputs, batch: cross_entropy(outputs, batch["y"]["label"], reduction="none"),
        predict=lambda model, batch: model(batch["x"]),
        collate=collated,
    )
    with backtrail.Recorder(tmp_path / "run", task, loop.optimizer, keep_batches=keep) as recorder:
        for batch in recorder.watch(loop.loader(collate_fn=collated)):
            loop.backward((batch["x"], batch["y"]["label"]))
            loop.step()
    run = backtrail.open_run(tmp_path / "run", task)
    assert run.verify().difference < 1e-5
    assert set(run.batches(0)[0]) == {"x", 3, "y"}
    assert run.batches(0)[0][3][1:] == [None, 1.5, "text"]


def test_values_without_content_do_not_disturb(tmp_path: Path) -> None:
    """A value whose text is its address does not make a batch look changed."""
    loop = Loop.of(mlp())

    def collate(items: list[Any]) -> Any:
        return [*torch.utils.data.default_collate(items), Odd()]

    loop.options["collate"] = collate
    recorded_loop(
        loop, tmp_path / "run", lambda watch: loop.train(watch, loop.loader(collate_fn=collate))
    )


def test_a_long_run_turns_its_journal_into_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parquet segments and the journal are read as one log."""
    monkeypatch.setattr("backtrail.run.store.SEGMENT", 5)
    loop = Loop.of(mlp())
    run = recorded_loop(loop, tmp_path / "run")
    assert sorted(file.name for file in (run.path / "steps").iterdir()) == [
        "00000000.parquet",
        "00000005.parquet",
        "00000010.parquet",
    ]
    assert [step.index for step in run.log] == list(range(12))
    assert run.table().height == 12
    loop = Loop.of(mlp())
    with pytest.raises(ValueError, match="stop here"), loop.recorder(tmp_path / "cut") as recorder:
        stop_after(loop, recorder, steps=7)
    assert backtrail.open_run(tmp_path / "cut", loop.task()).steps == 7
    assert sorted(file.name for file in (tmp_path / "cut" / "steps").iterdir()) == [
        "00000000.parquet",
        "00000005.journal",
    ]


def test_a_kill_while_a_journal_becomes_a_segment_loses_no_step(tmp_path: Path) -> None:
    """Journals are read until the manifest names their segments."""
    run = recorded_loop(Loop.of(mlp()), tmp_path / "run")
    path = run.path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["steps/00000000.parquet"]
    path.write_text(json.dumps(manifest))
    for step in run.log:
        first = 0 if step.index < 5 else 5
        journal.append(run.path / journal_file(first), step)
    again = backtrail.open_run(run.path, run.task)
    assert again.log == run.log
    assert again.steps == 12


def stop_after(loop: Loop, recorder: backtrail.Recorder, *, steps: int) -> None:
    """Train some steps, then raise an error."""
    for number, batch in enumerate(recorder.watch(loop.loader(batch_size=2))):
        if number == steps:
            raise ValueError("stop here")
        loop.backward(batch)
        loop.step()


def test_a_loop_that_fails_leaves_the_states_that_were_on_their_way(tmp_path: Path) -> None:
    """States that were handed to the writer are stored when the loop fails."""
    loop = Loop.of(stochastic_mlp())

    def train(watch: Any) -> None:
        for number, batch in enumerate(watch(loop.loader())):
            loop.backward(batch)
            loop.step()
            if number == 4:
                raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        loop.recorder(tmp_path, checkpoints=backtrail.Every(1)) as recorder,
    ):
        train(recorder.watch)
    assert backtrail.open_run(tmp_path, loop.task()).kept == (0, 1, 2, 3, 4)


def test_a_state_that_cannot_be_written_stops_the_training(tmp_path: Path) -> None:
    """An error of the writer is raised in the loop."""
    loop = Loop.of(stochastic_mlp())
    with (
        pytest.raises(OSError, match="states"),
        loop.recorder(tmp_path, checkpoints=backtrail.Every(1)) as recorder,
    ):
        for number, batch in enumerate(recorder.watch(loop.loader())):
            if number == 2:
                (tmp_path / "states").rename(tmp_path / "elsewhere")
                (tmp_path / "states").touch()
            loop.backward(batch)
            loop.step()
