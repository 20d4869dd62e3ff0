"""`backtrail` itself."""

from typing import Literal

import numpy as np
from torch.utils.data import TensorDataset

import backtrail
from bench.cases import TrainedCase

Curvature = Literal["Hessian", "GaussNewton", "EmpiricalFisher", "Zero", "auto"]


def exact(
    trained: TrainedCase,
    queries: TensorDataset,
    *,
    curvature: Curvature = "Hessian",
    slope: Literal["Tangent", "Secant"] = "Tangent",
) -> np.ndarray:
    """One sweep over the recording for all queries; "auto" first re-runs and sweeps a few times."""
    policy = curvature if curvature == "auto" else getattr(backtrail, curvature)()
    dit = backtrail.DIT(curvature=policy, slope=getattr(backtrail, slope)())
    return dit.attribute(trained.run, backtrail.Loss(queries)).total()[:, 0]


def product(
    trained: TrainedCase, queries: TensorDataset, *, method: Literal["TracIn", "GradientDot"]
) -> np.ndarray:
    """A product of gradients."""
    return (
        getattr(backtrail, method)().attribute(trained.run, backtrail.Loss(queries)).total()[:, 0]
    )
