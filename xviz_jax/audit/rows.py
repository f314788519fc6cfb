"""Rows of a result as Arrow tables, and a checksum of what they say.

One row for each record, with a field for each method inside `scores`, `shapes` and
`diagnostics`; records that were not explained are rows of another table.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# A row may be used; unconverged ones are to be read with their `error_estimate`.
OK, UNCONVERGED = "OK", "UNCONVERGED"

QUARANTINE = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
    ]
)
# Messages quote data; a record of a gigabyte is not repeated.
_LONGEST = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explained:
    """One record's answer.

    Attributes:
      index: The record's number in its source.
      id: Its name.
      label: Its true class, as text.
      status: `OK` or `UNCONVERGED`.
      prediction: The class with the largest logit; None for a model of one output.
      target: The explained class; None for a pair.
      output: The explained scalar.
      numerics_id: What the bits of this row depend on besides the record.
      scores: float32 arrays, by method.
      diagnostics: Arrays by name, by method.
    """

    index: int
    id: str
    label: str | None
    status: str
    prediction: int | None
    target: int | None
    output: float
    numerics_id: str
    scores: Mapping[str, np.ndarray]
    diagnostics: Mapping[str, Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Quarantined:
    """One record that was not explained, and why."""

    index: int
    id: str
    reason: str
    message: str


# By method, by name: dtype and number of axes of each diagnostic.
Diagnostics = Mapping[str, Mapping[str, tuple[str, int]]]


def schema(diagnostics: Diagnostics) -> pa.Schema:
    """The columns of explained records."""
    floats, integers = pa.list_(pa.float32()), pa.list_(pa.int32())
    each = [
        (name, pa.struct([(key, _type(*kind)) for key, kind in found.items()]))
        for name, found in diagnostics.items()
        if found
    ]
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("index", pa.int64(), nullable=False),
            pa.field("label", pa.string()),
            pa.field("status", pa.string(), nullable=False),
            pa.field("prediction", pa.int32()),
            pa.field("target", pa.int32()),
            pa.field("output", pa.float32(), nullable=False),
            pa.field("numerics_id", pa.string(), nullable=False),
            pa.field("scores", pa.struct([(name, floats) for name in diagnostics])),
            pa.field("shapes", pa.struct([(name, integers) for name in diagnostics])),
            # Parquet knows no struct without fields.
            *([pa.field("diagnostics", pa.struct(each))] if each else []),
        ]
    )


def _type(dtype: str, axes: int) -> pa.DataType:
    kind = pa.from_numpy_dtype(np.dtype(dtype))
    return pa.list_(kind) if axes else kind


def table(explained: Sequence[Explained], diagnostics: Diagnostics) -> pa.Table:
    """Rows in the order of the source."""
    rows = sorted(explained, key=lambda row: row.index)
    wanted = schema(diagnostics)
    columns = []
    for field in wanted:
        if field.name == "scores":
            each = [_lists([row.scores[m] for row in rows], "f4") for m in diagnostics]
            columns.append(_struct(each, field.type))
        elif field.name == "shapes":
            shapes = lambda m: [np.array(row.scores[m].shape) for row in rows]
            each = [_lists(shapes(m), "i4") for m in diagnostics]
            columns.append(_struct(each, field.type))
        elif field.name == "diagnostics":
            columns.append(_diagnostics(rows, diagnostics, field.type))
        else:
            values = [getattr(row, field.name) for row in rows]
            columns.append(pa.array(values, field.type))
    return pa.table(columns, schema=wanted)


def _lists(arrays: Sequence[np.ndarray], dtype: str) -> pa.Array:
    ends = np.cumsum([0, *[each.size for each in arrays]], dtype=np.int32)
    flat = [np.ravel(each) for each in arrays]
    values = np.concatenate([np.empty(0, dtype), *flat]).astype(dtype)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values))


def _struct(arrays: Sequence[pa.Array], kind: pa.DataType) -> pa.Array:
    fields = [kind.field(i) for i in range(kind.num_fields)]
    return pa.StructArray.from_arrays(list(arrays), fields=fields)


def _diagnostics(
    rows: Sequence[Explained], diagnostics: Diagnostics, kind: pa.DataType
) -> pa.Array:
    methods = []
    for name, found in diagnostics.items():
        if not found:
            continue
        each = []
        for key, (dtype, axes) in found.items():
            values = [row.diagnostics[name][key] for row in rows]
            if axes:
                each.append(_lists(values, dtype))
            else:
                each.append(pa.array(np.array(values, dtype)))
        methods.append(_struct(each, kind.field(name).type))
    return _struct(methods, kind)


def quarantine(found: Sequence[Quarantined]) -> pa.Table:
    """Rows of what was not explained, in the order of the source."""
    rows = sorted(found, key=lambda row: row.index)
    # An id is never cut: two may differ at their ends only.
    clean = lambda text: text.encode("utf-8", "backslashreplace").decode()
    return pa.table(
        [
            [clean(row.id) for row in rows],
            [row.index for row in rows],
            [row.reason for row in rows],
            [clean(row.message[:_LONGEST]) for row in rows],
        ],
        schema=QUARANTINE,
    )


def checksum(table: pa.Table) -> str:
    """The sha256 of what a table says, however its bytes are laid out or compressed."""
    found = hashlib.sha256()
    for name in table.column_names:
        found.update(f"{name} {len(table)};".encode())
        if len(table):
            _update(found, pa.concat_arrays(table.column(name).chunks))
    return found.hexdigest()


def _update(found: Any, array: pa.Array) -> None:
    valid = np.asarray(array.is_valid())
    _add(found, valid)
    if pa.types.is_struct(array.type):
        for index, field in enumerate(array.flatten()):
            found.update(f"{array.type.field(index).name};".encode())
            _update(found, field)
    elif pa.types.is_list(array.type):
        lengths = pc.call_function("list_value_length", [array]).fill_null(0)
        _add(found, np.asarray(lengths))
        _update(found, array.flatten())
    elif pa.types.is_string(array.type):
        texts = [text.encode() for text in array.fill_null("").to_pylist()]
        _add(found, np.array([len(text) for text in texts], np.int64))
        found.update(b"".join(texts))
    else:
        if not valid.all():
            array = array.fill_null(pa.scalar(0).cast(array.type))
        values = array.to_numpy(zero_copy_only=False)
        found.update(f"{values.dtype};".encode())
        _add(found, values)


def _add(found: Any, values: np.ndarray) -> None:
    found.update(np.ascontiguousarray(values).view(np.uint8).data)
