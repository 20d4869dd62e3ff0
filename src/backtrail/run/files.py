"""Files that are either the old or the new one, whenever the process dies, and their checksums."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backtrail.errors import DamagedFile


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Hand out a scratch path that becomes `path` only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def checksum(content: bytes) -> str:
    """Short content hash.

    >>> checksum(b"backtrail")
    'f109f448a636f197'
    """
    return hashlib.sha256(content).hexdigest()[:16]  # processors have instructions for it


def read_checked(folder: Path, name: str, expected: str) -> bytes:
    """Read a file and compare its content with the checksum noted when it was written.

    Raises:
        DamagedFile: it is missing, or its content changed.
    """
    path = folder / name
    if not path.is_file():
        raise DamagedFile(path, "it is missing")
    content = path.read_bytes()
    found = checksum(content)
    if found != expected:
        raise DamagedFile(path, f"its checksum is {found}, and was {expected} when it was written")
    return content
