"""What a run folder says about itself: frozen records, checked when they are read."""

from pathlib import Path

import msgspec

from backtrail.errors import DamagedFile, NotARun, WrongFormat
from backtrail.run.files import replacing

FORMAT = 1
NAME = "manifest.json"


class Layout(msgspec.Struct, frozen=True):
    """Shape and precision of one tensor of the state."""

    shape: tuple[int, ...]
    dtype: str


class Manifest(msgspec.Struct, frozen=True):
    """The head of a run folder; it is written after every file that it names.

    Attributes:
        id: random name of the run; influences carry it.
        optimizer: class name in torch.optim.
        groups: parameter names of every parameter group.
        params: layout of every parameter.
        buffers: layout of every buffer.
        samples: number of rows of the training set; None where samples have ids of their own.
        policy: which steps kept a checkpoint, in words.
        device: where the training ran.
        torch: version that recorded.
        files: checksum of every finished file, by name relative to the folder.
        finished: whether the recorder was closed; a run that was killed has False and is complete
            up to its last step.
        format: version of this layout.
    """

    id: str
    optimizer: str
    groups: tuple[tuple[str, ...], ...]
    params: dict[str, Layout]
    buffers: dict[str, Layout]
    samples: int | None
    policy: str
    device: str
    torch: str
    files: dict[str, str] = {}
    finished: bool = False
    format: int = FORMAT

    def with_file(self, name: str, checksum: str) -> "Manifest":
        """The manifest after one more file."""
        return msgspec.structs.replace(self, files=self.files | {name: checksum})

    def closed(self) -> "Manifest":
        """The manifest of a recording that ended in order."""
        return msgspec.structs.replace(self, finished=True)

    def without_files(self, names: frozenset[str]) -> "Manifest":
        """The manifest after files were dropped."""
        return msgspec.structs.replace(
            self, files={n: c for n, c in self.files.items() if n not in names}
        )


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a run folder.

    Raises:
        NotARun: there is no manifest.
        WrongFormat: another version of the program wrote it.
        DamagedFile: it does not parse; the message names the field.
    """
    path = folder / NAME
    if not path.is_file():
        raise NotARun(folder)
    try:
        version = msgspec.json.decode(path.read_bytes())["format"]
        if version != FORMAT:
            raise WrongFormat(path, version, FORMAT)
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise DamagedFile(path, str(error)) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put a manifest in place of the old one at once."""
    with replacing(folder / NAME) as scratch:
        scratch.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
