"""Fresh processes, without the shape checks that the tests' own process has switched on.

They are forked from a server that has imported backtrail and done nothing else. The shape checks
draw from Python's random generator, which a test of random state must not see; and a process that
has started threads, as that of the tests has, must not be forked.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["backtrail.record.recorder", "backtrail.run.run", "backtrail.methods.dit.dit", "torch._dynamo"]
)


def in_fresh_process(function: Callable[..., Result], *args: Any) -> Result:
    """Call a function of a test module in a process of its own, and return its result."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        call = pool.submit(_on_one_thread, function, *args)
        return call.result()


def start_process(function: Callable[..., None], *args: Any) -> Any:
    """Start a process that calls a function of a test module; the test joins or kills it."""
    process = CONTEXT.Process(target=_on_one_thread, args=(function, *args))
    process.start()
    return process


def _on_one_thread(function: Callable[..., Result], *args: Any) -> Result:
    torch.set_num_threads(1)
    # The workers of a data loader must be forked, too: many data sets of the tests do not pickle.
    multiprocessing.set_start_method("fork", force=True)
    return function(*args)
