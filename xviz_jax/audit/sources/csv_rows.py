"""CSV with a line of names first: RFC 4180, in UTF-8, comma or tab between fields."""

import csv
from typing import Any, BinaryIO

from xviz_jax.audit.sources.lines import GOES_ON, Lines, skip_bom
from xviz_jax.audit.sources.place import Place
from xviz_jax.audit.sources.record import BadRecord, Limits

# Where in a record a piece of it ends: at a field's begin, within a bare field, within
# quotes, or after a quote that closes them or is the first of two.
_BEGIN, _BARE, _QUOTED, _CLOSING = 0, 1, GOES_ON, 3
_HEAD = 2**20


class Csv(Lines):
    """A reader of one `.csv` or `.tsv`; every value is a text.

    A field holds at most `csv.field_size_limit()` characters.
    """

    textual = True

    def __init__(self, place: Place, limits: Limits):
        """Reads the names, and finds where the records begin.

        Raises:
          ValueError: If there is no line of names, or one name is there twice.
        """
        self.delimiter = "\t" if place.suffix == ".tsv" else ","
        super().__init__(place, limits)

    def head(self, file: BinaryIO) -> int:
        """The line of names."""
        begin = skip_bom(file)
        line = file.readline(_HEAD)
        name = self.place.name
        try:
            self.names = tuple(self._fields(line))
        except BadRecord as error:
            raise ValueError(f"{name} has no line of names: {error}") from None
        twice = {n for n in self.names if self.names.count(n) > 1}
        if not any(self.names) or twice:
            raise ValueError(
                f"{name} begins with the names {list(self.names)}"
                + (f", {sorted(twice)} twice" if twice else "")
                + "; one for each column is wanted"
            )
        return begin + len(line)

    def parse(self, record: bytes) -> dict[str, Any]:
        """The fields by name; an empty one has no value."""
        fields = self._fields(record)
        if len(fields) != len(self.names):
            reason = "TRUNCATED" if len(fields) < len(self.names) else "WRONG_SHAPE"
            raise BadRecord(
                reason, f"{len(fields)} fields, {len(self.names)} are wanted"
            )
        return {n: f for n, f in zip(self.names, fields, strict=True) if f}

    def unfinished(self, piece: bytes, state: int) -> int:
        """As Python's csv: quotes count where a field begins with them."""
        mark = self.delimiter.encode()
        place, end = 0, len(piece)
        while place < end:
            if state == _QUOTED:
                place = piece.find(b'"', place) + 1
                if not place:
                    return _QUOTED
                state = _CLOSING
            elif state == _CLOSING:
                byte = piece[place : place + 1]
                state = _QUOTED if byte == b'"' else _BEGIN if byte == mark else _BARE
                place += 1
            elif state == _BEGIN and piece[place : place + 1] == b'"':
                state, place = _QUOTED, place + 1
            else:
                found = piece.find(mark + b'"', place)
                if found < 0:
                    return _BEGIN if piece.endswith(mark) else _BARE
                state, place = _QUOTED, found + 2
        return state

    def _fields(self, record: bytes) -> list[str]:
        try:
            text = record.decode()
        except UnicodeDecodeError as error:
            raise BadRecord("BAD_UTF8", f"byte {error.start}: {error.reason}") from None
        try:
            lines = csv.reader([text], delimiter=self.delimiter, strict=True)
            return next(lines, [])
        except csv.Error as error:
            large, cut = "field limit" in str(error), "end of data" in str(error)
            reason = "TOO_LARGE" if large else "TRUNCATED" if cut else "UNDECODABLE"
            raise BadRecord(reason, str(error)) from None
