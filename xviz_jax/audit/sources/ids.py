"""Unique ids: the data's own, or the numbers of the rows.

Ids are compared by 16 bytes of blake2b each, sorted in a temporary file: memory does
not grow with the records, and two ids are taken for one with probability below 1e-20
among a billion.
"""

import dataclasses
import hashlib
import tempfile
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from xviz_jax.audit.sources.record import BadRecord, Reader
from xviz_jax.audit.sources.schema import utf8

_LONGEST = 1024
_DIGEST = 16
# Ids that an error names.
_SHOWN = 3

Duplicates = Literal["refuse", "number", "trust"]


@dataclasses.dataclass(frozen=True)
class Ids:
    """How rows are named.

    Attributes:
      column: The data's column; None names every row by its number.
      duplicates: What was done about ids that occur twice.
      first: Of each repeated id, its hash and its first row.
      repeated: Rows that were renamed.
      missing: Rows without an id, named by their number.
      content: The sha256 of all, in order; empty where they were not looked at.
    """

    column: str | None = None
    duplicates: Duplicates = "refuse"
    first: Mapping[bytes, int] = dataclasses.field(default_factory=dict)
    repeated: int = 0
    missing: int = 0
    content: str = ""

    def of(self, row: int, raw: Mapping[str, Any]) -> str:
        """The id of a row.

        Raises:
          BadRecord: If it is no text and no integer, too long or no UTF-8.
        """
        return self._unique(row, own(row, raw, self.column))

    def of_bad(self, row: int, reader: Reader) -> str:
        """The id of a row that cannot be used: its own if that can be read alone."""
        return self._unique(row, _look(reader, row, self.column)[0])

    def _unique(self, row: int, name: str) -> str:
        again = self.first and self.first.get(_digest(name), row) != row
        return renamed(name, row) if again else name

    def identity(self) -> list[str | None]:
        """What the fingerprint holds."""
        return [self.column, self.duplicates, self.content]


def own(row: int, raw: Mapping[str, Any], column: str | None) -> str:
    """The id that the data gives a row, or its number.

    Raises:
      BadRecord: If it is no text and no integer, too long or no UTF-8.
    """
    value = None if column is None else raw.get(column)
    if isinstance(value, np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if value is None or value in ("", b""):
        return str(row)
    if isinstance(value, bytes | str):
        value = utf8(f"id {column}", value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BadRecord(
            "WRONG_DTYPE",
            f"id {column!r} is {value!r:.40}, a text or integer is wanted",
        )
    if len(str(value)) > _LONGEST:
        raise BadRecord("TOO_LONG", f"id {column!r} is above {_LONGEST} characters")
    return str(value)


def renamed(name: str, row: int) -> str:
    """A repeated id with its row."""
    return f"{name}#{row}"


def resolve(reader: Reader, column: str | None, duplicates: Duplicates) -> Ids:
    """Looks at every id once.

    Raises:
      ValueError: If ids occur twice and that is refused, or if renaming them would
        make another duplicate.
    """
    if column is None or duplicates == "trust" or not len(reader):
        return Ids(column, duplicates)
    with tempfile.TemporaryFile() as file:
        missing, content = 0, hashlib.sha256()
        for row in range(len(reader)):
            name, blank = _look(reader, row, column)
            missing += blank
            digest = _digest(name).ljust(_DIGEST, b"\0")
            content.update(digest)
            file.write(digest)
        # Mapped once it is on the disk: a full disk under a map ends the process.
        file.flush()
        digests = np.memmap(file, f"S{_DIGEST}", "r+")
        digests.sort()
        twice = set(digests[1:][digests[1:] == digests[:-1]].tolist())
        if not twice:
            return Ids(column, duplicates, {}, 0, missing, content.hexdigest())
        first, shown, repeated = {}, [], 0
        for row in range(len(reader)):
            name, _ = _look(reader, row, column)
            digest = _digest(name)
            if digest not in twice or first.setdefault(digest, row) == row:
                continue
            repeated += 1
            if duplicates == "refuse":
                shown += [f"{name!r:.60} (row {row})"] if repeated <= _SHOWN else []
            elif _holds(digests, _digest(renamed(name, row))):
                raise ValueError(
                    f"the repeated id {name!r:.60} of row {row} would be named as "
                    "another record is; pass `id=None` to name records by their row"
                )
        if duplicates == "refuse":
            raise ValueError(
                f"ids of column {column!r} occur twice: {', '.join(shown)}, {repeated} "
                "rows in all; ids are unique, or pass `duplicates='number'`"
            )
    return Ids(column, duplicates, first, repeated, missing, content.hexdigest())


def _holds(digests: np.ndarray, digest: bytes) -> bool:
    place = int(np.searchsorted(digests, digest))
    return place < len(digests) and digests[place] == digest


def _look(reader: Reader, row: int, column: str | None) -> tuple[str, bool]:
    """A row's id, or its number where the id cannot be read; whether it has none."""
    if column is None:
        return str(row), False
    try:
        raw = reader.read(row, (column,))
        return own(row, raw, column), raw.get(column) in (None, "", b"")
    except BadRecord:
        return str(row), False


def _digest(name: str) -> bytes:
    # numpy drops zero bytes at the end, here as in what it is compared with.
    return hashlib.blake2b(name.encode(), digest_size=_DIGEST).digest().rstrip(b"\0")
