"""How far a run is, and the log of what happened."""

import contextlib
import dataclasses
import datetime
import json
import time
from pathlib import Path
from typing import Any

from xviz_jax.audit import files
from xviz_jax.audit.shard import Counts
from xviz_jax.escape import terminal

SUMMARY, LOG = "summary.json", "audit.log"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is.

    Attributes:
      records: All there are.
      done: Records of committed shards, of earlier runs too, and those under way.
      quarantined: Records that were not explained.
      unconverged: Records whose explanation did not converge.
      rate: Records a second up to the last commit of this run; 0 before the first,
        for methods take unlike times.
      devices: How many devices work.
    """

    records: int
    done: float
    quarantined: int
    unconverged: int
    rate: float
    devices: int

    @property
    def seconds_left(self) -> float | None:
        """At this rate; None where nothing is known of it."""
        return (self.records - self.done) / self.rate if self.rate else None

    def __str__(self) -> str:
        """One line."""
        left = self.seconds_left
        eta = "-" if left is None else str(datetime.timedelta(seconds=round(left)))
        return (
            f"{self.done:,.0f} of {self.records:,} records, {self.rate:,.1f}/s, "
            f"{eta} left, {self.quarantined:,} quarantined, "
            f"{self.unconverged:,} unconverged, {self.devices} devices"
        )


class Meter:
    """Counts what was done since the run began."""

    def __init__(self, records: int, before: Counts, devices: int, methods: int):
        """Begins to count.

        Args:
          records: All there are.
          before: What earlier runs have committed.
          devices: How many work.
          methods: Passes over each record.
        """
        self._records, self._devices = records, devices
        self._before, self._methods = before.records, methods
        self.counts = before
        self._partial = 0
        self._begin = self._committed = time.monotonic()

    def restart(self) -> None:
        """Counts from now on."""
        self._begin = time.monotonic()

    def advance(self, rows: int) -> None:
        """Rows of one method were done."""
        self._partial += rows

    def commit(self, counts: Counts) -> None:
        """A shard was committed."""
        self.counts = self.counts + counts
        self._committed = time.monotonic()

    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._begin

    def now(self) -> Progress:
        """How far it is."""
        # Rows of methods run ahead of the commit, by a shard at most.
        committed = self.counts.records - self._before
        new = max(committed, self._partial / self._methods)
        new = min(new, self._records - self._before)
        seconds = max(self._committed - self._begin, 1e-9)
        return Progress(
            records=self._records,
            done=self._before + new,
            quarantined=self.counts.quarantined,
            unconverged=self.counts.unconverged,
            rate=committed / seconds if committed else 0.0,
            devices=self._devices,
        )


class Log:
    """Lines in the output folder's log; results do not depend on it."""

    def __init__(self, folder: Path):
        """Nothing is written yet."""
        self._path = folder / LOG

    def say(self, text: str) -> None:
        """Adds a line; a full disk does not end a run here."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = terminal(text).replace("\n", "\n  ")
        with contextlib.suppress(OSError), self._path.open("a") as file:
            file.write(f"{now} {line}\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What came of a run; also in `summary.json`.

    Attributes:
      state: `complete`, `preempted`, `too_many_bad` or `fault`.
      why: Of a run that is not complete.
      run: Its name, from its fingerprint.
      records: All there are.
      explained: Records with a row.
      unconverged: Records among them whose explanation did not converge.
      quarantined: Records without one.
      reasons: How many of these, by reason.
      numerics: Rows by `numerics_id`.
      bitwise: Whether the canary found rows of every program that this run has used
        to depend on their record only; None where there was nothing left to do.
      notes: What it found otherwise.
      shards: All there are.
      computed: Shards that this run has computed.
      damaged: Shards that were found damaged and computed again.
      ids: How many ids of the whole data occurred again and were `renamed`, and how
        many rows have none and are named by their number, `missing`; 0 where ids were
        trusted, or are those of a source of the caller's own.
      seconds: Of this run.
      records_per_second: Of this run.
      devices: What it ran on.
      hung: Whether a thread of this process never came back.
    """

    state: str
    why: str
    run: str
    records: int
    explained: int
    unconverged: int
    quarantined: int
    reasons: dict[str, int]
    numerics: dict[str, int]
    bitwise: bool | None
    notes: tuple[str, ...]
    shards: int
    computed: int
    damaged: tuple[int, ...]
    ids: dict[str, int]
    seconds: float
    records_per_second: float
    devices: tuple[str, ...]
    hung: bool = False

    def write(self, folder: Path) -> None:
        """Writes `summary.json`."""
        said: dict[str, Any] = dataclasses.asdict(self)
        text = json.dumps(said, indent=2, allow_nan=False) + "\n"
        files.write(folder / SUMMARY, text.encode())
