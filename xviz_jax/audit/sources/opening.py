"""Opens any record source."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xviz_jax.audit.sources import ids as ids_
from xviz_jax.audit.sources.npz import Npz
from xviz_jax.audit.sources.place import Place, place
from xviz_jax.audit.sources.record import Limits, Reader
from xviz_jax.audit.sources.schema import Column
from xviz_jax.audit.sources.source import Source

# The columns that are read when none is named.
INPUTS = ("image", "x", "tokens", "text")
_ID, _LABEL = "id", "label"


def open_source(
    data: Any,
    *,
    columns: Sequence[str] | Mapping[str, str] | None = None,
    id: str | None = _ID,
    label: str | None = _LABEL,
    schema: Mapping[str, Column] | None = None,
    duplicates: ids_.Duplicates = "refuse",
    prepare: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
    limits: Limits | None = None,
    filesystem: Any = None,
) -> Source:
    """Opens records to be read one by one, in any order.

    Args:
      data: A path, or an address `s3://…` or `gs://…`, of a `.npz` or `.npy`.
      columns: What a record holds: names of the data's columns, or its own names
        and the data's. By default those of `image`, `x`, `tokens` and `text` that
        the data has.
      id: The data's column of ids, texts or integers; a row without one is named by
        its number, and so is every row if there is no such column or it is None.
      label: The data's column of the true class, where it has one.
      schema: What columns must hold; every record is checked.
      duplicates: What to do about ids that occur twice: `"refuse"` the data,
        `"number"` the later ones by their row, `"a#7"`, or `"trust"` that there are
        none, and save a pass over the ids.
      prepare: Makes what the model gets from a record's checked columns, for example
        tokens from a text. It is pickled with the source; whatever it raises makes
        the record a bad one.
      limits: How large one record may be.
      filesystem: A `pyarrow.fs.FileSystem` that `data` is a path in.

    Raises:
      ValueError: If the data is damaged as a whole, or has not the columns. A fault
        of one record raises `BadRecord` where that record is read.
      ImportError: If the format needs an extra that is not installed.
    """
    limits = limits or Limits()
    reader, where = _reader(data, filesystem, limits)
    chosen = _columns(columns, reader, where)
    schema = dict(schema or {})
    if prepare is None and schema.keys() - chosen.keys():
        raise ValueError(
            f"`schema` names {sorted(schema.keys() - chosen.keys())}, the columns are "
            f"{sorted(chosen)}"
        )
    for ours, column in schema.items():
        theirs = chosen.get(ours, "")
        if theirs in reader.kinds:
            try:
                column.check_kind(*reader.kinds[theirs])
            except ValueError as error:
                raise ValueError(f"{where}: column {theirs!r} {error}") from None
    names = reader.names
    id = _beside("id", id, _ID, names, where)
    label = _beside("label", label, _LABEL, names, where)
    return Source(
        reader=reader,
        columns=chosen,
        schema=schema,
        label=label,
        names=ids_.resolve(reader, id, duplicates),
        prepare=prepare,
        limits=limits,
    )


def _reader(data: Any, filesystem: Any, limits: Limits) -> tuple[Reader, str]:
    """The reader of the format, and what errors call the data."""
    if not isinstance(data, str | os.PathLike):
        raise ValueError(f"`data` is a path or an address, got {type(data).__name__}")
    found = place(data, filesystem)
    kind = found.kind()
    if kind == "nothing":
        raise ValueError(f"there is no data at {found}")
    return _file(found, limits), found.name


def _file(found: Place, limits: Limits) -> Reader:
    if found.suffix in (".npz", ".npy"):
        return Npz(found, limits)
    raise ValueError(f"{found.name} is of no known format")


def _columns(
    columns: Sequence[str] | Mapping[str, str] | None, reader: Reader, where: str
) -> dict[str, str]:
    names = reader.names
    if isinstance(columns, str):
        raise ValueError(f"`columns` are several names, got the text {columns!r}")
    if columns is None:
        chosen = {name: name for name in INPUTS if names is None or name in names}
        if not chosen:
            raise ValueError(
                f"{where} has none of the columns {list(INPUTS)}, it has "
                f"{list(names or ())}; pass `columns`"
            )
        return chosen
    pairs = (
        columns if isinstance(columns, Mapping) else {name: name for name in columns}
    )
    missing = [n for n in pairs.values() if names is not None and n not in names]
    if missing or not pairs:
        raise ValueError(
            f"{where} has no column {missing}, it has {list(names or ())}"
            if missing
            else "`columns` names none"
        )
    return dict(pairs)


def _beside(
    what: str,
    column: str | None,
    default: str,
    names: tuple[str, ...] | None,
    where: str,
) -> str | None:
    """A column that may be missing if it is the default's."""
    if column is None or names is None or column in names:
        return column
    if column == default:
        return None
    raise ValueError(f"{where} has no column {column!r} for `{what}`, it has {names}")
