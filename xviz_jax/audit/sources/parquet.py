"""Parquet, row group by row group, a batch of rows in memory.

Records in order cost one pass over the file; a record out of order costs up to its
row group. Checksums of pages are verified where the file has them.

A value that is many equal numbers takes little place in a file, and pyarrow makes it
whole: it is refused once it is there. The sizes of columns, which could tell before,
are not looked at: pyarrow ends the process where a damaged file's contradict each
other. Explain Parquet of strangers in workers that may die.
"""

import hashlib
from typing import Any

import numpy as np

from xviz_jax.audit.extra import require
from xviz_jax.audit.sources.place import Place
from xviz_jax.audit.sources.record import BadRecord, Limits, Reader

_ROWS, _BYTES = 256, 16 * 2**20
_BUFFER, _MARK = 2**20, 8
# What pyarrow says of damaged bytes.
_DAMAGE = ("CRC", "orrupt", "page", "thrift", "end of stream", "nvalid")


class Parquet(Reader):
    """A reader of one `.parquet`."""

    def __init__(self, place: Place, limits: Limits):
        """Reads the footer.

        Raises:
          ValueError: If it is damaged.
        """
        super().__init__()
        self.place, self.limits = place, limits
        try:
            stored = place.native()
            file = self._open(stored)
        except OSError as error:
            raise ValueError(f"{place.name} cannot be read: {error}") from None
        except (ValueError, NotImplementedError) as error:
            raise ValueError(
                f"{place.name} is truncated or no Parquet: {error}"
            ) from None
        with stored, file:
            footer, schema = file.metadata, file.schema_arrow
            groups = [footer.row_group(g) for g in range(footer.num_row_groups)]
            counts = [group.num_rows for group in groups]
            sizes = [group.total_byte_size for group in groups]
            if min(counts, default=0) < 0 or sum(counts) != footer.num_rows:
                raise ValueError(
                    f"{place.name} declares {footer.num_rows} rows, its groups {counts}"
                )
            self.first = np.cumsum([0, *counts])
            self.sizes = np.array(sizes, np.int64)
            self.names = tuple(schema.names)
            self.kinds = dict(filter(None, map(_kind, schema)))
            self.size = stored.size()
            self.footer = _footer(stored, footer.serialized_size)
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"{place.name} has a column twice, of {list(self.names)}")

    def __len__(self) -> int:
        """The number of records."""
        return int(self.first[-1])

    def read(self, row: int, names: tuple[str, ...]) -> dict[str, Any]:
        """One row, out of the batch that this thread read last if it is there."""
        cursors = vars(self.handles)
        at = cursors.setdefault(repr(names), _Cursor())
        if not at.begin <= row < at.end:
            self._seek(at, row, names)
        found = {}
        for name in names:
            if name in self.names:
                value = _value(name, at.batch.column(name)[row - at.begin])
                size = getattr(value, "nbytes", 0)
                if size > self.limits.bytes:
                    raise BadRecord(
                        "TOO_LARGE",
                        f"{name!r} has {size} bytes, the most are {self.limits.bytes}",
                    )
                found[name] = value
        return found

    def identity(self) -> dict[str, Any]:
        """The file's size, and a hash of its footer: schema, places and statistics."""
        return {
            "format": "parquet",
            "name": self.place.name,
            "size": self.size,
            "footer": self.footer,
        }

    def _seek(self, at: "_Cursor", row: int, names: tuple[str, ...]) -> None:
        """Reads on to the batch with this row; from the group's begin if need be."""
        group = int(np.searchsorted(self.first, row, "right")) - 1
        count = int(self.first[group + 1] - self.first[group])
        each = int(self.sizes[group]) / count
        if each > self.limits.bytes:
            raise BadRecord(
                "TOO_LARGE", f"{each:.0f} bytes a row, the most are {self.limits.bytes}"
            )
        if at.group != group or row < at.begin:
            at.file = at.file or self._open(self.place.native())
            at.batches = at.file.iter_batches(
                max(1, min(_ROWS, int(_BYTES / max(each, 1.0)))),
                row_groups=[group],
                columns=[name for name in names if name in self.names],
                use_threads=False,
            )
            at.begin = at.end = int(self.first[group])
            at.group, at.fault = group, "it ends too early"
        try:
            while row >= at.end:
                batch = next(at.batches)
                at.begin, at.end = at.end, at.end + batch.num_rows
                at.batch = batch
        except StopIteration:
            # Nothing of a group can be read past what is damaged.
            raise BadRecord("UNDECODABLE", f"row group {group}: {at.fault}") from None
        except (OSError, ValueError, NotImplementedError) as error:
            if isinstance(error, OSError) and self._storage(error):
                self.close()
                raise
            at.fault = str(error)
            raise BadRecord("UNDECODABLE", f"row group {group}: {at.fault}") from None

    def _storage(self, error: OSError) -> bool:
        """Whether the storage failed; damaged pages are an OSError of pyarrow's too."""
        if self.place.system is None:
            return error.errno is not None
        return not any(word in str(error) for word in _DAMAGE)

    def _open(self, stored: Any) -> Any:
        parquet = require("pyarrow.parquet", "Parquet")
        return parquet.ParquetFile(
            stored,
            buffer_size=_BUFFER,
            pre_buffer=False,
            page_checksum_verification=True,
        )


class _Cursor:
    """Where a thread reads some columns."""

    def __init__(self):
        self.file: Any = None
        self.batches: Any = None
        self.batch: Any = None
        self.group = -1
        self.begin = self.end = 0
        self.fault = ""


def _footer(stored: Any, size: int) -> str:
    """The sha256 of the footer's bytes, which lie before its length and a mark."""
    stored.seek(stored.size() - size - _MARK)
    return hashlib.sha256(stored.read(size)).hexdigest()


def _kind(field: Any) -> tuple[str, tuple[np.dtype, tuple[int, ...] | None]] | None:
    """The numbers or texts of a column; None where the values are of other kinds."""
    types = require("pyarrow.types", "Parquet")
    leaf, shape = field.type, ()
    if types.is_dictionary(leaf):
        leaf = leaf.value_type
    while hasattr(leaf, "value_type") and not types.is_dictionary(leaf):
        size = leaf.list_size if types.is_fixed_size_list(leaf) else None
        shape = None if shape is None or size is None else (*shape, size)
        leaf = leaf.value_type
    if types.is_string(leaf) or types.is_large_string(leaf):
        return field.name, (np.dtype("U"), shape)
    if types.is_integer(leaf) or types.is_floating(leaf) or types.is_boolean(leaf):
        return field.name, (np.dtype(leaf.to_pandas_dtype()), shape)
    return None


def _value(name: str, scalar: Any) -> Any:
    """A scalar of Arrow as a text, bytes, or numbers of the stored kind."""
    if not scalar.is_valid:
        return None
    try:
        if hasattr(scalar, "to_numpy"):
            return scalar.to_numpy()
        if hasattr(scalar, "values") and hasattr(scalar.type, "value_type"):
            return _array(name, scalar.values)
        value = scalar.as_py()
    except UnicodeDecodeError as error:
        raise BadRecord("BAD_UTF8", f"{name!r}: {error.reason}") from None
    if isinstance(value, bool | int | float):
        return np.asarray(value, scalar.type.to_pandas_dtype())
    return value


def _array(name: str, values: Any) -> Any:
    """The elements of a list, or of lists of one length."""
    if values.null_count:
        raise BadRecord("MISSING", f"{name!r} has {values.null_count} empty elements")
    if not hasattr(values.type, "value_type"):
        return values.to_numpy(zero_copy_only=False)
    rows = [_array(name, row.values) for row in values]
    if len({row.shape for row in rows}) > 1:
        raise BadRecord("WRONG_SHAPE", f"{name!r} has lists of different lengths")
    return np.stack(rows) if rows else np.zeros((0,))
