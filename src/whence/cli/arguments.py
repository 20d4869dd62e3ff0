"""What several commands take, under one name and one spelling."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

RunFolder = Positional[Annotated[Path, arg(metavar="RUN")]]
InfluenceFolder = Positional[Annotated[Path, arg(metavar="INFLUENCE")]]
Reference = Annotated[str, arg(metavar="FILE.py:NAME")]
Form = Literal["table", "json", "csv"]
Window = Annotated[tuple[int, int] | None, arg(metavar="A B")]
