"""A record, why one is refused, and how large one may be."""

import abc
import dataclasses
import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from xviz_jax.audit.sources.place import Place

# Every reason for which a source refuses a record.
REASONS = {
    "BAD_UTF8": "a text is no UTF-8, or holds half of a surrogate pair",
    "EMPTY": "nothing is there to explain: no entry, or only padding",
    "MISSING": "a column has no value",
    "NEGATIVE_ID": "a token id is below zero",
    "NONFINITE_INPUT": "a number is NaN or infinite",
    "OUT_OF_VOCABULARY": "a token id is not below the vocabulary's size",
    "TOO_LARGE": "more bytes or pixels than the limits allow",
    "TOO_LONG": "longer than the longest bucket or the schema allows",
    "TRUNCATED": "the record ends too early",
    "UNDECODABLE": "the bytes are not what they should be",
    "UNPREPARED": "`prepare` raised on it",
    "UNREADABLE": "reading it failed",
    "UNSAFE_PATH": "a file's name leads out of the folder",
    "WRONG_DTYPE": "another kind of values than wanted",
    "WRONG_SHAPE": "another shape than wanted",
}


class BadRecord(Exception):
    """One record cannot be used; the others can.

    Attributes:
      reason: A key of `REASONS`.
      message: What was got and what was wanted. It may quote the record: escape it.
      id: The record's, or its number where the id cannot be read.
    """

    def __init__(self, reason: str, message: str, id: str = ""):
        """Checks that the reason is one of `REASONS`."""
        if reason not in REASONS:
            raise ValueError(f"`reason` is one of {sorted(REASONS)}, got {reason!r}")
        super().__init__(reason, message, id)
        self.reason, self.message, self.id = reason, message, id

    def __str__(self) -> str:
        """The reason, and the message."""
        return f"{self.reason}: {self.message}"


@dataclasses.dataclass(frozen=True)
class Record:
    """One input of an audit.

    Attributes:
      id: Unique in its source.
      columns: What the model gets, by name: arrays, or texts.
      label: The true class, if the source knows it.
    """

    id: str
    columns: Mapping[str, Any]
    label: int | float | str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How large one record may be. A larger one is refused before it is in memory.

    Attributes:
      pixels: Of an image, checked in its header.
      bytes: Of a line, of a file in a folder, and of an array's row.
      depth: Of brackets within brackets in JSON.
    """

    pixels: int = 64 * 2**20
    bytes: int = 64 * 2**20
    depth: int = 64


class Reader(abc.ABC):
    """One format: the raw values of a record by its number.

    It is pickled without its handles, and may be read by several threads.

    Attributes:
      names: The columns there are.
      kinds: Of columns that hold one kind of values: dtype, and the shape of a row
        where it is the same in all.
      folder: Where names of files in the data are looked up; None where they are not.
      loose: Numbers were written as text, so 1 may stand for 1.0.
      classes: What integer labels stand for, where the data says it.
      textual: Every value is a text, also what stands for numbers.
    """

    names: tuple[str, ...] = ()
    kinds: Mapping[str, tuple[np.dtype, tuple[int, ...] | None]] = MappingProxyType({})
    folder: "Place | None" = None
    classes: tuple[str, ...] = ()
    loose = False
    textual = False

    def __init__(self):
        """Has no handles yet."""
        self.handles = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        """All but the handles."""
        return {k: v for k, v in vars(self).items() if k != "handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Has no handles yet."""
        self.handles = threading.local()
        vars(self).update(state)

    def close(self) -> None:
        """Closes this thread's handles; the next read opens them again."""
        vars(self.handles).clear()

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of records."""

    @abc.abstractmethod
    def read(self, row: int, names: tuple[str, ...]) -> dict[str, Any]:
        """The values of these columns; one that a record lacks is left out.

        Raises:
          BadRecord: If this record cannot be read.
        """

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the data is, for the fingerprint: plain values, cheaply found."""
