"""What several commands take, under one name and one spelling."""

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
    """Refuse a file that could not be written, or would not be read as what it is, before any work is done.

    Raises:
        BadSetting: it is a folder, or its name has another ending.
    """
    if out is not None and (out.suffix != ending or out.is_dir()):
        raise BadSetting("out", str(out), f"a file name that ends with {ending}")
