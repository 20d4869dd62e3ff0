"""Which training samples made this model what it is, and when.

>>> import whence
>>> "Task" in dir(whence)
True
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Importing whence stays instant: a name brings its module (and torch with it) when first used.
_HOME = {
    "WhenceError": "whence.errors",
    "Task": "whence.task",
    "ClipNorm": "whence.clipping",
    "ClipValue": "whence.clipping",
    "classification": "whence.tasks",
    "regression": "whence.tasks",
    "language_model": "whence.language",
    "TokenMean": "whence.language",
    "Averaged": "whence.queries",
    "Loss": "whence.queries",
    "Logit": "whence.queries",
    "Margin": "whence.queries",
    "Feature": "whence.queries",
    "Saliency": "whence.queries",
    "Parameter": "whence.queries",
    "Custom": "whence.queries",
    "Recorder": "whence.record.recorder",
    "Every": "whence.record.policy",
    "Epochs": "whence.record.policy",
    "Geometric": "whence.record.policy",
    "Only": "whence.record.policy",
    "Last": "whence.record.policy",
    "Run": "whence.run.run",
    "open_run": "whence.run.run",
    "DIT": "whence.methods.dit",
    "TracIn": "whence.methods.tracin",
    "GradientDot": "whence.methods.tracin",
    "DataValueEmbedding": "whence.methods.embedding.value_embedding",
    "Embeddings": "whence.methods.embedding.embeddings",
    "open_embeddings": "whence.methods.embedding.embeddings",
    "DiffIn": "whence.methods.few_states.diff_in",
    "Checkpoints": "whence.methods.few_states.checkpoints",
    "Hessian": "whence.replay.curvature",
    "GaussNewton": "whence.replay.curvature",
    "EmpiricalFisher": "whence.replay.curvature",
    "Zero": "whence.replay.curvature",
    "Tangent": "whence.replay.slope",
    "Secant": "whence.replay.slope",
    "leave_one_out": "whence.methods.again.retrain",
    "retrain": "whence.methods.again.retrain",
    "Influence": "whence.influence.influence",
    "open_influence": "whence.influence.influence",
    "patterns": "whence.influence.patterns",
    "select_coreset": "whence.apply.coreset",
    "compare_coresets": "whence.apply.comparing",
    "trust": "whence.apply.trust",
    "evaluate": "whence.apply.evaluation",
    "regimes": "whence.apply.timing",
    "worth_selecting": "whence.apply.timing",
    "forget": "whence.apply.forgetting",
    "judge_forgetting": "whence.apply.forgotten",
    "find_mislabeled": "whence.apply.cleaning",
}

__all__ = ["__version__", "plot", *_HOME]  # noqa: PLE0604 - all of them are strings

if TYPE_CHECKING:
    from whence import plot as plot
    from whence.apply.cleaning import find_mislabeled as find_mislabeled
    from whence.apply.comparing import compare_coresets as compare_coresets
    from whence.apply.coreset import select_coreset as select_coreset
    from whence.apply.evaluation import evaluate as evaluate
    from whence.apply.forgetting import forget as forget
    from whence.apply.forgotten import judge_forgetting as judge_forgetting
    from whence.apply.timing import regimes as regimes
    from whence.apply.timing import worth_selecting as worth_selecting
    from whence.apply.trust import trust as trust
    from whence.clipping import ClipNorm as ClipNorm
    from whence.clipping import ClipValue as ClipValue
    from whence.errors import WhenceError as WhenceError
    from whence.influence.influence import Influence as Influence
    from whence.influence.influence import open_influence as open_influence
    from whence.influence.patterns import patterns as patterns
    from whence.language import TokenMean as TokenMean
    from whence.language import language_model as language_model
    from whence.methods.again.retrain import leave_one_out as leave_one_out
    from whence.methods.again.retrain import retrain as retrain
    from whence.methods.dit import DIT as DIT
    from whence.methods.embedding.embeddings import Embeddings as Embeddings
    from whence.methods.embedding.embeddings import open_embeddings as open_embeddings
    from whence.methods.embedding.value_embedding import DataValueEmbedding as DataValueEmbedding
    from whence.methods.few_states.checkpoints import Checkpoints as Checkpoints
    from whence.methods.few_states.diff_in import DiffIn as DiffIn
    from whence.methods.tracin import GradientDot as GradientDot
    from whence.methods.tracin import TracIn as TracIn
    from whence.queries import Averaged as Averaged
    from whence.queries import Custom as Custom
    from whence.queries import Feature as Feature
    from whence.queries import Logit as Logit
    from whence.queries import Loss as Loss
    from whence.queries import Margin as Margin
    from whence.queries import Parameter as Parameter
    from whence.queries import Saliency as Saliency
    from whence.record.policy import Epochs as Epochs
    from whence.record.policy import Every as Every
    from whence.record.policy import Geometric as Geometric
    from whence.record.policy import Last as Last
    from whence.record.policy import Only as Only
    from whence.record.recorder import Recorder as Recorder
    from whence.replay.curvature import EmpiricalFisher as EmpiricalFisher
    from whence.replay.curvature import GaussNewton as GaussNewton
    from whence.replay.curvature import Hessian as Hessian
    from whence.replay.curvature import Zero as Zero
    from whence.replay.slope import Secant as Secant
    from whence.replay.slope import Tangent as Tangent
    from whence.run.run import Run as Run
    from whence.run.run import open_run as open_run
    from whence.task import Task as Task
    from whence.tasks import classification as classification
    from whence.tasks import regression as regression


def __getattr__(name: str) -> object:
    """Import the module a public name lives in, and remember the name.

    Raises:
        AttributeError: There is no such public name.
    """
    if name == "plot":
        return import_module("whence.plot")
    if name not in _HOME:
        raise AttributeError(f"module 'whence' has no attribute {name!r}; it has {sorted(__all__)}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)
