"""The only place that prints: tables and records in three forms, sentences, the next command, an error.

What is asked for goes to stdout. With `--form json` or `csv` nothing else does, so that it can be
piped.
"""

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from math import floor, isfinite, log10
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, TextIO

from backtrail.cli.arguments import Form

if TYPE_CHECKING:
    import polars as pl

WIDTH = 100


def say(text: object = "") -> None:
    """Print a sentence."""
    print(text, flush=True)


def heading(title: str) -> None:
    """Print the title of a section."""
    say(f"\n{title.upper()}")


def paragraph(words: str) -> None:
    """Print an explanation, indented and wrapped."""
    say(fill(words, WIDTH, initial_indent="   ", subsequent_indent="   "))


def finding(words: str) -> None:
    """Print a result that stands out among the explanations."""
    say("\n" + fill(words, WIDTH, initial_indent="-> ", subsequent_indent="   "))


def table(
    frame: "pl.DataFrame", form: Form = "table", *, caption: str = "", indent: int = 0
) -> None:
    """Print a table; the caption belongs to its text form."""
    match form:
        case "json":
            say(frame.write_json())
        case "csv":
            say(frame.write_csv().rstrip("\n"))
        case "table":
            if caption:
                say(f"{caption}\n")
            for line in aligned(frame.columns, frame.rows()):
                say(" " * indent + line)


def record(fields: Mapping[str, object], form: Form = "table") -> None:
    """Print names and values, one a line; as JSON, an object."""
    import polars as pl

    if form == "json":
        import msgspec

        say(msgspec.json.format(msgspec.json.encode(fields)).decode())
    elif form == "csv":
        table(
            pl.DataFrame(
                {"name": list(fields), "value": [text(value) for value in fields.values()]}
            ),
            form,
        )
    else:
        width = max(map(len, fields))
        for name, value in fields.items():
            say(f"{name.replace('_', ' '):{width}}  {text(value)}")


def aligned(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lay out a table, numbers to the right and words to the left.

    >>> aligned(["sample", "pattern"], [(7, "early"), (113, "stable")])
    ['sample  pattern', '     7  early', '   113  stable']
    """
    columns: list[tuple[object, ...]] = (
        list(zip(*rows, strict=True)) if rows else [()] * len(header)
    )
    cells = [[name, *_texts(column)] for name, column in zip(header, columns, strict=True)]
    widths = [max(map(len, column)) for column in cells]
    numeric = [all(isinstance(value, int | float | None) for value in column) for column in columns]

    def line(row: Sequence[str]) -> str:
        sides = zip(row, widths, numeric, strict=True)
        return "  ".join(
            f"{cell:{'>' if right else '<'}{width}}" for cell, width, right in sides
        ).rstrip()

    return [line(row) for row in zip(*cells, strict=True)]


def _texts(column: Sequence[object]) -> list[str]:
    """One column, its floats with equally many decimals: four digits of the largest.

    >>> _texts([0.9231, 0.00512, 0.0]), _texts([1.5e-9, 0.0])
    (['0.9231', '0.0051', '0.0000'], ['1.500e-09', '0.000e+00'])
    """
    largest = max(
        (abs(value) for value in column if isinstance(value, float) and isfinite(value)),
        default=0.0,
    )
    size = floor(log10(largest)) if largest else 0
    spelling = f".{max(3 - size, 0)}f" if -5 <= size <= 6 else ".3e"
    return [f"{value:{spelling}}" if isinstance(value, float) else text(value) for value in column]


def text(value: object) -> str:
    """One value for people: four digits of a number, a range as its two ends.

    >>> [text(value) for value in (0.123456, True, (1, 1), (0.5, 2.0), None)]
    ['0.1235', 'yes', '1', '0.5 to 2', '-']
    """
    match value:
        case bool():
            return "yes" if value else "no"
        case None:
            return "-"
        case float():
            return f"{value:.4g}"
        case (low, high):
            return text(low) if low == high else f"{text(low)} to {text(high)}"
    return str(value)


def next_command(*words: object, form: Form = "table") -> None:
    """Print the command to type next; beside a table for machines, on stderr."""
    stream: TextIO = sys.stdout if form == "table" else sys.stderr
    print(f"\nnext: {command(*words)}", file=stream, flush=True)


def command(*words: object) -> str:
    """Spell a command for a shell.

    >>> command("top", "my run/dit", "--k", 5)
    "backtrail top 'my run/dit' --k 5"
    """
    return shlex.join([program(), *map(str, words)])


def program() -> str:
    """What to type for `backtrail`: its name where the shell finds it, else the place that it was started from."""
    started = Path(sys.argv[0])
    if started.name != "backtrail" or shutil.which("backtrail"):
        return "backtrail"
    return str(started.relative_to(Path.cwd()) if started.is_relative_to(Path.cwd()) else started)


def failure(error: BaseException) -> None:
    """Print what went wrong, in one line."""
    print(f"backtrail: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
