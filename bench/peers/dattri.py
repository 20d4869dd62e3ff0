"""dattri's attributors. Losses are functions of flat parameters and one row, as it documents."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from dattri.algorithm.dvemb import DVEmbAttributor
from dattri.algorithm.influence_function import IFAttributorEKFAC
from dattri.algorithm.tracin import TracInAttributor
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from bench.cases import TrainedCase
from bench.peers import dimensions

BATCH = 256
DIMENSIONS = 512  # dattri's default
Params = Mapping[str, Tensor]
Loss = Callable[[Params, tuple[Tensor, Tensor]], Tensor]


def row_loss(trained: TrainedCase, model: nn.Module) -> Loss:
    """The loss of one row without a batch axis."""

    def loss(params: Params, data: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = (tensor.unsqueeze(0) for tensor in data)
        return trained.losses(functional_call(model, dict(params), (inputs,)), targets)[0]

    return loss


def batch_loss(trained: TrainedCase, model: nn.Module) -> Loss:
    """The mean loss of a batch."""

    def loss(params: Params, data: tuple[Tensor, Tensor]) -> Tensor:
        return trained.losses(functional_call(model, dict(params), (data[0],)), data[1]).mean()

    return loss


def loaders(
    trained: TrainedCase, queries: TensorDataset
) -> tuple["DataLoader[Any]", "DataLoader[Any]"]:
    """Training set and queries, in order."""
    return DataLoader(trained.train, batch_size=BATCH), DataLoader(queries, batch_size=BATCH)


def tracin(trained: TrainedCase, queries: TensorDataset, *, project: bool = True) -> np.ndarray:
    """Gradient dot products at the checkpoints, times the learning rate."""
    model = trained.model()
    weights, rates = zip(*trained.checkpoints, strict=True)
    task = AttributionTask(row_loss(trained, model), model, list(weights))
    attributor = TracInAttributor(task, torch.tensor(rates), normalized_grad=False)
    if not project:
        attributor.projector_kwargs = None  # the constructor puts the default in place of None
    return attributor.attribute(*loaders(trained, queries)).T.numpy()


def ekfac(trained: TrainedCase, queries: TensorDataset) -> np.ndarray:
    """Influence function with the inverse Fisher matrix by EK-FAC."""
    model = trained.model()
    task = AttributionTask(batch_loss(trained, model), model, trained.checkpoints[-1][0])
    attributor = IFAttributorEKFAC(task)
    train, asked = loaders(trained, queries)
    attributor.cache(train)
    return attributor.attribute(train, asked).T.detach().numpy()


def trak(trained: TrainedCase, queries: TensorDataset) -> np.ndarray:
    """TRAK of one checkpoint, with the log-odds that dattri's own benchmarks use."""
    model = trained.model()
    loss = row_loss(trained, model)

    def odds(params: Params, data: tuple[Tensor, Tensor]) -> Tensor:
        log = -loss(params, data)
        return log - torch.log1p(-torch.exp(log))

    def correct(params: Params, data: tuple[Tensor, Tensor]) -> Tensor:
        return torch.exp(-loss(params, data))

    task = AttributionTask(odds, model, trained.checkpoints[-1][0])
    attributor = TRAKAttributor(task, correct, projector_kwargs={"proj_dim": dimensions(trained)})
    train, asked = loaders(trained, queries)
    attributor.cache(train)
    return attributor.attribute(asked).T.detach().numpy()


def dvemb(trained: TrainedCase, queries: TensorDataset, *, factors: str = "none") -> np.ndarray:
    """Data value embeddings, summed over the visits of a sample."""
    scores = embedded(trained, factors=factors).attribute(
        DataLoader(queries, batch_size=trained.case.slots)
    )
    return padded(scores.T.detach().numpy(), trained)


def embedded(
    trained: TrainedCase, *, factors: str, dimensions: int = DIMENSIONS
) -> DVEmbAttributor:
    """Data value embeddings, gathered while the training is run again batch by batch."""
    model, optimizer = trained.case.begin()

    def factored(model: nn.Module, data: tuple[Tensor, Tensor], device: object) -> Tensor:
        del device
        return trained.losses(model(data[0]), data[1]).mean()

    loss = row_loss(trained, model) if factors == "none" else factored
    task = AttributionTask(loss, model, trained.checkpoints[-1][0])
    attributor = DVEmbAttributor(task, proj_dim=dimensions, factorization_type=factors)
    for step in trained.run.log:
        rows = torch.tensor(step.samples)
        batch = tuple(tensor[rows] for tensor in trained.train.tensors)
        model.eval()  # else BatchNorm would count the batch twice
        attributor.cache_gradients(step.fed[-1].epoch, batch, rows, float(step.settings[0]["lr"]))  # type: ignore[arg-type]
        model.train()
        optimizer.zero_grad()
        cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten()).backward()
        optimizer.step()
    attributor.cache()
    return attributor


def padded(scores: np.ndarray, trained: TrainedCase) -> np.ndarray:
    """Rows after the last that was visited have no embedding, and no influence."""
    return np.pad(scores, ((0, 0), (0, len(trained.train) - scores.shape[1])))
