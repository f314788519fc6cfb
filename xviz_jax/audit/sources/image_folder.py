"""A folder of images: a file is a record, and a subfolder a class.

The names are in memory, in one block of bytes: about 50 bytes a record. From tens of
millions of images on, Parquet is the better store.

Symbolic links: a link to a file is followed only where it stays within the folder; one
that leads out makes a bad record. A folder that is a link is refused at opening, for
its images would be missed. The folder itself may be a link.
"""

import bisect
import hashlib
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xviz_jax.audit.extra import require
from xviz_jax.audit.sources.place import Place
from xviz_jax.audit.sources.record import Limits, Reader

SUFFIXES = (
    ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"
)  # fmt: skip


class ImageFolder(Reader):
    """A reader of the images in a folder and its subfolders, by their names.

    `id` is the path within the folder, and `label` the number of the first subfolder
    among their names in order, as in torchvision; hidden files are left out.
    """

    def __init__(self, place: Place, limits: Limits):
        """Lists the names.

        Raises:
          ValueError: If there are none, or a subfolder is a link.
        """
        super().__init__()
        self.folder, self.limits = place, limits
        listed = _here(place) if place.system is None else _there(place)
        found = sorted((os.fsencode(name), size) for name, size in listed)
        if not found:
            raise ValueError(
                f"{place} holds no images; files {', '.join(SUFFIXES)} are wanted"
            )
        self.block = b"".join(name for name, _ in found)
        self.ends, self.sizes = array("Q"), sum(size for _, size in found)
        end = 0
        for name, _ in found:
            self.ends.append(end := end + len(name))
        tops = {os.fsdecode(n.split(b"/")[0]) for n, _ in found if b"/" in n}
        self.classes = tuple(sorted(tops))
        self.names = ("image", "id", *(("label",) if self.classes else ()))

    def __len__(self) -> int:
        """The number of images."""
        return len(self.ends)

    def read(self, row: int, names: tuple[str, ...]) -> dict[str, Any]:
        """The encoded image, its path in the folder and its class."""
        name = self._name(row)
        found: dict[str, Any] = {"id": name}
        if "/" in name:
            found["label"] = bisect.bisect_left(self.classes, name.split("/")[0])
        if "image" in names:
            assert self.folder is not None
            found["image"] = self.folder.read(name, self.limits.bytes)
        return found

    def identity(self) -> dict[str, Any]:
        """The names, and the bytes of all."""
        names = hashlib.sha256(self.block + self.ends.tobytes()).hexdigest()
        return {"format": "images", "names": names, "size": self.sizes}

    def _name(self, row: int) -> str:
        begin = self.ends[row - 1] if row else 0
        return os.fsdecode(self.block[begin : self.ends[row]])


def wanted(name: str) -> bool:
    """Whether a file is read as an image, by its name."""
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and name.lower().endswith(SUFFIXES)


def _here(place: Place) -> Iterator[tuple[str, int]]:
    """Names below a folder of this machine, and sizes."""
    root = Path(place.path)
    folders = [""]
    while folders:
        below = folders.pop()
        with os.scandir(root / below) as entries:
            for entry in entries:
                name = f"{below}{entry.name}"
                linked = entry.is_symlink() and (root / name).is_dir()
                if linked and entry.name[0] != ".":
                    raise ValueError(
                        f"{place} holds the link {name!r} to a folder, which is not "
                        "followed: put the folder itself there"
                    )
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{name}/")
                elif wanted(name) and (entry.is_symlink() or entry.is_file()):
                    yield name, entry.stat(follow_symlinks=False).st_size


def _there(place: Place) -> Iterator[tuple[str, int]]:
    """Names below a folder of an object store, and sizes."""
    fs = require("pyarrow.fs", "an object store")
    start = len(place.path) + 1
    for info in place.system.get_file_info(fs.FileSelector(place.path, recursive=True)):
        name = info.path[start:]
        if info.type == fs.FileType.File and wanted(name):
            yield name, info.size
