"""Dropout draws the same under torch.func as in a training loop, for any memory layout."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn.functional import cross_entropy, dropout
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.task.dropout import SameDropout

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "permuted": lambda x: x.permute(2, 0, 3, 1),
    "cut": lambda x: x.permute(2, 0, 1, 3)[:, :, 1:],
    "expanded": lambda x: x[:1].expand(3, 2, 5, 4),
    "a number": lambda x: x.sum(),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_mask_is_that_of_a_training_loop(
    layout: Callable[[Tensor], Tensor], *, inplace: bool
) -> None:
    """With gradients, with a stack, and with both."""
    inputs = torch.arange(1.0, 121).view(3, 2, 5, 4)

    def loss(x: Tensor) -> Tensor:
        return dropout(layout(x).clone(), 0.3, inplace=inplace).log1p().sum()

    def drawn(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return function(x)

    expected = drawn(loss, inputs)
    with SameDropout():
        assert drawn(loss, inputs) == expected
        assert drawn(lambda x: grad_and_value(loss)(x)[1], inputs) == expected
        stacked = drawn(
            vmap(lambda x: grad_and_value(loss)(x)[1], randomness="same"), torch.stack([inputs] * 3)
        )
        torch.testing.assert_close(stacked, expected.expand(3))


def test_nothing_is_dropped_in_eval_mode() -> None:
    """Nor with a rate of zero."""
    inputs = torch.ones(5)
    with SameDropout():
        assert dropout(inputs, 0.3, training=False) is inputs
        assert dropout(inputs, 0.0) is inputs


class Encoder(nn.Module):
    """Classes of short sequences."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores of the classes."""
        scores: Tensor = self.head(self.layer(inputs).mean(1))
        return scores


def test_an_encoder_with_dropout_is_recorded_and_replayed(tmp_path: Path) -> None:
    """Its layers drop out entries of transposed tensors."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(16, 5, 8), torch.randint(0, 3, (16,)))
    model = Encoder()
    task, optimizer = backtrail.classification(model, data), torch.optim.AdamW(model.parameters())
    with backtrail.Recorder(tmp_path / "run", task, optimizer) as recorder:
        for inputs, labels in recorder.watch(DataLoader(data, batch_size=8)):
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    run = backtrail.open_run(tmp_path / "run", task)
    run.verify()
    assert backtrail.DIT().attribute(run, backtrail.Loss(data, samples=[0])).total().any()
