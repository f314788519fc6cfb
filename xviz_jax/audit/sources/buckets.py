"""Length buckets: the shape a record is computed in, from the record alone.

A row's bits depend on the compiled shape. So the shape never depends on a neighbour:
each record is padded to the next of a few lengths.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

from xviz_jax.audit.sources.record import BadRecord, Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
    """The lengths that records of one column are padded to.

    Attributes:
      column: Whose first axis is the length.
      lengths: Ascending; None takes the powers of two from `shortest`.
      shortest: The smallest power of two.
      longest: The longest record when `lengths` is None, and then the last bucket.
      pad: What is filled in. Trailing entries equal to it in a one-axis integer
        column count as padding, so a record padded before gives the same bucket.

    >>> buckets = Buckets(column="tokens", shortest=4, longest=100)
    >>> tokens = np.array([7, 8, 9, 3, 2], np.int32)
    >>> record = Record("a", {"tokens": tokens})
    >>> buckets.bucket_of(record)
    8
    >>> columns, mask = buckets.padded(record)
    >>> columns["tokens"].tolist(), mask.astype(int).tolist()
    ([7, 8, 9, 3, 2, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0])
    """

    column: str
    lengths: tuple[int, ...] | None = None
    shortest: int = 16
    longest: int = 4096
    pad: int = 0

    def __post_init__(self):
        """Refuses lengths that do not ascend."""
        if self.lengths is None:
            if not 1 <= self.shortest <= self.longest:
                raise ValueError(
                    f"`shortest` is from 1 to `longest`, got {self.shortest} and "
                    f"{self.longest}"
                )
            return
        ascending = all(a < b for a, b in itertools.pairwise((0, *self.lengths)))
        if not self.lengths or not ascending:
            raise ValueError(f"`lengths` are positive and ascend, got {self.lengths}")

    def all(self) -> tuple[int, ...]:
        """Every bucket, so every shape that may be compiled."""
        if self.lengths is not None:
            return self.lengths
        first = 1 << (self.shortest - 1).bit_length()
        powers = [first]
        while powers[-1] < self.longest:
            powers.append(2 * powers[-1])
        return (*powers[:-1], self.longest)

    def length_of(self, record: Record) -> int:
        """Entries of the record that are not trailing padding.

        Raises:
          BadRecord: `EMPTY` if none is left, `WRONG_SHAPE` if the column has no axis,
            `MISSING` if the record lacks it.
        """
        value = record.columns.get(self.column)
        if value is None:
            raise BadRecord("MISSING", f"{self.column!r} has no value", record.id)
        if isinstance(value, str) or value.ndim == 0:
            raise BadRecord(
                "WRONG_SHAPE",
                f"{self.column!r} has no axis, tokens of a length are wanted",
                record.id,
            )
        if value.ndim > 1 or value.dtype.kind not in "iu":
            length = len(value)
        else:
            kept = np.flatnonzero(value != self.pad)
            length = int(kept[-1]) + 1 if kept.size else 0
        if length == 0:
            raise BadRecord(
                "EMPTY",
                f"{self.column!r} has {len(value)} entries, none but padding",
                record.id,
            )
        return length

    def bucket_of(self, record: Record) -> int:
        """The length that the record is padded to.

        Raises:
          BadRecord: `TOO_LONG` above the last bucket; it is never cut off. And as
            `length_of`.
        """
        length, buckets = self.length_of(record), self.all()
        if length > buckets[-1]:
            raise BadRecord(
                "TOO_LONG",
                f"{self.column!r} has length {length}, the longest bucket is "
                f"{buckets[-1]}",
                record.id,
            )
        return min(bucket for bucket in buckets if bucket >= length)

    def padded(self, record: Record) -> tuple[dict[str, Any], np.ndarray]:
        """The record's columns with this one padded, and where it is not padding.

        Returns:
          The columns, and a bool mask [bucket].

        Raises:
          BadRecord: As `bucket_of`.
        """
        length, bucket = self.length_of(record), self.bucket_of(record)
        value = record.columns[self.column]
        full = np.full((bucket, *value.shape[1:]), self.pad, value.dtype)
        full[:length] = value[:length]
        return {**record.columns, self.column: full}, np.arange(bucket) < length
