"""The manifest of a run folder: which model, optimizer and data, and a checksum of every file."""

from pathlib import Path

import msgspec

from backtrail.errors import DamagedFile, NotARun, WrongFormat
from backtrail.run.files import replacing

FORMAT = 2  # in format 1, fields of the step log have other names
MANIFEST_NAME = "manifest.json"


class Layout(msgspec.Struct, frozen=True):
    """Shape and dtype of one tensor of the state."""

    shape: tuple[int, ...]
    dtype: str


class Manifest(msgspec.Struct, frozen=True):
    """Describes a run folder. It is written after every file that it names.

    So a process killed at any instant leaves a manifest whose files are all complete.

    Attributes:
        id: random identifier of the run; influences carry it.
        optimizer: class name in torch.optim.
        groups: parameter names of every parameter group.
        params: layout of every parameter.
        buffers: layout of every buffer.
        samples: number of rows of the training set; None where batches carry sample ids.
        policy: the checkpoint policy, as Python prints it.
        device: where the training ran.
        torch: version of torch that recorded the run.
        files: checksum of every finished file, by name relative to the folder.
        finished: whether the recorder was closed without an error; a run that was killed has False
            and is complete up to its last step.
        format: version of the folder's layout.
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
        """Return the manifest with one more file."""
        return msgspec.structs.replace(self, files=self.files | {name: checksum})

    def closed(self) -> "Manifest":
        """Return the manifest of a recording that ended without an error."""
        return msgspec.structs.replace(self, finished=True)

    def without_files(self, names: frozenset[str]) -> "Manifest":
        """Return the manifest without some of its files."""
        files = {name: value for name, value in self.files.items() if name not in names}
        return msgspec.structs.replace(self, files=files)


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a run folder.

    Raises:
        NotARun: there is no manifest.
        WrongFormat: a version of backtrail with another layout wrote it.
        DamagedFile: it cannot be parsed; the message names the field.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise NotARun(folder)
    try:
        # The version first: another layout would fail to parse with a misleading message.
        version = msgspec.json.decode(path.read_bytes())["format"]
        if version != FORMAT:
            raise WrongFormat(path, version, FORMAT)
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise DamagedFile(path, str(error)) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest of a run folder atomically."""
    with replacing(folder / MANIFEST_NAME) as scratch:
        text = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
        scratch.write_bytes(text)
