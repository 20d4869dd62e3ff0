"""TRAK by its authors, in its slow path for CPUs."""

import logging
import tempfile
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset
from trak import TRAKer

from bench.cases import TrainedCase
from bench.peers import dimensions

BATCH = 256


def trak(trained: TrainedCase, queries: TensorDataset) -> np.ndarray:
    """TRAK of one checkpoint."""
    logging.disable(logging.INFO)
    model, weights = trained.model(), trained.checkpoints[-1][0]
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "save_dir": folder,
            "device": "cpu",
            "proj_dim": dimensions(trained),
            "use_half_precision": False,
        }
        tracer = TRAKer(model, "image_classification", len(trained.train), **settings)
        tracer.load_checkpoint(weights, model_id=0)
        for batch in DataLoader(trained.train, batch_size=BATCH):
            tracer.featurize(batch, num_samples=len(batch[0]))
        tracer.finalize_features()
        tracer.start_scoring_checkpoint("queries", weights, model_id=0, num_targets=len(queries))
        for batch in DataLoader(queries, batch_size=BATCH):
            tracer.score(batch, num_samples=len(batch[0]))
        return torch.as_tensor(np.array(tracer.finalize_scores("queries"))).T.numpy()
