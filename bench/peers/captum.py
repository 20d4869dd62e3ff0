"""Captum's influence functions, per-sample gradients by its batched hooks (Linear and Conv2d)."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.influence import TracInCP
from captum.influence._core.arnoldi_influence_function import (
    ArnoldiInfluenceFunction,  # exported nowhere else
)
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from bench.cases import TrainedCase

BATCH = 256


class Summed:
    """The loss, summed over rows, as Captum wants it for its batched gradients."""

    reduction = "sum"

    def __init__(self, trained: TrainedCase) -> None:
        self.trained = trained

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum over the rows."""
        return self.trained.losses(outputs, targets).sum()


def load(model: nn.Module, path: str) -> float:
    """Put a checkpoint into the model; its learning rate."""
    weights, rate = torch.load(path)
    model.load_state_dict(weights)
    return rate


def arguments(trained: TrainedCase, model: nn.Module) -> dict[str, Any]:
    """What both methods are told."""
    layers = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    return {
        "checkpoints_load_func": load,
        "layers": layers,
        "loss_fn": Summed(trained),
        "batch_size": BATCH,
        "sample_wise_grads_per_batch": True,
    }


def saved(trained: TrainedCase, folder: str) -> list[str]:
    """Write the checkpoints to files; their paths."""
    paths = [str(Path(folder) / f"{number}.pt") for number in range(len(trained.checkpoints))]
    for path, checkpoint in zip(paths, trained.checkpoints, strict=True):
        torch.save(checkpoint, path)
    return paths


def tracin(trained: TrainedCase, queries: TensorDataset) -> np.ndarray:
    """Gradient dot products at the checkpoints, times the learning rate."""
    model = trained.model()
    with tempfile.TemporaryDirectory() as folder:
        tracer = TracInCP(model, trained.train, saved(trained, folder), **arguments(trained, model))
        return tracer.influence(queries.tensors, show_progress=False).numpy()


def hessian_rows(trained: TrainedCase) -> "Dataset[Any]":
    """All rows; a few where 200 Hessian products with all would take longer than all the rest."""
    return (
        trained.train
        if trained.case.kind == "mlp"
        else Subset(trained.train, range(min(BATCH, len(trained.train))))
    )


def arnoldi(trained: TrainedCase, queries: TensorDataset) -> np.ndarray:
    """Influence function with the inverse Hessian's largest directions."""
    model = trained.model()
    with tempfile.TemporaryDirectory() as folder:
        path = saved(trained, folder)[-1]
        function = ArnoldiInfluenceFunction(
            model,
            trained.train,
            path,
            hessian_dataset=hessian_rows(trained),
            **arguments(trained, model),
        )
        return function.influence(queries.tensors, show_progress=False).numpy()
