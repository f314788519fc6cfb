"""`.npz` and `.npy`: one array per column, read row by row, never unpickled.

A stored member is read at its offset in the archive, a compressed one through its
stream, so records in order are cheap and memory holds one row. Not through a memory
map: a file that shrinks under one ends the process.
"""

import io
import os
import zipfile
from typing import Any, BinaryIO

import numpy as np

from xviz_jax import arrays
from xviz_jax.arrays import DAMAGE, Member
from xviz_jax.audit.sources.place import Place
from xviz_jax.audit.sources.record import BadRecord, Limits, Reader
from xviz_jax.audit.sources.schema import utf8

_ONE = "x"


class Npz(Reader):
    """A reader of one `.npz` or `.npy`."""

    def __init__(self, place: Place, limits: Limits):
        """Reads the headers and checks them against the file's size.

        Raises:
          ValueError: If it is damaged, pickled, or its columns are no rows.
        """
        super().__init__()
        self.place = place
        self.size = place.size()
        with place.open() as file:
            try:
                self.members = _members(file, self.size, place, limits)
            except (*DAMAGE, OSError, NotImplementedError) as error:
                raise ValueError(
                    f"{place.name} is truncated or no npz: {error}"
                ) from None
        counts = {name: member.shape[0] for name, member in self.members.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"{place.name} has columns of different lengths: {counts}; one row "
                "for each record is wanted"
            )
        self.count = next(iter(counts.values()), 0)
        self.names = tuple(self.members)
        self.kinds = {n: (m.dtype, m.shape[1:]) for n, m in self.members.items()}

    def __len__(self) -> int:
        """The number of records."""
        return self.count

    def read(self, row: int, names: tuple[str, ...]) -> dict[str, Any]:
        """One row of each column."""
        return {n: self._row(row, n) for n in names if n in self.members}

    def identity(self) -> dict[str, Any]:
        """Names, kinds, and the archive's own checksums."""
        members = {
            name: [m.dtype.str, list(m.shape), m.crc]
            for name, m in self.members.items()
        }
        return {"format": "npz", "name": self.place.name, "columns": members}

    def _row(self, row: int, name: str) -> Any:
        member = self.members[name]
        size = member.row_bytes
        try:
            file = self._opened(member.stream)
            file.seek(member.begin + row * size)
            stored = file.read(size)
        except DAMAGE as error:
            raise BadRecord("UNDECODABLE", f"{name!r}: {error}") from None
        if len(stored) < size:
            raise BadRecord("TRUNCATED", f"{name!r}: {len(stored)} of {size} bytes")
        value = np.frombuffer(stored, member.dtype).reshape(member.shape[1:])
        if member.dtype.kind not in "US" or value.ndim:
            return value
        try:
            text = value.item()
        except ValueError as error:
            raise BadRecord("BAD_UTF8", f"{name!r}: {error}") from None
        return utf8(name, text)

    def _opened(self, stream: str) -> Any:
        """This thread's handle of the file, or of a compressed member."""
        handles = vars(self.handles)
        if stream not in handles:
            # Each has a handle of its own: members are read in turn.
            handles[stream] = _Handle(self.place, stream)
        return handles[stream].stream


class _Handle:
    """An open file that is closed with its thread or its reader."""

    def __init__(self, place: Place, stream: str):
        if place.system is None:
            # A file object that did not open its file closes without a warning.
            self.number = os.open(place.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            file = io.BufferedReader(io.FileIO(self.number, closefd=False))
        else:
            self.number, file = None, place.open()
        self.stream = zipfile.ZipFile(file).open(stream) if stream else file

    def __del__(self, close=os.close):
        number = getattr(self, "number", None)
        if number is not None:
            close(number)


def _members(
    file: BinaryIO, size: int, place: Place, limits: Limits
) -> dict[str, Member]:
    """The arrays, all of them rows of values that lie together."""
    if place.suffix == ".npy":
        found = {_ONE: arrays.alone(file, size, place.name, _ONE)}
    else:
        found = arrays.members(file, size, place.name)
    for name, member in found.items():
        if member.fortran:
            raise ValueError(
                f"{place.name}: {name!r} is stored column by column; save "
                "np.ascontiguousarray of it, so that a record lies together"
            )
        if not member.shape or not member.row_bytes:
            raise ValueError(
                f"{place.name}: {name!r} is {member}, rows of values are wanted"
            )
        if member.row_bytes > limits.bytes:
            raise ValueError(
                f"{place.name}: a row of {name!r} has {member.row_bytes} bytes, "
                f"`limits` allow {limits.bytes}"
            )
    return found
