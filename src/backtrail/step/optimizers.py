"""One table of all that is known of the optimizers of `torch.optim`.

`torch.optim` computes every update and, with `differentiable=True`, its derivative, so no update
formula is written down here. What code alone does not tell is kept in `RULES`: which role each
tensor of the optimizer's state plays, whether the update is linear, and where the differentiable
mode needs help. `REFUSED` gives the reason for every other class of `torch.optim`. No other module
names an optimizer or a key of its state.

The table stands in `step`, the lowest folder that reads it: recordings, replays and the derivatives
in `optim` all ask it, and import nothing above them for it.

To support another optimizer of `torch.optim`:

1. Add an `OptimizerRule` to the list below, and remove the class from `REFUSED`.
2. Add a training with it to `CASES` in `tests/cases.py`. Every case is compared with retraining
   (`tests/methods/dit/test_exact.py`), and the facts of the rule with the optimizer itself
   (`tests/step/test_optimizers.py`).
3. Add its name to the table of `docs/recording.md`.

Its update must be elementwise: each entry of a parameter changes by a function of that entry, its
moments and its gradient alone, and a scalar state may depend on nothing but the step number.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

from backtrail.errors import UnsupportedOptimizer
from backtrail.tree import Tree

Settings = Mapping[str, Any]  # the hyperparameters of one parameter group


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerRule:
    """What is known of one optimizer besides its code.

    Every tensor that the optimizer keeps for a parameter has exactly one role, given here under the
    optimizer's own key. All but the counts have one entry per entry of the parameter.

    Attributes:
        optimizer_class: The class in `torch.optim`.
        counts: Scalars that depend on the step number alone.
        first_moments: Averages of gradients that the parameter moves along.
        second_moments: Averages, sums or maxima of squared gradients (or of their size) by which a
            step is divided. Zero where an entry never received a gradient.
        gradient_means: Averages of gradients that are subtracted from a second moment.
        squared_updates: Averages of squared steps, by which a step is multiplied.
        averaged_parameters: Averages of the parameter itself, which no update reads.
        linear: The update is linear in parameter, moments and gradient, with the same coefficients
            for every entry. So its derivative is the same number everywhere.
        divides_by_lr: The differentiable mode divides by the learning rate; at a rate of 0 its
            derivative is NaN. Every term of the update must then be a multiple of the rate.
        start_values: Values before the first step, where not zero: a number, or the name of the
            hyperparameter that holds it.
        differentiable_start: Needed where the first step makes a moment by detaching it from the
            gradient. From hyperparameters, parameter and gradient it computes moments before the
            first step with which the formula of later steps gives the same values, and keeps the
            derivative.
    """

    optimizer_class: type[Optimizer]
    counts: frozenset[str] = frozenset()
    first_moments: frozenset[str] = frozenset()
    second_moments: frozenset[str] = frozenset()
    gradient_means: frozenset[str] = frozenset()
    squared_updates: frozenset[str] = frozenset()
    averaged_parameters: frozenset[str] = frozenset()
    linear: bool = False
    divides_by_lr: bool = False
    start_values: Mapping[str, float | str] = field(default_factory=dict)
    differentiable_start: Callable[[Settings, Tensor, Tensor], Tree] | None = None

    @property
    def name(self) -> str:
        """The class's name, under which recordings store the optimizer."""
        return self.optimizer_class.__name__

    @property
    def divisors(self) -> frozenset[str]:
        """Moments of which a step's divisor is made."""
        return self.second_moments | self.gradient_means

    @property
    def nonnegative(self) -> frozenset[str]:
        """Moments that cannot be negative."""
        return self.second_moments | self.squared_updates

    @property
    def elementwise(self) -> frozenset[str]:
        """Moments with one entry per entry of the parameter."""
        averages = self.first_moments | self.gradient_means | self.averaged_parameters
        return averages | self.second_moments | self.squared_updates

    def start(self, after: Tree, settings: Settings) -> Tree:
        """Build the moments and counts before the first step.

        Counts are in float64: in float32, Adam's 1 - 0.999 ** t is off by 1e-5.

        Args:
            after: Those after the step; they tell which there are, and their shapes.
            settings: The group's hyperparameters.
        """
        before: Tree = {}
        for key, tensor in after.items():
            value = self.start_values.get(key, 0.0)
            if isinstance(value, str):
                value = float(settings[value])
            dtype = torch.float64 if key in self.counts else tensor.dtype
            before[key] = torch.full_like(tensor, value, dtype=dtype)
        return before


def _sgd_start(settings: Settings, parameter: Tensor, gradient: Tensor) -> Tree:
    r"""Compute an SGD buffer b with :math:`\mu b + (1 - d) g = g`, for momentum μ, dampening d.

    torch makes the first buffer by `grad.detach().clone()`, which loses that step's derivative.
    Started from :math:`b = g d / \mu`, a function of g, the ordinary formula gives the same buffer
    and keeps the derivative. Here g is what the formula consumes: the gradient's sign changed by
    `maximize`, plus coupled weight decay.
    """
    if not settings["momentum"]:
        return {}
    consumed = -gradient if settings["maximize"] else gradient
    consumed = consumed + settings["weight_decay"] * parameter
    return {"momentum_buffer": consumed * (settings["dampening"] / settings["momentum"])}


_RULES = (
    OptimizerRule(
        optimizer_class=SGD,
        # Only with momentum. Dampening, Nesterov and weight decay keep the update linear.
        first_moments=frozenset({"momentum_buffer"}),
        linear=True,
        differentiable_start=_sgd_start,
    ),
    OptimizerRule(
        optimizer_class=Adam,
        counts=frozenset({"step"}),
        first_moments=frozenset({"exp_avg"}),
        # The maximum only with amsgrad, which divides by it instead.
        second_moments=frozenset({"exp_avg_sq", "max_exp_avg_sq"}),
        # Its tensor code multiplies the divisor by 1 / lr rather than the step by lr. With lr = 0
        # the value is right, 1 / inf = 0, but the derivative is 0 * inf.
        divides_by_lr=True,
    ),
    OptimizerRule(
        optimizer_class=AdamW,
        counts=frozenset({"step"}),
        first_moments=frozenset({"exp_avg"}),
        second_moments=frozenset({"exp_avg_sq", "max_exp_avg_sq"}),
        divides_by_lr=True,
    ),
    OptimizerRule(
        optimizer_class=NAdam,
        # The momentum follows a schedule; bias correction needs the product over all steps.
        counts=frozenset({"step", "mu_product"}),
        first_moments=frozenset({"exp_avg"}),
        second_moments=frozenset({"exp_avg_sq"}),
        start_values={"mu_product": 1.0},
    ),
    OptimizerRule(
        optimizer_class=RAdam,
        counts=frozenset({"step"}),
        first_moments=frozenset({"exp_avg"}),
        second_moments=frozenset({"exp_avg_sq"}),
    ),
    OptimizerRule(
        optimizer_class=RMSprop,
        counts=frozenset({"step"}),
        first_moments=frozenset({"momentum_buffer"}),
        second_moments=frozenset({"square_avg"}),
        # Only if centered: the divisor is then a standard deviation.
        gradient_means=frozenset({"grad_avg"}),
    ),
    OptimizerRule(
        optimizer_class=Adagrad,
        counts=frozenset({"step"}),
        # A sum that never decays, so rates only shrink.
        second_moments=frozenset({"sum"}),
        start_values={"sum": "initial_accumulator_value"},
    ),
    OptimizerRule(
        optimizer_class=Adadelta,
        counts=frozenset({"step"}),
        second_moments=frozenset({"square_avg"}),
        squared_updates=frozenset({"acc_delta"}),
    ),
    OptimizerRule(
        optimizer_class=Adamax,
        counts=frozenset({"step"}),
        first_moments=frozenset({"exp_avg"}),
        # A maximum of sizes, not of squares; after a step it is at least eps.
        second_moments=frozenset({"exp_inf"}),
    ),
    OptimizerRule(
        optimizer_class=ASGD,
        # Its rate eta and its averaging factor mu are functions of the step number.
        counts=frozenset({"step", "eta", "mu"}),
        averaged_parameters=frozenset({"ax"}),
        linear=True,
        start_values={"eta": "lr", "mu": 1.0},
    ),
)

RULES: Mapping[str, OptimizerRule] = {rule.name: rule for rule in _RULES}

# By name, because not every torch has all of these classes.
REFUSED: Mapping[str, str] = {
    "Rprop": "its update depends on the signs of gradients alone, so every influence is zero",
    "LBFGS": "its step mixes all parameters and has no differentiable mode",
    "SparseAdam": "it takes sparse gradients only and has no differentiable mode",
    "Adafactor": "its second moments are shared by rows and columns, not elementwise",
    "Muon": "it orthogonalizes whole matrices, so its update is not elementwise",
}

# A state does not know which optimizer made it, so these hold the keys of all of them.
COUNTS = frozenset(key for rule in RULES.values() for key in rule.counts)
NONNEGATIVE = frozenset(key for rule in RULES.values() for key in rule.nonnegative)


def find_rule(optimizer_class: type[Optimizer]) -> OptimizerRule:
    """Look up the rule of an optimizer class.

    A subclass of a supported class is refused, since its update may be another one. (AdamW is a
    subclass of Adam in torch.)

    Raises:
        UnsupportedOptimizer: With the reason.
    """
    name = optimizer_class.__name__
    nearest = _nearest_torch_class(optimizer_class)
    if nearest in REFUSED:
        raise UnsupportedOptimizer(name, REFUSED[nearest], tuple(RULES))
    if nearest not in RULES:
        reason = "it is not one of the elementwise optimizers of torch.optim"
        raise UnsupportedOptimizer(name, reason, tuple(RULES))
    rule = RULES[nearest]
    if rule.optimizer_class is not optimizer_class:
        reason = f"a subclass of {nearest} may have another update"
        raise UnsupportedOptimizer(name, reason, tuple(RULES))
    return rule


def rule_named(name: str) -> OptimizerRule:
    """Look up the rule of the optimizer that a recording names.

    Raises:
        UnsupportedOptimizer: The name is not in the table.
    """
    if name not in RULES:
        reason = REFUSED.get(name, "this version has no rule for it")
        raise UnsupportedOptimizer(name, reason, tuple(RULES))
    return RULES[name]


def _nearest_torch_class(optimizer_class: type[Optimizer]) -> str:
    """Name the class of `torch.optim` that this is or most closely derives from."""
    for ancestor in optimizer_class.__mro__:
        name: str = ancestor.__name__
        if getattr(torch.optim, name, None) is ancestor:
            return name
    return ""
