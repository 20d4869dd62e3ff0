"""Arguments that several commands take."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from backtrail.errors import BadSetting

RunFolder = Positional[Annotated[Path, arg(metavar="RUN")]]
InfluenceFolder = Positional[Annotated[Path, arg(metavar="INFLUENCE")]]
Reference = Annotated[str, arg(metavar="FILE.py:NAME")]
Form = Literal["table", "json", "csv"]
Window = Annotated[tuple[int, int] | None, arg(metavar="A B")]


def check_file(out: Path | None, ending: str) -> None:
    """Check the name of an output file before any work is done.

    Args:
        out: The file, if one is written.
        ending: The ending that its format requires, such as ".csv".

    Raises:
        BadSetting: It is a folder, or its name has another ending.
    """
    if out is not None and (out.suffix != ending or out.is_dir()):
        raise BadSetting("out", str(out), f"a file name that ends with {ending}")
