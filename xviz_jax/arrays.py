"""`.npy` and `.npz` of strangers: headers checked against what the file holds.

Nothing is unpickled, and no memory is taken that the file does not fill: a header may
claim terabytes, and 50 kB of an archive may stand for 50 MB.
"""

import dataclasses
import lzma
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

# What readers of damaged archives raise, besides OSError.
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError)
_LOCAL_HEADER = 30
_ZIP = b"PK"


@dataclasses.dataclass(frozen=True)
class Member:
    """One array of a file.

    Attributes:
      dtype: Of its entries.
      shape: Of the whole array.
      begin: Where its bytes begin: in the file, or in the stream of `stream`.
      stream: The compressed member's name in the archive; empty for a stored one.
      crc: The archive's checksum.
      fortran: Whether it is stored column by column.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    stream: str = ""
    crc: int | None = None
    fortran: bool = False

    @property
    def bytes(self) -> int:
        """Of the whole array, in integers that do not overflow."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def __str__(self) -> str:
        """Dtype and shape."""
        return f"{self.dtype}{list(self.shape)}"


def load(path: Path, *, most: int = 4 * 2**30) -> dict[str, np.ndarray]:
    """All arrays of a file, by name; the one of a `.npy` file under `""`.

    Args:
      path: The file.
      most: Bytes that the arrays may have in all.

    Raises:
      ValueError: If it is no such file, damaged, pickled, or has more bytes.
      OSError: If it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        single = file.read(len(_ZIP)) != _ZIP
        file.seek(0)
        try:
            found = (
                {"": alone(file, size, path.name)}
                if single
                else members(file, size, path.name)
            )
        except (*DAMAGE, NotImplementedError) as error:
            raise ValueError(f"{path.name} is truncated or no npz: {error}") from None
        total = sum(member.bytes for member in found.values())
        if total > most:
            raise ValueError(
                f"{path.name} holds {total} bytes of arrays, the most are {most}"
            )
        file.seek(0)
        try:
            read = np.load(file, allow_pickle=False)
            if single:
                return {"": read}
            with read:
                return {name: read[name] for name in found}
        except DAMAGE as error:
            raise ValueError(f"{path.name} is damaged: {error}") from None


def alone(file: BinaryIO, size: int, file_name: str, name: str = "") -> Member:
    """The array of a `.npy` file.

    Args:
      file: At its begin.
      size: Bytes of the file.
      file_name: For errors.
      name: What errors call the array.

    Raises:
      ValueError: If it is none, pickled, or not of the size that its header declares.
    """
    member = _header(file, file_name, name)
    return _checked(member, size - member.begin, file_name, name)


def members(file: BinaryIO, size: int, file_name: str) -> dict[str, Member]:
    """The arrays of an `.npz` file, by name.

    Args:
      file: Which can be sought.
      size: Bytes of the file.
      file_name: For errors.

    Raises:
      ValueError: If one is none, pickled, there twice or encrypted, or not of the size
        that its header declares.
      Exception: One of `DAMAGE`, if the archive is damaged.
    """
    found: dict[str, Member] = {}
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if not info.filename.endswith(".npy"):
                raise ValueError(
                    f"{file_name} holds {info.filename!r}, which is no array"
                )
            if name in found:
                raise ValueError(f"{file_name} holds {name!r} twice")
            if info.flag_bits & 1:
                raise ValueError(f"{file_name} is encrypted")
            with archive.open(info) as stream:
                member = _header(stream, file_name, name)
            held = info.file_size - member.begin
            stored = info.compress_type == zipfile.ZIP_STORED
            shift = _data(file, info, size, file_name) if stored else 0
            member = dataclasses.replace(
                member,
                begin=member.begin + shift,
                stream="" if stored else info.filename,
                crc=info.CRC,
            )
            found[name] = _checked(member, held, file_name, name)
    return found


def _header(file: Any, file_name: str, name: str) -> Member:
    try:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        if version not in read:
            raise ValueError(f"format {version} is not known")
        shape, fortran, dtype = read[version](file)
    except (ValueError, EOFError, TypeError, SyntaxError) as error:
        raise ValueError(f"{file_name}: {name!r} is no array: {error}") from None
    return Member(dtype, shape, file.tell(), fortran=fortran and len(shape) > 1)


def _data(file: BinaryIO, info: zipfile.ZipInfo, size: int, file_name: str) -> int:
    """Where a stored member's bytes begin, past its local header."""
    kept = file.tell()
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER)
    name, extra = struct.unpack_from("<HH", header, 26)
    file.seek(kept)
    begin = info.header_offset + _LOCAL_HEADER + name + extra
    if info.compress_size != info.file_size or begin + info.file_size > size:
        raise ValueError(
            f"{file_name} is truncated or no npz: {info.filename!r} of "
            f"{info.file_size} bytes would end at {begin + info.file_size} of {size}"
        )
    return begin


def _checked(member: Member, stored: int, file_name: str, name: str) -> Member:
    """The member, if it holds values, and declares as many bytes as it has."""
    if member.dtype.hasobject:
        raise ValueError(
            f"{file_name}: {name!r} holds Python objects, which are pickled and could "
            "run code; save numbers or texts"
        )
    if member.dtype.kind not in "biufUS":
        raise ValueError(
            f"{file_name}: {name!r} is {member}, numbers or texts are wanted"
        )
    if min(member.shape, default=0) < 0:
        raise ValueError(
            f"{file_name}: {name!r} is {member}, rows of values are wanted"
        )
    if member.bytes != stored:
        raise ValueError(
            f"{file_name}: {name!r} declares {member}, {member.bytes} bytes, and has "
            f"{stored}"
        )
    return member
