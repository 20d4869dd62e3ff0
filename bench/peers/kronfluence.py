"""Kronfluence: influence functions with Kronecker-factored curvature, Linear and Conv2d modules."""

import logging
import tempfile

import numpy as np
import torch
from kronfluence import Analyzer, FactorArguments, Task, prepare_model
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bench.cases import TrainedCase

BATCH = 256
Batch = tuple[Tensor, Tensor]


class Losses(Task):
    """The case's loss, to train on and to ask about."""

    def __init__(self, trained: TrainedCase) -> None:
        self.trained = trained

    def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:  # noqa: FBT001, FBT002
        """Sum over the rows; with `sample`, of labels drawn from the model."""
        outputs, targets = model(batch[0]), batch[1]
        if sample:
            chances = outputs.detach().flatten(0, -2).softmax(-1)
            targets = torch.multinomial(chances, 1).view_as(targets)
        return self.trained.losses(outputs, targets).sum()

    def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
        """The same loss."""
        return self.compute_train_loss(batch, model)


def influence(trained: TrainedCase, queries: TensorDataset, *, strategy: str) -> np.ndarray:
    """Fit the factors, then score all pairs."""
    torch.manual_seed(0)  # it draws labels
    task = Losses(trained)
    model = prepare_model(trained.model(), task)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "table",
            model,
            task,
            cpu=True,
            disable_tqdm=True,
            log_level=logging.ERROR,
            output_dir=folder,
        )
        factors = FactorArguments(strategy=strategy)
        analyzer.fit_all_factors(
            "factors", trained.train, per_device_batch_size=BATCH, factor_args=factors
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            query_dataset=queries,
            train_dataset=trained.train,
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=BATCH,
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"].numpy()
