"""The result of an audit as a table that is read where it is asked for."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from xviz_jax.audit import manifest, rows, shard
from xviz_jax.audit.manifest import Manifest
from xviz_jax.audit.progress import SUMMARY

# What numbers a shard's rows need besides themselves.
_INDEX = "index"


class Audit:
    """The rows of an audit, on disk.

    Attributes:
      folder: Where it lies.
      manifest: What its rows depend on.
      missing: Shards that are not there: the audit is not complete.
      dataset: All rows, as a `pyarrow.dataset.Dataset`.
      quarantine: All records that were not explained, likewise.
    """

    def __init__(self, folder: Path, plan: Manifest):
        """Lists the shards; none is read."""
        self.folder, self.manifest = folder, plan
        there = [n for n in range(plan.shards) if shard.path_of(folder, n).exists()]
        self.missing = sorted(set(range(plan.shards)) - set(there))
        self._shards = [str(shard.path_of(folder, number)) for number in there]
        aside = [shard.quarantine_of(folder, number) for number in there]
        self.dataset = _dataset(self._shards, None)
        self.quarantine = _dataset(
            [str(path) for path in aside if path.exists()], rows.QUARANTINE
        )

    def __len__(self) -> int:
        """Explained records."""
        return self.dataset.count_rows()

    def __repr__(self) -> str:
        """What is there."""
        state = "complete" if self.complete else f"{len(self.missing)} shards missing"
        return f"Audit({str(self.folder)!r}, {len(self)} rows, {state})"

    @property
    def complete(self) -> bool:
        """Whether every record is either explained or quarantined."""
        return not self.missing

    @property
    def methods(self) -> list[str]:
        """Names of the methods, which are the fields of `scores`."""
        return list(self.manifest.said["methods"])

    @property
    def summary(self) -> dict[str, Any]:
        """What the last run said, `summary.json`.

        Raises:
          FileNotFoundError: If it has not come to an end.
        """
        return json.loads((self.folder / SUMMARY).read_text())

    def slice(
        self,
        begin: int = 0,
        end: int | None = None,
        *,
        where: pc.Expression | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """Rows of a range of records; shards outside are not read.

        Args:
          begin: The first record's number in the source.
          end: The one after the last; by default all.
          where: A condition such as `pc.field("prediction") == 3`.
          columns: Which to read, such as `scores.integrated_gradients`; by default
            all.

        Returns:
          The explained ones among them, in the order of the source.

        Raises:
          ValueError: If the range is none.
        """
        end = self.manifest.records if end is None else end
        if not 0 <= begin <= end:
            raise ValueError(f"a range runs upward from 0, got {begin} to {end}")
        size = self.manifest.said["shard_size"]
        numbers = range(begin // size, -(-end // size))
        paths = [shard.path_of(self.folder, number) for number in numbers]
        chosen = _dataset([str(p) for p in paths if p.exists()], self.dataset.schema)
        inside = (pc.field(_INDEX) >= begin) & (pc.field(_INDEX) < end)
        wanted = inside if where is None else inside & where
        read = None if columns is None else list(columns)
        return chosen.to_table(columns=read, filter=wanted)

    def rows(self, id: str) -> list[dict[str, Any]]:
        """What became of one record, with scores as arrays of their shapes.

        Reads the ids of all shards, and one row.

        Args:
          id: The record's.

        Returns:
          One row, or none if it was quarantined or does not exist.
        """
        found = self.dataset.to_table(filter=pc.field("id") == id)
        return [_arrays(row) for row in found.to_pylist()]


def open(folder: str | Path) -> Audit:
    """Opens the result of an audit; it may still be running.

    Pages are checked as they are read: a damaged one raises, and is computed again
    by the next run.

    Args:
      folder: The output folder.

    Raises:
      ValueError: If it is none, or has no shard yet.
    """
    folder = Path(folder)
    plan = manifest.load(folder)
    if plan is None:
        raise ValueError(f"{folder} holds no audit: it has no {manifest.NAME}")
    return Audit(folder, plan)


def _dataset(paths: Sequence[str], schema: pa.Schema | None) -> ds.Dataset:
    if not paths:
        if schema is None:
            raise ValueError("the audit has no shard yet")
        return ds.dataset(schema.empty_table())
    checked = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    reader = ds.ParquetFileFormat(default_fragment_scan_options=checked)
    return ds.dataset(list(paths), schema=schema, format=reader)


def _arrays(row: dict[str, Any]) -> dict[str, Any]:
    shapes = row.pop("shapes")
    row["scores"] = {
        name: np.array(values, np.float32).reshape(shapes[name])
        for name, values in row["scores"].items()
    }
    return row
