"""The command line: one module per command, each of which parses, calls the library and prints.

Nothing here imports torch before a command runs, so that `backtrail --help` is instant.
"""

import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import cleandoc, signature

from tyro.extras import SubcommandApp

from backtrail import __version__
from backtrail.cli import (
    attribute,
    clean,
    coreset,
    curve,
    demo,
    evaluate,
    forget,
    info,
    patterns,
    regimes,
    show,
    top,
    trust,
    verify,
)
from backtrail.errors import BacktrailError

VERBS = (
    demo.demo,
    info.info,
    verify.verify,
    attribute.attribute,
    top.top,
    curve.curve,
    patterns.patterns,
    regimes.regimes,
    trust.trust,
    evaluate.evaluate,
    forget.forget,
    clean.clean,
    coreset.coreset,
)
DESCRIPTION = (
    "Which training samples made a PyTorch model what it is, and when.\n\n"
    "Start with `backtrail demo`. `backtrail COMMAND --help` describes a command and shows an "
    "example. `backtrail --version` prints the version."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What was typed after `backtrail`; None reads it from `sys.argv`.

    Returns:
        The exit code: 0; 1 where a check of `backtrail trust` failed; 2 after an error, which is
        printed in one line; 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:
        show.say(f"backtrail {__version__}")
        return 0
    try:
        code = app(given).cli(args=given or ["--help"], prog="backtrail", description=DESCRIPTION)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe. Python flushes stdout once more when it
        # exits, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (BacktrailError, OSError) as error:
        show.failure(error)
        return 2
    return code if isinstance(code, int) else 0


def app(given: Sequence[str]) -> SubcommandApp:
    """All commands; their help is one line each where no command is given.

    Args:
        given: What was typed after `backtrail`.
    """
    commands = SubcommandApp()
    lists_commands = not given or given[0].startswith("-")
    for verb in VERBS:
        first_line = (verb.__doc__ or "").partition("\n")[0]
        # With None, tyro takes the whole docstring.
        commands.command(help=first_line if lists_commands else None)(_with_joined_lines(verb))
    return commands


def _with_joined_lines(verb: Callable[..., object]) -> Callable[..., object]:
    """The same command, with every argument described on one line of its docstring.

    tyro wraps the descriptions to the width of the terminal, but keeps the line breaks that they
    have already.
    """

    @wraps(verb)
    def command(*args: object, **kwargs: object) -> object:
        return verb(*args, **kwargs)

    # Without the indentation, which Python 3.13 has taken away already.
    command.__doc__ = re.sub(r"\n {8}(?=\S)", " ", cleandoc(verb.__doc__ or ""))
    # tyro would follow `__wrapped__` to the original and its docstring.
    del command.__wrapped__
    command.__signature__ = signature(verb)  # type: ignore[attr-defined]
    return command
