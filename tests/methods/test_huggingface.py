"""Models of `transformers` and `peft` pass the exactness test, and usual loops with them work."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import backtrail
from tests.gate import BAR, Cell, cells
from tests.huggingface import ROWS, adapted, gpt2, texts, tokenizers, transformers
from tests.loops import adam, backward

# The old names, which peft uses as well.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("cell", cells(ROWS), ids=str)
def test_influence_equals_nudging_each_weight(cell: Cell, tmp_path: Path) -> None:
    """Influence differs from brute force by at most 1e-6 of the largest."""
    assert cell.error(tmp_path / "run") <= BAR


def test_their_own_padding_collator(tmp_path: Path) -> None:
    """A tokenizer's rows, its padding collator and the model's own loss can be recorded."""
    words = ["[PAD]", "[UNK]", "the", "owl", "dog", "says", "hoot", "woof"]
    plain = tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(words)}, unk_token="[UNK]"
    )
    built = tokenizers.Tokenizer(plain)
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=built, pad_token="[PAD]")
    lines = ("the owl says hoot", "owl hoot", "the dog says woof", "dog", "the dog says")
    data: Any = [tokenizer(line) for line in lines]
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    model = gpt2().train()
    task = backtrail.language_model(model, data, collate=collate, reduce=backtrail.TokenMean())
    optimizer = adam(model)
    loader: DataLoader[object] = DataLoader(
        data, batch_sampler=[[0, 1], [2, 4], [3], [1, 3, 2]], collate_fn=collate
    )
    with backtrail.Recorder(tmp_path, task, optimizer) as recorder:
        for batch in (batch for _ in range(2) for batch in recorder.watch(loader)):
            backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    run = backtrail.open_run(tmp_path, task)
    influence = backtrail.DIT().attribute(run, backtrail.Loss(data, samples=[0, 4]))
    derivative = backtrail.trust(run, influence, removals=2).derivative
    assert derivative
    assert derivative.passed
    assert (influence.total()[:, :, 3] == 0).all()  # a single word predicts nothing, alone or not


@pytest.mark.parametrize("make", [gpt2, adapted])
def test_accumulation_with_a_mean_over_the_steps_tokens(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    """The trainer's loss, divided by the tokens of the whole step, can be replayed."""
    model = make().train()
    data: Any = texts(prompt=1)
    task = backtrail.language_model(model, data, reduce=backtrail.TokenMean())
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-6
    )
    loader: DataLoader[dict[str, torch.Tensor]] = DataLoader(
        data, batch_sampler=[[0, 1], [2, 4], [3, 1], [2, 0]]
    )
    counts = [(batch["labels"][:, 1:] != -100).sum() for batch in loader]
    with backtrail.Recorder(tmp_path, task, optimizer) as recorder:
        for number, batch in enumerate(recorder.watch(loader)):
            first = number - number % 2
            backward(model(**batch, num_items_in_batch=counts[first] + counts[first + 1]).loss)
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
    run = backtrail.open_run(tmp_path, task)
    run.verify()
    for curvature in (
        backtrail.Hessian(),
        backtrail.GaussNewton(),
        backtrail.Hessian(product="difference"),
    ):
        total = (
            backtrail.DIT(curvature=curvature)
            .attribute(run, backtrail.Loss(data, samples=[0]))
            .total()
        )
        assert (total != 0).all()


@pytest.mark.parametrize("make", [gpt2, adapted])
def test_gradient_checkpointing_changes_nothing(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    """Activation checkpointing does not change the influence, and the model keeps it."""
    data: Any = texts(prompt=1)
    totals = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model: Any = make().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        learning = [p for p in model.parameters() if p.requires_grad]
        task = backtrail.language_model(model, data, reduce=backtrail.TokenMean())
        optimizer = torch.optim.SGD(learning, lr=0.1, momentum=0.9)
        with backtrail.Recorder(tmp_path / str(checkpointing), task, optimizer) as recorder:
            for batch in recorder.watch(DataLoader(data, batch_size=2)):
                backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
        assert (
            any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
            == checkpointing
        )
        run = backtrail.open_run(tmp_path / str(checkpointing), task)
        run.verify()
        totals.append(backtrail.DIT().attribute(run, backtrail.Loss(data, samples=[0])).total())
    assert (totals[0] != 0).all()
    assert totals[1] == pytest.approx(totals[0], rel=1e-4)


def test_a_warm_up_from_zero(tmp_path: Path) -> None:
    """GPT-2 under AdamW with a linear warm-up from 0 and decay to 0: exact, also at a rate of 0."""
    rows: Any = texts(prompt=1)
    order = [[0, 1], [2, 4], [3, 1], [2, 0]]

    def train(
        recorder: Callable[[nn.Module, torch.optim.Optimizer], Any] | None = None,
        nudged: tuple[int, float] = (-1, 0.0),
    ) -> nn.Module:
        torch.manual_seed(3)
        model = gpt2().double().train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [0.0, 0.5, 1.0, 0.0].__getitem__)
        loader: DataLoader[dict[str, torch.Tensor]] = DataLoader(rows, batch_sampler=order)
        with nullcontext() if recorder is None else recorder(model, optimizer) as entered:
            batches = loader if entered is None else entered.watch(loader)
            for step, batch in enumerate(batches):
                weights = torch.ones(2, dtype=torch.float64)
                if step == nudged[0]:
                    weights[0] += nudged[1]
                losses = task_of(model).losses_of(model(**batch), batch)
                backward((losses * weights).mean())
                optimizer.step()
                if step < len(order) - 1:
                    schedule.step()
                optimizer.zero_grad()
        return model

    def task_of(model: nn.Module) -> backtrail.Task:
        return backtrail.language_model(model, rows)

    def query(model: nn.Module) -> torch.Tensor:
        batch = task_of(model).batch([2, 3])
        return task_of(model).losses_of(model(**batch), batch).mean()

    def record(model: nn.Module, optimizer: torch.optim.Optimizer) -> backtrail.Recorder:
        return backtrail.Recorder(tmp_path, task_of(model), optimizer)

    model = train(recorder=record)
    run = backtrail.open_run(tmp_path, task_of(model))
    found = backtrail.DIT().attribute(run, backtrail.Custom(query)).values()[0, 0, :, 0]
    truth = []
    for step in range(len(order)):
        ends = [float(query(train(nudged=(step, size)).eval()).detach()) for size in (1e-5, -1e-5)]
        truth.append(-(ends[0] - ends[1]) / 2e-5)
    # Step 0 moves nothing itself, but its gradient stays in the moments; step 3 is the last one.
    assert abs(truth[0]) > 1e-6
    assert truth[3] == 0
    assert found == pytest.approx(truth, rel=1e-6, abs=1e-9)
