"""Forward mode: a function of trees and its derivative along a change of its arguments."""

import warnings
from collections.abc import Callable
from typing import Any

from torch.func import jvp


def along(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """Value and derivative of a function; both may be nested.

    >>> import torch
    >>> along(lambda x: x**2, (torch.tensor(3.0),), (torch.tensor(1.0),))
    (tensor(9.), tensor(6.))
    """
    with warnings.catch_warnings():
        # The first call in a process loads torch's rules, and they are made by a way that torch itself deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        value, change, *_ = jvp(function, primals, tangents)
    return value, change
