"""Which training samples made this model what it is, and when.

>>> import backtrail
>>> "Task" in dir(backtrail)
True
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"

# `import backtrail` takes no time: a name imports its module, and torch with it, when first used.
_HOME = {
    "BacktrailError": "backtrail.errors",
    "Task": "backtrail.task.task",
    "ClipNorm": "backtrail.task.clipping",
    "ClipValue": "backtrail.task.clipping",
    "classification": "backtrail.task.presets",
    "regression": "backtrail.task.presets",
    "language_model": "backtrail.task.language",
    "TokenMean": "backtrail.task.language",
    "Averaged": "backtrail.queries",
    "Loss": "backtrail.queries",
    "Logit": "backtrail.queries",
    "Margin": "backtrail.queries",
    "Feature": "backtrail.queries",
    "Saliency": "backtrail.queries",
    "Parameter": "backtrail.queries",
    "Custom": "backtrail.queries",
    "Query": "backtrail.queries",
    "Part": "backtrail.queries",
    "Recorder": "backtrail.record.recorder",
    "WatchedLoader": "backtrail.record.recorder",
    "CheckpointPolicy": "backtrail.record.policy",
    "Every": "backtrail.record.policy",
    "Epochs": "backtrail.record.policy",
    "Geometric": "backtrail.record.policy",
    "Only": "backtrail.record.policy",
    "Last": "backtrail.record.policy",
    "Run": "backtrail.run.run",
    "Verification": "backtrail.run.run",
    "State": "backtrail.step.state",
    "Step": "backtrail.step.state",
    "open_run": "backtrail.run.run",
    "Method": "backtrail.methods.method",
    "DIT": "backtrail.methods.dit.dit",
    "PathIntegrated": "backtrail.methods.path_integrated.path_integrated",
    "TracIn": "backtrail.methods.gradient_dot.tracin",
    "GradientDot": "backtrail.methods.gradient_dot.tracin",
    "DataValueEmbedding": "backtrail.methods.dve.dve",
    "Embeddings": "backtrail.methods.dve.embeddings",
    "open_embeddings": "backtrail.methods.dve.embeddings",
    "DiffIn": "backtrail.methods.diff_in.diff_in",
    "Checkpoints": "backtrail.methods.diff_in.checkpoints",
    "Curvature": "backtrail.curvature.policies",
    "Hessian": "backtrail.curvature.policies",
    "GaussNewton": "backtrail.curvature.policies",
    "EmpiricalFisher": "backtrail.curvature.policies",
    "Zero": "backtrail.curvature.policies",
    "Tangent": "backtrail.optim.slopes",
    "Secant": "backtrail.optim.slopes",
    "leave_one_out": "backtrail.methods.retrain.retrain",
    "retrain": "backtrail.methods.retrain.retrain",
    "Retrained": "backtrail.methods.retrain.retrain",
    "Influence": "backtrail.influence.influence",
    "open_influence": "backtrail.influence.influence",
    "patterns": "backtrail.influence.analysis.patterns",
    "select_coreset": "backtrail.apply.coreset",
    "compare_coresets": "backtrail.apply.coreset_report",
    "trust": "backtrail.apply.trust",
    "Trust": "backtrail.apply.trust",
    "DerivativeCheck": "backtrail.apply.trust",
    "RemovalCheck": "backtrail.apply.trust",
    "Interval": "backtrail.stats",
    "evaluate": "backtrail.apply.evaluation",
    "regimes": "backtrail.apply.select_by_regime",
    "Regimes": "backtrail.influence.analysis.regimes",
    "worth_selecting": "backtrail.apply.select_by_regime",
    "forget": "backtrail.apply.unlearning",
    "judge_forgetting": "backtrail.apply.unlearning_report",
    "Forgotten": "backtrail.apply.unlearning_report",
    "find_mislabeled": "backtrail.apply.cleaning",
    "acceleration": "backtrail.accel.switch",
}

__all__ = ["__version__", "plot", *_HOME]  # noqa: PLE0604 - all of them are strings

if TYPE_CHECKING:
    from backtrail import plot as plot
    from backtrail.accel.switch import acceleration as acceleration
    from backtrail.apply.cleaning import find_mislabeled as find_mislabeled
    from backtrail.apply.coreset import select_coreset as select_coreset
    from backtrail.apply.coreset_report import compare_coresets as compare_coresets
    from backtrail.apply.evaluation import evaluate as evaluate
    from backtrail.apply.select_by_regime import regimes as regimes
    from backtrail.apply.select_by_regime import worth_selecting as worth_selecting
    from backtrail.apply.trust import DerivativeCheck as DerivativeCheck
    from backtrail.apply.trust import RemovalCheck as RemovalCheck
    from backtrail.apply.trust import Trust as Trust
    from backtrail.apply.trust import trust as trust
    from backtrail.apply.unlearning import forget as forget
    from backtrail.apply.unlearning_report import Forgotten as Forgotten
    from backtrail.apply.unlearning_report import judge_forgetting as judge_forgetting
    from backtrail.curvature.policies import Curvature as Curvature
    from backtrail.curvature.policies import EmpiricalFisher as EmpiricalFisher
    from backtrail.curvature.policies import GaussNewton as GaussNewton
    from backtrail.curvature.policies import Hessian as Hessian
    from backtrail.curvature.policies import Zero as Zero
    from backtrail.errors import BacktrailError as BacktrailError
    from backtrail.influence.analysis.patterns import patterns as patterns
    from backtrail.influence.analysis.regimes import Regimes as Regimes
    from backtrail.influence.influence import Influence as Influence
    from backtrail.influence.influence import open_influence as open_influence
    from backtrail.methods.diff_in.checkpoints import Checkpoints as Checkpoints
    from backtrail.methods.diff_in.diff_in import DiffIn as DiffIn
    from backtrail.methods.dit.dit import DIT as DIT
    from backtrail.methods.dve.dve import DataValueEmbedding as DataValueEmbedding
    from backtrail.methods.dve.embeddings import Embeddings as Embeddings
    from backtrail.methods.dve.embeddings import open_embeddings as open_embeddings
    from backtrail.methods.gradient_dot.tracin import GradientDot as GradientDot
    from backtrail.methods.gradient_dot.tracin import TracIn as TracIn
    from backtrail.methods.method import Method as Method
    from backtrail.methods.path_integrated.path_integrated import PathIntegrated as PathIntegrated
    from backtrail.methods.retrain.retrain import Retrained as Retrained
    from backtrail.methods.retrain.retrain import leave_one_out as leave_one_out
    from backtrail.methods.retrain.retrain import retrain as retrain
    from backtrail.optim.slopes import Secant as Secant
    from backtrail.optim.slopes import Tangent as Tangent
    from backtrail.queries import Averaged as Averaged
    from backtrail.queries import Custom as Custom
    from backtrail.queries import Feature as Feature
    from backtrail.queries import Logit as Logit
    from backtrail.queries import Loss as Loss
    from backtrail.queries import Margin as Margin
    from backtrail.queries import Parameter as Parameter
    from backtrail.queries import Part as Part
    from backtrail.queries import Query as Query
    from backtrail.queries import Saliency as Saliency
    from backtrail.record.policy import CheckpointPolicy as CheckpointPolicy
    from backtrail.record.policy import Epochs as Epochs
    from backtrail.record.policy import Every as Every
    from backtrail.record.policy import Geometric as Geometric
    from backtrail.record.policy import Last as Last
    from backtrail.record.policy import Only as Only
    from backtrail.record.recorder import Recorder as Recorder
    from backtrail.record.recorder import WatchedLoader as WatchedLoader
    from backtrail.run.run import Run as Run
    from backtrail.run.run import Verification as Verification
    from backtrail.run.run import open_run as open_run
    from backtrail.stats import Interval as Interval
    from backtrail.step.state import State as State
    from backtrail.step.state import Step as Step
    from backtrail.task.clipping import ClipNorm as ClipNorm
    from backtrail.task.clipping import ClipValue as ClipValue
    from backtrail.task.language import TokenMean as TokenMean
    from backtrail.task.language import language_model as language_model
    from backtrail.task.presets import classification as classification
    from backtrail.task.presets import regression as regression
    from backtrail.task.task import Task as Task


def __getattr__(name: str) -> object:
    """Import the module that defines a public name, and remember the name.

    Raises:
        AttributeError: There is no such public name.
    """
    if name == "plot":
        return import_module("backtrail.plot")
    if name not in _HOME:
        # With `obj`, Python's traceback proposes the public name that is spelled most alike.
        module = sys.modules[__name__]
        raise AttributeError(f"module 'backtrail' has no attribute {name!r}", name=name, obj=module)
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted(__all__)
