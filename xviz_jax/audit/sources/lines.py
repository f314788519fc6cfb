"""Files of lines: where blocks of records begin, and nothing else, is in memory."""

import abc
import bisect
import hashlib
from array import array
from collections.abc import Iterator
from typing import Any, BinaryIO

from xviz_jax.audit.sources.place import Place
from xviz_jax.audit.sources.record import BadRecord, Limits, Reader

# A block has at most so many records, and bytes before its last one.
_RECORDS, _BYTES = 256, 2**20
_PIECE = 2**16
GOES_ON = 2
_BOM = b"\xef\xbb\xbf"


class Lines(Reader):
    """A reader of records that end with a line, in blocks.

    The file is read through once, at opening. Lines of blanks are no records.
    """

    loose = True

    def __init__(self, place: Place, limits: Limits):
        """Finds where the blocks begin."""
        super().__init__()
        self.place, self.limits = place, limits
        self.folder = place.parent()
        # Each block's first row and first byte.
        self.rows, self.begins = array("Q"), array("Q")
        self.count = self.size = 0
        content = hashlib.sha256()
        with place.open() as file:
            self.begin = self.head(file)
            file.seek(0)
            content.update(file.read(self.begin))
            self._index(file, content)
        self.content = content.hexdigest()

    @abc.abstractmethod
    def head(self, file: BinaryIO) -> int:
        """Reads what stands before the records; where they begin."""

    @abc.abstractmethod
    def parse(self, record: bytes) -> dict[str, Any]:
        """One record's values.

        Raises:
          BadRecord: If it has none.
        """

    def unfinished(self, piece: bytes, state: int) -> int:
        """The state after a piece of a record; `GOES_ON` if a line may end in it."""
        return 0

    def __len__(self) -> int:
        """The number of records."""
        return self.count

    def read(self, row: int, names: tuple[str, ...]) -> dict[str, Any]:
        """The values of one record."""
        found = self.parse(self.record(row))
        return {name: found[name] for name in names if name in found}

    def record(self, row: int) -> bytes:
        """The bytes of one record.

        Raises:
          BadRecord: If it is too large, or the file has changed.
        """
        block = bisect.bisect_right(self.rows, row) - 1
        if getattr(self.handles, "block", None) != block:
            self.handles.records = list(self._block(block))
            self.handles.block = block
        record = self.handles.records[row - self.rows[block]]
        if record is None:
            raise BadRecord("TOO_LARGE", f"a record is above {self.limits.bytes} bytes")
        return record

    def identity(self) -> dict[str, Any]:
        """The sha256 of the file."""
        return {"format": "lines", "name": self.place.name, "content": self.content}

    def _index(self, file: BinaryIO, content: Any) -> None:
        place, first, full = self.begin, 0, False
        for record, size in self._records(file, content):
            if record is None or record.strip():
                if full or not self.rows or self.count - first >= _RECORDS:
                    first = self.count
                    self.rows.append(first)
                    self.begins.append(place)
                self.count += 1
            place += size
            full = bool(self.begins) and place - self.begins[-1] >= _BYTES
        self.size = place

    def _block(self, block: int) -> Iterator[bytes | None]:
        last = block + 1 == len(self.rows)
        left = (self.count if last else self.rows[block + 1]) - self.rows[block]
        with self.place.open() as file:
            file.seek(self.begins[block])
            for record, _ in self._records(file):
                if record is None or record.strip():
                    yield record
                    left -= 1
                    if not left:
                        return
        raise BadRecord("TRUNCATED", f"{self.place.name} is shorter than at opening")

    def _records(
        self, file: BinaryIO, content: Any = None
    ) -> Iterator[tuple[bytes | None, int]]:
        """Each record, None where it is too large, and its size with the line's end."""
        most = self.limits.bytes
        while piece := file.readline(_PIECE):
            kept, size, state = [], 0, 0
            while piece:
                if content is not None:
                    content.update(piece)
                size += len(piece)
                if size <= most:
                    kept.append(piece)
                state = self.unfinished(piece, state)
                if piece.endswith(b"\n") and state != GOES_ON:
                    break
                piece = file.readline(_PIECE)
            yield (b"".join(kept) if size <= most else None), size


def skip_bom(file: BinaryIO) -> int:
    """Moves past a byte order mark, if there is one."""
    begin = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(begin)
    return begin
