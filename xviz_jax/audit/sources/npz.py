"""`.npz` and `.npy`: one array per column, read row by row, never unpickled.

A stored member is read at its offset in the archive, a compressed one through its
stream, so records in order are cheap and memory holds one row. Not through a memory
map: a file that shrinks under one ends the process.
"""

import dataclasses
import io
import lzma
import os
import struct
import zipfile
import zlib
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from xviz_jax.audit.sources.place import Place
from xviz_jax.audit.sources.record import BadRecord, Limits, Reader
from xviz_jax.audit.sources.schema import row_bytes, utf8

_LOCAL_HEADER = 30
_ONE = "x"
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError)


@dataclasses.dataclass(frozen=True)
class Member:
    """One array of the file.

    Attributes:
      dtype: Of its entries.
      shape: Of the whole array.
      begin: Where its bytes begin: in the file, or in the stream of `stream`.
      stream: The compressed member's name in the archive; empty for a stored one.
      crc: The archive's checksum.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    stream: str = ""
    crc: int | None = None


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
            except (*_DAMAGE, OSError, NotImplementedError) as error:
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
        size = row_bytes(member.dtype, member.shape[1:])
        try:
            file = self._opened(member.stream)
            file.seek(member.begin + row * size)
            stored = file.read(size)
        except _DAMAGE as error:
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
    if place.suffix == ".npy":
        dtype, shape, begin = _header(file, place.name, _ONE)
        member = Member(dtype, shape, begin)
        return {_ONE: _checked(member, size - begin, place.name, _ONE, limits)}
    found: dict[str, Member] = {}
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if not info.filename.endswith(".npy"):
                raise ValueError(
                    f"{place.name} holds {info.filename!r}, which is no array"
                )
            if name in found:
                raise ValueError(f"{place.name} holds {name!r} twice")
            if info.flag_bits & 1:
                raise ValueError(f"{place.name} is encrypted")
            with archive.open(info) as stream:
                dtype, shape, begin = _header(stream, place.name, name)
            stored = info.compress_type == zipfile.ZIP_STORED
            member = Member(
                dtype,
                shape,
                begin + (_data(file, info, size, place) if stored else 0),
                "" if stored else info.filename,
                info.CRC,
            )
            held = info.file_size - begin
            found[name] = _checked(member, held, place.name, name, limits)
    return found


def _header(
    file: Any, file_name: str, name: str
) -> tuple[np.dtype, tuple[int, ...], int]:
    """Dtype, shape and length of an array's header."""
    try:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        if version not in read:
            raise ValueError(f"format {version} is not known")
        shape, fortran, dtype = read[version](file)
    except (ValueError, EOFError, TypeError, SyntaxError) as error:
        raise ValueError(f"{file_name}: {name!r} is no array: {error}") from None
    if fortran and len(shape) > 1:
        raise ValueError(
            f"{file_name}: {name!r} is stored column by column; save "
            "np.ascontiguousarray of it, so that a record lies together"
        )
    return dtype, shape, file.tell()


def _data(file: BinaryIO, info: zipfile.ZipInfo, size: int, place: Place) -> int:
    """Where a stored member's bytes begin, past its local header."""
    kept = file.tell()
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER)
    name, extra = struct.unpack_from("<HH", header, 26)
    file.seek(kept)
    begin = info.header_offset + _LOCAL_HEADER + name + extra
    if info.compress_size != info.file_size or begin + info.file_size > size:
        raise ValueError(
            f"{place.name} is truncated or no npz: {info.filename!r} of "
            f"{info.file_size} bytes would end at {begin + info.file_size} of {size}"
        )
    return begin


def _checked(
    member: Member, stored: int, file_name: str, name: str, limits: Limits
) -> Member:
    """The member, if it is rows of values, and declares as many bytes as it has."""
    kind = f"{member.dtype}{list(member.shape)}"
    if member.dtype.hasobject:
        raise ValueError(
            f"{file_name}: {name!r} holds Python objects, which are pickled and could "
            "run code; save numbers or texts"
        )
    if member.dtype.kind not in "biufUS":
        raise ValueError(
            f"{file_name}: {name!r} is {kind}, numbers or texts are wanted"
        )
    row, whole = (row_bytes(member.dtype, s) for s in (member.shape[1:], member.shape))
    if min(member.shape, default=0) < 0 or not member.shape or not row:
        raise ValueError(f"{file_name}: {name!r} is {kind}, rows of values are wanted")
    if whole != stored:
        raise ValueError(
            f"{file_name}: {name!r} declares {kind}, {whole} bytes, and has {stored}"
        )
    if row > limits.bytes:
        raise ValueError(
            f"{file_name}: a row of {name!r} has {row} bytes, `limits` allow "
            f"{limits.bytes}"
        )
    return member
