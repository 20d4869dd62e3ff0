"""The command line: one file per verb, each of them parse, call, show.

Nothing here imports torch before a command runs, so that `backtrail --help` is instant.
"""

import os
import sys
from collections.abc import Sequence

from tyro.extras import SubcommandApp

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
    "Begin with `backtrail demo`; `backtrail COMMAND --help` explains a command and shows an example."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 1 where a check of the trust statement failed; 2 after an error, told in one line; 130
        after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(given).cli(args=given or ["--help"], prog="backtrail", description=DESCRIPTION)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (BacktrailError, OSError) as error:
        show.failure(error)
        return 2
    return code if isinstance(code, int) else 0


def app(given: Sequence[str]) -> SubcommandApp:
    """All commands; where none is given, with one line of help each instead of the whole."""
    found = SubcommandApp()
    listing = not given or given[0].startswith("-")
    for verb in VERBS:
        found.command(help=(verb.__doc__ or "").partition("\n")[0] if listing else None)(verb)
    return found
