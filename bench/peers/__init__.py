"""The methods of the table: `backtrail` and its alternatives, each behind one signature.

    score(trained: TrainedCase, queries: TensorDataset) -> [query, sample]

Positive means helpful, as in `backtrail`: removing the sample raises the query's loss. Every method
is told the same run: its final weights, evenly spaced checkpoints with their learning rates, or the
recording. Settings are the library's defaults except where an adapter says why.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from torch.utils.data import TensorDataset

from bench.cases import QUICK, Case, TrainedCase

Score = Callable[..., np.ndarray]


def dimensions(trained: TrainedCase) -> int:
    """Of TRAK's projection: dattri's default, or fewer where so many cannot be inverted."""
    return min(512, len(trained.train) // 2)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        label: what the row is called.
        library: what must be installed.
        function: the adapter, as module and name under `bench.peers`.
        settings: its keyword arguments.
        counts: numbers of queries to time, beside that of the case.
        reasons: why it cannot do a kind of model, or is not tried with an optimizer, or for all
            cases under "".
        notes: what to know where it can, by the same keys.
    """

    label: str
    library: str
    function: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    counts: tuple[int, ...] = (1,)
    reasons: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For file names."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.label.lower())

    @property
    def installed(self) -> bool:
        """Whether its library is there."""
        return find_spec(self.library) is not None

    def asked(self, case: Case) -> list[int]:
        """Numbers of queries to time."""
        most = QUICK if case.queries == QUICK else max(self.counts, default=0)
        return sorted({count for count in self.counts if count <= most} | {case.queries})

    def refusal(self, case: Case) -> str:
        """Why it cannot do a case; empty if it can."""
        return told(self.reasons, case)

    def note(self, case: Case) -> str:
        """What to know of its figures on a case."""
        return told(self.notes, case)

    def load(self) -> Callable[[TrainedCase, TensorDataset], np.ndarray]:
        """The adapter with its settings."""
        module, _, name = self.function.partition(":")
        score: Score = getattr(import_module(f"bench.peers.{module}"), name)
        return lambda trained, queries: score(trained, queries, **self.settings)


def told(words: Mapping[str, str], case: Case) -> str:
    """All that is said of a case's model and optimizer."""
    return "; ".join(words[key] for key in (case.kind, case.rule, "") if key in words)


LANGUAGE_ONLY = "language models only: see bench/bergson.py"
LINEAR_ONLY = {
    "batchnorm": "Linear and Conv2d only, without BatchNorm's weights",
    "attention": "Linear only, without LayerNorm and embeddings",
    "tokens": "Linear only, without LayerNorm and embeddings",
}
NN_LINEAR = LINEAR_ONLY | {"batchnorm": "Linear only, so the last layer alone"}
ARNOLDI = {kind: f"{words}; Hessian of 256 rows" for kind, words in LINEAR_ONLY.items()}
LINEAR_UPDATE = "the same as without secant: SGD is linear in the gradient"
LINEAR_RULE = {"plain": LINEAR_UPDATE, "sgd": LINEAR_UPDATE}
TWO_AXES = dict.fromkeys(
    ("attention", "tokens"), "inputs with two axes only: raises UnboundLocalError, 'a_prev'"
)
ONE_LABEL = {"tokens": "one label per row: its model outputs are for classification and CLIP"}
AS_SGD = {"adamw": "treats every update as plain SGD", "sgd": "ignores momentum"}

METHODS = [
    Method("backtrail, Hessian", "backtrail", "ours:exact", counts=(1, 16, 64)),
    *(
        Method(f"backtrail, {label}", "backtrail", "ours:exact", settings, (1, 16), rule)
        for label, settings, rule in (
            ("Gauss-Newton", {"curvature": "GaussNewton"}, {}),
            ("empirical Fisher", {"curvature": "EmpiricalFisher"}, {}),
            ("Zero", {"curvature": "Zero"}, {}),
            ("Hessian, secant", {"slope": "Secant"}, LINEAR_RULE),
            ("Gauss-Newton, secant", {"curvature": "GaussNewton", "slope": "Secant"}, LINEAR_RULE),
        )
    ),
    Method("backtrail, auto", "backtrail", "ours:exact", {"curvature": "auto"}, ()),
    Method("backtrail TracIn", "backtrail", "ours:product", {"method": "TracIn"}),
    Method("backtrail gradient-dot", "backtrail", "ours:product", {"method": "GradientDot"}),
    Method("captum TracInCP, 10 checkpoints", "captum", "captum:tracin", notes=LINEAR_ONLY),
    Method(
        "captum Arnoldi influence function", "captum", "captum:arnoldi", counts=(), notes=ARNOLDI
    ),
    Method("dattri TracIn, projection 512", "dattri", "dattri:tracin", counts=()),
    Method("dattri TracIn, no projection", "dattri", "dattri:tracin", {"project": False}),
    Method("dattri DVEmb, projection 512", "dattri", "dattri:dvemb", notes=AS_SGD),
    Method(
        "dattri DVEmb, Kronecker 512",
        "dattri",
        "dattri:dvemb",
        {"factors": "kronecker"},
        notes=NN_LINEAR | AS_SGD,
    ),
    Method("dattri EK-FAC influence", "dattri", "dattri:ekfac", reasons=TWO_AXES, notes=NN_LINEAR),
    Method("dattri TRAK, 1 checkpoint", "dattri", "dattri:trak"),
    Method(
        "kronfluence EK-FAC",
        "kronfluence",
        "kronfluence:influence",
        {"strategy": "ekfac"},
        notes=LINEAR_ONLY,
    ),
    Method(
        "kronfluence identity",
        "kronfluence",
        "kronfluence:influence",
        {"strategy": "identity"},
        notes=LINEAR_ONLY,
    ),
    Method("TRAK (traker), 1 checkpoint", "trak", "trak:trak", reasons=ONE_LABEL),
    Method("bergson MAGIC", "bergson", reasons={"": LANGUAGE_ONLY}),
    Method("dattri-llm", "dattri_llm", reasons={"": LANGUAGE_ONLY}),
]
