"""Records of any format: chosen columns, checked, under unique ids."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from xviz_jax.audit.sources import ids, json_text, pixels
from xviz_jax.audit.sources.record import BadRecord, Limits, Reader, Record
from xviz_jax.audit.sources.schema import ANY, DEFAULTS, Column, utf8

_INTEGER = re.compile(r"-?[0-9]{1,18}")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Records by number; `open_source` makes one.

    It can be read by several threads, and pickled: what is pickled is where the data
    lies and what was found at opening, not handles and not records.

    Attributes:
      reader: The format.
      columns: The record's name of each column, and the data's.
      schema: What columns must hold.
      label: The data's column of the true class.
      names: The ids.
      prepare: Makes the model's columns of the checked ones.
      limits: How large a record may be.
    """

    reader: Reader
    columns: Mapping[str, str]
    schema: Mapping[str, Column]
    label: str | None
    names: ids.Ids
    prepare: Callable[[dict[str, Any]], Mapping[str, Any]] | None
    limits: Limits

    def __len__(self) -> int:
        """The number of records."""
        return len(self.reader)

    def __getitem__(self, row: int) -> Record:
        """The record of one row.

        Raises:
          BadRecord: If the record cannot be used; it knows its id.
          OSError: If the storage failed. That is no fault of the record's: try again.
          IndexError: If there is no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"there are {len(self)} records, got {row}")
        name = None
        try:
            raw = self.reader.read(row, self._wanted())
            name = self.names.of(row, raw)
            found = {ours: self._value(ours, raw) for ours in self.columns}
            if self.prepare is not None:
                found = self._prepared(found)
            return Record(name, found, self._label(raw))
        except BadRecord as error:
            if name is None:
                name = self.names.of_bad(row, self.reader)
            raise BadRecord(error.reason, error.message, name) from error

    def rows(self, begin: int, end: int) -> Iterator[Record | BadRecord]:
        """The records from `begin` to `end`, in order; a bad one as what is wrong."""
        for row in range(begin, end):
            try:
                yield self[row]
            except BadRecord as error:
                # Without the frames, which hold the record.
                yield BadRecord(*error.args)

    @property
    def classes(self) -> tuple[str, ...]:
        """What integer labels stand for, where the data says it: subfolders' names."""
        return self.reader.classes

    def fingerprint(self) -> str:
        """The sha256 of what the records are: the same data, columns and checks.

        It holds names, sizes, schema and the number of records, and a hash of the
        content where the format gives one cheaply; not where the data lies.
        """
        said = {
            "columns": dict(self.columns),
            "data": self.reader.identity(),
            "ids": self.names.identity(),
            "label": self.label,
            "limits": dataclasses.asdict(self.limits),
            "prepare": _qualified(self.prepare),
            "records": len(self),
            "schema": {k: dataclasses.asdict(v) for k, v in self.schema.items()},
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def _wanted(self) -> tuple[str, ...]:
        beside = [name for name in (self.names.column, self.label) if name is not None]
        return tuple(dict.fromkeys([*self.columns.values(), *beside]))

    def _value(self, ours: str, raw: Mapping[str, Any]) -> Any:
        theirs = self.columns[ours]
        column = self.schema.get(ours) or DEFAULTS.get(ours, ANY)
        value = raw.get(theirs)
        if value is None:
            raise BadRecord("MISSING", f"{theirs!r} has no value")
        if column.dtype != "text":
            if self._spelled(value, column):
                value = json_text.numbers(value, self.limits, column.shape == ())
            elif column.decode == "image" or pixels.encoded(value):
                folder = self.reader.folder
                value = pixels.decode(value, self.limits, folder, column.shape)
        return column.check(ours, value, loose=self.reader.loose)

    def _spelled(self, value: Any, column: Column) -> bool:
        """Whether a text stands for numbers."""
        if not self.reader.textual or not isinstance(value, str):
            return False
        # An image's may also be a file's name, which does not end in a bracket.
        return column.decode is None or json_text.bracketed(value)

    def _prepared(self, found: dict[str, Any]) -> dict[str, Any]:
        assert self.prepare is not None
        try:
            return dict(self.prepare(found))
        except (BadRecord, MemoryError):
            raise
        except Exception as error:
            raise BadRecord("UNPREPARED", f"{type(error).__name__}: {error}") from error

    def _label(self, raw: Mapping[str, Any]) -> int | float | str | None:
        value = raw.get(self.label) if self.label is not None else None
        if isinstance(value, np.ndarray | np.generic) and value.ndim == 0:
            value = value.item()
        if self.reader.textual and isinstance(value, str) and _INTEGER.fullmatch(value):
            return int(value)
        if value is not None and not isinstance(value, int | float | str):
            raise BadRecord(
                "WRONG_DTYPE",
                f"label {self.label!r} is {type(value).__name__}, a number or a text "
                "is wanted",
            )
        return utf8(f"label {self.label}", value) if isinstance(value, str) else value


def _qualified(function: Any) -> str | None:
    if function is None:
        return None
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
