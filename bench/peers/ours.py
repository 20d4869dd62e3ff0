"""`whence` itself."""

from typing import Literal

import numpy as np
from torch.utils.data import TensorDataset

import whence
from bench.cases import TrainedCase

Curvature = Literal["Hessian", "GaussNewton", "EmpiricalFisher", "Zero"]


def exact(
    trained: TrainedCase,
    queries: TensorDataset,
    *,
    curvature: Curvature = "Hessian",
    slope: Literal["Tangent", "Secant"] = "Tangent",
) -> np.ndarray:
    """One sweep over the recording for all queries."""
    dit = whence.DIT(curvature=getattr(whence, curvature)(), slope=getattr(whence, slope)())
    return dit.attribute(trained.run, whence.Loss(queries)).total()[:, 0]
