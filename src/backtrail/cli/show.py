"""The only module that prints: tables and records in three formats, text, errors.

The result of a command goes to stdout. With `--form json` or `csv` nothing else does, so that it
can be piped.
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
DIGITS = 4  # significant digits of the largest number of a column


def say(text: object = "") -> None:
    """Print a line."""
    print(text, flush=True)


def heading(title: str) -> None:
    """Print the title of a section."""
    say(f"\n{title.upper()}")


def paragraph(words: str) -> None:
    """Print an explanation, indented and wrapped."""
    say(fill(words, WIDTH, initial_indent="   ", subsequent_indent="   "))


def finding(words: str) -> None:
    """Print a result, with an arrow that sets it off from the explanations."""
    say("\n" + fill(words, WIDTH, initial_indent="-> ", subsequent_indent="   "))


def table(
    frame: "pl.DataFrame", form: Form = "table", *, caption: str = "", indent: int = 0
) -> None:
    """Print a table.

    Args:
        frame: The table.
        form: Output format.
        caption: Printed above it with --form table.
        indent: Number of spaces before each line with --form table.
    """
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
    """Print names and values: one per line, as a table with two columns, or as a JSON object."""
    import polars as pl

    match form:
        case "json":
            import msgspec

            say(msgspec.json.format(msgspec.json.encode(fields)).decode())
        case "csv":
            values = [format_value(value) for value in fields.values()]
            table(pl.DataFrame({"name": list(fields), "value": values}), form)
        case "table":
            width = max(map(len, fields))
            for name, value in fields.items():
                say(f"{name.replace('_', ' '):{width}}  {format_value(value)}")


def aligned(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lay out a table: numbers to the right, text to the left.

    >>> aligned(["sample", "pattern"], [(7, "early"), (113, "stable")])
    ['sample  pattern', '     7  early', '   113  stable']

    Args:
        header: Name of each column.
        rows: The values.

    Returns:
        The lines, the header first.
    """
    columns: list[list[str]] = []
    for place, name in enumerate(header):
        column = [row[place] for row in rows]
        cells = [name, *_format_column(column)]
        width = max(map(len, cells))
        is_numeric = all(isinstance(value, int | float | None) for value in column)
        side = ">" if is_numeric else "<"
        columns.append([f"{cell:{side}{width}}" for cell in cells])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def _format_column(column: Sequence[object]) -> list[str]:
    """Format one column; its floats get equally many decimals, four digits of the largest.

    >>> _format_column([0.9231, 0.00512, 0.0]), _format_column([1.5e-9, 0.0])
    (['0.9231', '0.0051', '0.0000'], ['1.500e-09', '0.000e+00'])
    """
    sizes = [abs(value) for value in column if isinstance(value, float) and isfinite(value)]
    largest = max(sizes, default=0.0)
    exponent = floor(log10(largest)) if largest else 0
    decimals = max(DIGITS - 1 - exponent, 0)
    float_format = f".{decimals}f" if -5 <= exponent <= 6 else f".{DIGITS - 1}e"
    return [
        f"{value:{float_format}}" if isinstance(value, float) else format_value(value)
        for value in column
    ]


def format_value(value: object) -> str:
    """Format one value for people: four digits of a number, a range as its two ends.

    >>> [format_value(value) for value in (0.123456, True, (1, 1), (0.5, 2.0), None)]
    ['0.1235', 'yes', '1', '0.5 to 2', '-']
    """
    match value:
        case bool():
            return "yes" if value else "no"
        case None:
            return "-"
        case float():
            return f"{value:.{DIGITS}g}"
        case (low, high) if low == high:
            return format_value(low)
        case (low, high):
            return f"{format_value(low)} to {format_value(high)}"
    return str(value)


def next_command(*words: object, form: Form = "table") -> None:
    """Print the command to run next.

    Args:
        words: The command and its arguments.
        form: Format of the result before it. With json and csv, stdout holds nothing but the
            result, and this goes to stderr.
    """
    stream: TextIO = sys.stdout if form == "table" else sys.stderr
    print(f"\nnext: {command(*words)}", file=stream, flush=True)


def command(*words: object) -> str:
    """Write a command as it is typed in a shell.

    >>> command("top", "my run/dit", "--k", 5)
    "backtrail top 'my run/dit' --k 5"
    """
    return shlex.join([program(), *map(str, words)])


def program() -> str:
    """How to type `backtrail`: its name where the shell finds it, else the path of the program."""
    started = Path(sys.argv[0])
    # Another program may have called `main`, such as pytest.
    if started.name != "backtrail" or shutil.which("backtrail"):
        return "backtrail"
    if started.is_relative_to(Path.cwd()):
        return str(started.relative_to(Path.cwd()))
    return str(started)


def failure(error: BaseException) -> None:
    """Print an error to stderr, in one line."""
    message = " ".join(str(error).split())
    print(f"backtrail: {message}", file=sys.stderr, flush=True)
