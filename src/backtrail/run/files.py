"""Atomic file writes, and checksums."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backtrail.errors import DamagedFile


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a scratch path that replaces `path` when the block succeeds.

    A process killed at any instant leaves either the old file or the new one, never a part of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only within one file system. The process id
    # keeps two processes that write the same file apart.
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def checksum(content: bytes) -> str:
    """First 16 hexadecimal digits of the SHA-256 of some bytes.

    >>> checksum(b"backtrail")
    '4b2fac6d8b70a777'
    """
    # SHA-256 rather than a shorter hash: processors have instructions for it.
    return hashlib.sha256(content).hexdigest()[:16]


def read_checked(folder: Path, name: str, expected: str) -> bytes:
    """Read a file and compare its checksum with the one noted when it was written.

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
