"""What stands before the weights in a GGUF file: metadata and a table of tensors.

The layout is GGUF's specification, versions 2 and 3, little-endian (ggml,
docs/gguf.md). Read here, because a vocabulary has a hundred thousand strings.
"""

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_AXES = 4


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the table.

    Attributes:
      shape: As numpy has it, the slowest axis first.
      kind: The number of its quantisation.
      begin: Where its bytes begin in the file.
    """

    shape: tuple[int, ...]
    kind: int
    begin: int


@dataclasses.dataclass(frozen=True, eq=False)
class Header:
    """A GGUF file, its weights not read.

    Attributes:
      data: uint8, the whole file, mapped into memory.
      fields: The metadata; arrays of numbers as numpy arrays, of strings as lists.
      tensors: By name.
    """

    data: np.ndarray
    fields: dict[str, Any]
    tensors: dict[str, Entry]


def read_header(file: Path) -> Header:
    """Reads the metadata and the table of tensors.

    Raises:
      ValueError: If the file is truncated or no GGUF file.
    """
    try:
        data = np.memmap(file, np.uint8, mode="r")
        return _read(data)
    except (ValueError, struct.error) as error:
        raise ValueError(f"{file.name} is truncated or no GGUF file: {error}") from None


def _read(data: np.ndarray) -> Header:
    cursor = _Cursor(data.data)
    magic, version = cursor.take(4), cursor.number("<I")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r}, version {version}")
    tensors, count = cursor.number("<Q"), cursor.number("<Q")
    fields = {}
    for _ in range(count):
        name = cursor.string()
        fields[name] = cursor.value(cursor.number("<I"))
    table = {}
    for _ in range(tensors):
        name = cursor.string()
        axes = cursor.number("<I")
        if axes > _AXES:
            raise ValueError(f"{name!r} has {axes} axes")
        shape = tuple(cursor.number("<Q") for _ in range(axes))[::-1]
        table[name] = Entry(shape, cursor.number("<I"), cursor.number("<Q"))
    align = int(fields.get("general.alignment", 32))
    begin = math.ceil(cursor.place / align) * align
    moved = {
        name: dataclasses.replace(entry, begin=begin + entry.begin)
        for name, entry in table.items()
    }
    return Header(data, fields, moved)


class _Cursor:
    """Reads values one after the other."""

    def __init__(self, data: memoryview):
        self.data, self.place = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.place:
            raise ValueError(f"{size} bytes are wanted at {self.place}, it ends")
        self.place += size
        return bytes(self.data[self.place - size : self.place])

    def number(self, form: str) -> Any:
        (found,) = struct.unpack_from(form, self.data, self.place)
        self.place += struct.calcsize(form)
        return found

    def string(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in (_STRING, _ARRAY):
                return [self.value(inner) for _ in range(count)]
            dtype = self._dtype(inner)
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        dtype = self._dtype(kind)
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def _dtype(self, kind: int) -> np.dtype:
        if kind not in _NUMBERS:
            raise ValueError(f"there is no kind of value {kind}")
        return np.dtype(_NUMBERS[kind])
