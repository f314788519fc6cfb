"""Opens any record source."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xviz_jax.audit.sources import ids as ids_
from xviz_jax.audit.sources.csv_rows import Csv
from xviz_jax.audit.sources.image_folder import ImageFolder
from xviz_jax.audit.sources.jsonl import Jsonl
from xviz_jax.audit.sources.npz import Npz
from xviz_jax.audit.sources.objects import Arrays, Objects
from xviz_jax.audit.sources.parquet import Parquet
from xviz_jax.audit.sources.place import Place, place
from xviz_jax.audit.sources.record import Limits, Reader
from xviz_jax.audit.sources.schema import Column
from xviz_jax.audit.sources.several import Several
from xviz_jax.audit.sources.source import Source

# The columns that are read when none is named.
INPUTS = ("image", "x", "tokens", "text")
_ID, _LABEL = "id", "label"
_FORMATS: Mapping[str, Callable[[Place, Limits], Reader]] = {
    ".csv": Csv,
    ".jsonl": Jsonl,
    ".ndjson": Jsonl,
    ".npy": Npz,
    ".npz": Npz,
    ".parquet": Parquet,
    ".tsv": Csv,
}


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
      data: A path, or an address `s3://…` or `gs://…`, of a file (`.parquet`, `.csv`,
        `.tsv`, `.jsonl`, `.npz`, `.npy`), of a folder of files of one of these
        formats, or of a folder of images, whose subfolders are classes. Or arrays by
        name, or any object with `__len__` and `__getitem__`, whose elements are
        mappings, texts or arrays.
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

    Returns:
      A `Source`: `len(source)`, `source[row]`, `source.rows(begin, end)`.

    Raises:
      ValueError: If the data is damaged as a whole, or has not the columns. A fault
        of one record raises `BadRecord` where that record is read.
      ImportError: If the format needs an extra that is not installed.

    >>> import numpy as np
    >>> tokens = np.array([[5, 6, 7], [8, 99, 9]])
    >>> schema = {"tokens": Column(dtype="int32", vocabulary=10)}
    >>> source = open_source({"tokens": tokens}, schema=schema)
    >>> source[0].columns["tokens"].tolist()
    [5, 6, 7]
    >>> [str(row) for row in source.rows(1, 2)]
    ["OUT_OF_VOCABULARY: 'tokens' holds token 99, of a vocabulary of 10"]
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
    id = _beside("id", id, _ID, reader.names, where)
    label = _beside("label", label, _LABEL, reader.names, where)
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
    if isinstance(data, Mapping):
        return Arrays(data), "the mapping"
    if not isinstance(data, str | os.PathLike):
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise ValueError(
                "`data` is a path, an address, arrays by name, or has `__len__` and "
                f"`__getitem__`, got {type(data).__name__}"
            )
        return Objects(data), f"the {type(data).__name__}"
    found = place(data, filesystem)
    kind = found.kind()
    if kind == "nothing":
        raise ValueError(f"there is no data at {found}")
    return (_file if kind == "file" else _folder)(found, limits), found.name


def _file(found: Place, limits: Limits) -> Reader:
    if found.suffix not in _FORMATS:
        raise ValueError(
            f"{found.name} is of no known format; {', '.join(_FORMATS)} are, and "
            "folders of one of them or of images"
        )
    return _FORMATS[found.suffix](found, limits)


def _folder(found: Place, limits: Limits) -> Reader:
    """The files of a known format, all of one; images where there are none."""
    names = sorted(n for n in found.names() if n[0] not in "._")
    tables = [found.child(name) for name in names]
    tables = [table for table in tables if table.suffix in _FORMATS]
    if not tables:
        return ImageFolder(found, limits)
    suffixes = sorted({table.suffix for table in tables})
    if len(suffixes) > 1:
        raise ValueError(f"{found} holds files {suffixes}, of one format are wanted")
    return Several(tables, lambda table: _file(table, limits))


def _columns(
    columns: Sequence[str] | Mapping[str, str] | None, reader: Reader, where: str
) -> dict[str, str]:
    if isinstance(columns, str):
        raise ValueError(f"`columns` are several names, got the text {columns!r}")
    if columns is None:
        columns = [name for name in INPUTS if name in reader.names]
        if not columns:
            raise ValueError(
                f"{where} has none of the columns {list(INPUTS)}, it has "
                f"{list(reader.names)}; pass `columns`"
            )
    if not isinstance(columns, Mapping):
        columns = {name: name for name in columns}
    missing = [name for name in columns.values() if name not in reader.names]
    if missing or not columns:
        raise ValueError(
            f"{where} has no column {missing}, it has {list(reader.names)}"
            if missing
            else "`columns` names none"
        )
    return dict(columns)


def _beside(
    what: str, column: str | None, default: str, names: Sequence[str], where: str
) -> str | None:
    """A column that may be missing where it is the default."""
    if column is None or column in names:
        return column
    if column == default:
        return None
    raise ValueError(
        f"{where} has no column {column!r} for `{what}`, it has {list(names)}"
    )
