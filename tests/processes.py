"""Fresh processes without the shape checks, forked from a server that has imported everything and done nothing.

The checks draw from Python's generator, and a process that has started threads must not fork.
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


def apart(function: Callable[..., Result], *args: Any) -> Result:
    """Call a function of a test module in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        return pool.submit(_on_one_thread, function, *args).result()


def started(function: Callable[..., None], *args: Any) -> Any:
    """Start a process that runs the function, to be waited for or killed."""
    process = CONTEXT.Process(target=_on_one_thread, args=(function, *args))
    process.start()
    return process


def _on_one_thread(function: Callable[..., Result], *args: Any) -> Result:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for the workers of a loader
    return function(*args)
