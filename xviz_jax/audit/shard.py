"""Shards on disk: committed whole, and checked before they are believed."""

import collections
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from xviz_jax.audit import files, rows

SHARDS, QUARANTINE = "shards", "quarantine"
_ABOUT, _DIGEST = "xviz", "xviz_sha256"
_REPEATING = ["status", "numerics_id", "label", "reason"]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a range of records came to.

    Attributes:
      explained: A table with one row for each explained record.
      quarantined: A table of the others.
      log: Lines about how it was computed.
      differing: What the canary found of programs that were new: rows are not the same
        bits everywhere.
    """

    explained: pa.Table
    quarantined: pa.Table
    log: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()

    def joined(self, other: "Result") -> "Result":
        """This range and the next one."""
        return Result(
            pa.concat_tables([self.explained, other.explained]).combine_chunks(),
            pa.concat_tables([self.quarantined, other.quarantined]).combine_chunks(),
            self.log + other.log,
            self.differing + other.differing,
        )


@dataclasses.dataclass(frozen=True)
class Counts:
    """What shards hold.

    Attributes:
      explained: Rows.
      unconverged: Rows among them that did not converge.
      reasons: Quarantined records, by reason.
      numerics: Rows by `numerics_id`.
    """

    explained: int = 0
    unconverged: int = 0
    reasons: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    numerics: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )

    @property
    def quarantined(self) -> int:
        """Records that were not explained."""
        return self.reasons.total()

    @property
    def records(self) -> int:
        """All of them."""
        return self.explained + self.quarantined

    def __add__(self, other: "Counts") -> "Counts":
        """Of both together."""
        return Counts(
            self.explained + other.explained,
            self.unconverged + other.unconverged,
            self.reasons + other.reasons,
            self.numerics + other.numerics,
        )


def path_of(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / SHARDS / f"{number:08d}.parquet"


def quarantine_of(folder: Path, number: int) -> Path:
    """Where the records of a shard that were not explained lie, if there are any."""
    return folder / QUARANTINE / f"{number:08d}.parquet"


def commit(folder: Path, number: int, run: str, result: Result) -> Counts:
    """Writes a shard: when its file has its name, the shard is done.

    The quarantined records go first, and the shard's file says what they are.

    Args:
      folder: The output folder.
      number: Of the shard.
      run: The run it belongs to.
      result: What it holds.

    Raises:
      OSError: If the disk is full, say; the shard is then not there.
    """
    aside = quarantine_of(folder, number)
    if len(result.quarantined):
        files.write(aside, lambda file: _write(file, result.quarantined, {}))
    else:
        aside.unlink(missing_ok=True)
    counts = _counts(result)
    about = {
        "run": run,
        "shard": number,
        "rows": len(result.explained),
        "checksum": rows.checksum(result.explained),
        "quarantined": len(result.quarantined),
        "quarantine_checksum": rows.checksum(result.quarantined),
        "unconverged": counts.unconverged,
        "reasons": dict(counts.reasons),
        "numerics": dict(counts.numerics),
    }
    files.write(
        path_of(folder, number), lambda file: _write(file, result.explained, about)
    )
    return counts


def _counts(result: Result) -> Counts:
    tally = lambda table, name: collections.Counter(table.column(name).to_pylist())
    return Counts(
        len(result.explained),
        tally(result.explained, "status")[rows.UNCONVERGED],
        tally(result.quarantined, "reason"),
        tally(result.explained, "numerics_id"),
    )


def _write(file: Any, table: pa.Table, about: dict[str, Any]) -> None:
    # Statistics have no checksum, and nothing here would be found by them.
    with pq.ParquetWriter(
        file,
        table.schema,
        compression="zstd",
        compression_level=1,
        use_dictionary=_REPEATING,  # pyright: ignore[reportArgumentType]
        write_page_checksum=True,
        write_statistics=False,
        store_schema=False,
    ) as writer:
        writer.write_table(table)
        said = json.dumps(about, sort_keys=True)
        digest = hashlib.sha256(said.encode()).hexdigest()
        writer.add_key_value_metadata({_ABOUT: said, _DIGEST: digest})


class Damaged(ValueError):
    """A shard's file is not what was written."""


def verify(folder: Path, number: int, run: str, expected: int) -> Counts:
    """Reads a shard and everything its file says of it.

    Args:
      folder: The output folder.
      number: Of the shard.
      run: The run it must belong to.
      expected: How many records it is of.

    Raises:
      Damaged: If it is truncated, changed, incomplete or of another run.
      FileNotFoundError: If there is none.
    """
    path = path_of(folder, number)
    table, about = read(path)
    if (about.get("run"), about.get("shard")) != (run, number):
        raise Damaged(f"{path.name} belongs to another run or shard")
    counts = Counts(
        about["rows"],
        about["unconverged"],
        collections.Counter(about["reasons"]),
        collections.Counter(about["numerics"]),
    )
    if len(table) != about["rows"] or len(table) + about["quarantined"] != expected:
        raise Damaged(f"{path.name} has {len(table)} rows, wanted {about['rows']}")
    if _checksum(table) != about["checksum"]:
        raise Damaged(f"{path.name} does not have its checksum")
    aside = quarantine_of(folder, number)
    if about["quarantined"] == 0:
        # Left by a writer that died; it says nothing of this shard.
        aside.unlink(missing_ok=True)
        return counts
    try:
        bad, _ = read(aside)
    except FileNotFoundError as error:
        raise Damaged(f"the quarantined records of {path.name} are gone") from error
    if _checksum(bad) != about["quarantine_checksum"]:
        raise Damaged(f"the quarantined records of {path.name} were changed")
    return counts


def _checksum(table: pa.Table) -> str:
    try:
        return rows.checksum(table)
    except (TypeError, ValueError, pa.ArrowException) as error:
        # A changed byte may have changed the kind of a column.
        raise Damaged(f"it holds what no audit writes: {error}") from error


def read(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """A file of a shard, and what it says of itself.

    Raises:
      Damaged: If its pages do not have their checksums, or no audit wrote it.
      FileNotFoundError: If there is none.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read(), about_of(file.metadata)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException, ValueError) as error:
        raise Damaged(f"{path.name} cannot be read: {error}") from error


def about_of(metadata: pq.FileMetaData) -> dict[str, Any]:
    """What a shard's file says of itself.

    Raises:
      ValueError: If it says nothing.
    """
    found = metadata.metadata or {}
    said, digest = (found.get(name.encode(), b"") for name in (_ABOUT, _DIGEST))
    if hashlib.sha256(said).hexdigest().encode() != digest:
        raise ValueError("it does not say what an audit has written")
    return json.loads(said)
