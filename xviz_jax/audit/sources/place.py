"""Where data lies: a file or a folder, here or in an object store.

`gs://` and `s3://` go through pyarrow's file systems. Local files need nothing.
"""

import dataclasses
import io
import os
import re
import stat
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from xviz_jax.audit.extra import require
from xviz_jax.audit.sources.record import BadRecord

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_REMOTE = ("gs", "gcs", "s3")
# One request to an object store fetches this much.
_BLOCK = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class Place:
    """One path; it holds no handle, and pickles as small as it looks.

    Attributes:
      path: On this machine; or in the object store, with the bucket's name.
      system: A `pyarrow.fs.FileSystem`; None on this machine.
    """

    path: str
    system: Any = None

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(self.path).name

    @property
    def suffix(self) -> str:
        """What the name ends in, in lower case."""
        return PurePosixPath(self.path).suffix.lower()

    def __str__(self) -> str:
        """The path."""
        return self.path

    def kind(self) -> str:
        """`file`, `folder`, or `nothing`."""
        if self.system is None:
            path = Path(self.path)
            return (
                "file" if path.is_file() else "folder" if path.is_dir() else "nothing"
            )
        fs = require("pyarrow.fs", "an object store")
        found = self.system.get_file_info(self.path).type
        kinds = {fs.FileType.File: "file", fs.FileType.Directory: "folder"}
        return kinds.get(found, "nothing")

    def size(self) -> int:
        """Bytes of the file."""
        if self.system is None:
            return Path(self.path).stat().st_size
        return self.system.get_file_info(self.path).size

    def open(self) -> BinaryIO:
        """Opens the file for reading from any place in it."""
        if self.system is None:
            return Path(self.path).open("rb")
        return io.BufferedReader(self.system.open_input_file(self.path), _BLOCK)

    def native(self) -> Any:
        """Opens the file as pyarrow reads it best."""
        if self.system is None:
            return require("pyarrow", "a file").OSFile(self.path)
        return self.system.open_input_file(self.path)

    def names(self) -> list[str]:
        """What lies in the folder, in no order."""
        if self.system is None:
            return [path.name for path in Path(self.path).iterdir()]
        fs = require("pyarrow.fs", "an object store")
        found = self.system.get_file_info(fs.FileSelector(self.path))
        return [info.base_name for info in found]

    def child(self, name: str) -> "Place":
        """What lies in this folder under a name of the listing."""
        return Place(f"{self.path.rstrip('/')}/{name}", self.system)

    def parent(self) -> "Place":
        """The folder it lies in."""
        return Place(str(PurePosixPath(self.path).parent), self.system)

    def read(self, name: str, most: int) -> bytes:
        """The whole of a file in this folder, by a name that is not trusted.

        The name is relative and has no `..`. On this machine a symbolic link is
        followed only to a regular file within the folder.

        Raises:
          BadRecord: If it leads elsewhere, is missing or has more than `most` bytes.
          OSError: If the storage failed.
        """
        parts = PurePosixPath(name).parts
        strange = not parts or ".." in parts or name[0] in "/\\" or "\0" in name
        if strange or _SCHEME.match(name) or (os.name == "nt" and ":" in name):
            raise BadRecord("UNSAFE_PATH", f"{name!r:.200} leads out of the folder")
        place = self.child(name)
        if self.system is None:
            place = _within(Path(self.path), Path(place.path), name)
        try:
            with place.open() as file:
                found = file.read(most + 1)
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise BadRecord("UNREADABLE", f"{name!r:.200}: {error.strerror}") from None
        if len(found) > most:
            raise BadRecord("TOO_LARGE", f"{name!r:.200} is above {most} bytes")
        return found


def _within(folder: Path, path: Path, name: str) -> Place:
    """The file that a path resolves to, inside the folder."""
    try:
        resolved = path.resolve(strict=True)
        regular = stat.S_ISREG(resolved.stat().st_mode)
    except (OSError, RuntimeError, ValueError) as error:
        raise BadRecord("UNREADABLE", f"{name!r:.200}: {error}") from None
    if not resolved.is_relative_to(folder.resolve()):
        raise BadRecord("UNSAFE_PATH", f"{name!r:.200} links out of the folder")
    if not regular:
        raise BadRecord("UNREADABLE", f"{name!r:.200} is no regular file")
    return Place(str(resolved))


def place(data: str | os.PathLike[str], filesystem: Any = None) -> Place:
    """The place that a path or an address means.

    Args:
      data: A path, `s3://bucket/key`, `gs://bucket/key`, or a path in `filesystem`.
      filesystem: A `pyarrow.fs.FileSystem` to use, with the credentials it holds.

    Raises:
      ValueError: If the address is of another kind, or not understood.
    """
    name = os.fspath(data)
    scheme = _SCHEME.match(name)
    if filesystem is not None:
        path = name[scheme.end() :] if scheme else name
        return Place(path.rstrip("/"), filesystem)
    if scheme is None:
        return Place(name.rstrip("/") or "/")
    kind = scheme.group()[:-3].lower()
    if kind not in _REMOTE:
        raise ValueError(
            f"an address begins with gs:// or s3://, got {kind}://; pass any other "
            "file system as `filesystem`"
        )
    fs = require("pyarrow.fs", f"{kind}://")
    try:
        system, path = fs.FileSystem.from_uri(name)
    except (OSError, ValueError) as error:
        # The address may hold a key: it is not quoted.
        raise ValueError(f"the {kind}:// address is not understood: {error}") from None
    return Place(path.rstrip("/"), system)
