"""One run of one folder: whatever ends it, a rerun does what is missing."""

import concurrent.futures
import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xviz_jax.audit import engine, files, manifest, shard
from xviz_jax.audit.canary import Verdict
from xviz_jax.audit.engine import Engine
from xviz_jax.audit.job import Job
from xviz_jax.audit.manifest import Manifest
from xviz_jax.audit.progress import SUMMARY, Log, Meter, Progress, Summary
from xviz_jax.audit.ray import Ray
from xviz_jax.audit.shard import Counts, Result
from xviz_jax.audit.state import Marks
from xviz_jax.audit.stopping import Preempted, Stop

# Below so many records a share says little.
_FEW = 1000
_DIFFERING = "rows are equal within a tolerance only, not bit for bit: "


class Changed(ValueError):
    """The folder holds a run of another fingerprint."""


class TooManyBad(RuntimeError):
    """More records cannot be explained than was allowed."""


class Runner:
    """One run of one folder, which is locked."""

    def __init__(
        self,
        out: Path,
        job: Job,
        stop: Stop,
        deadline: float,
        progress: Callable[[Progress], Any] | None,
    ):
        """Makes the folders, and removes what a writer that died has left."""
        self._out, self._job, self._stop = out, job, stop
        self._deadline, self._progress = deadline, progress
        for name in (shard.SHARDS, shard.QUARANTINE):
            (out / name).mkdir(exist_ok=True)
            files.sweep(out / name)
        files.sweep(out)
        self._marks, self._log = Marks(out), Log(out)

    def open(self, kind: str, ray: Ray, isolate: bool) -> Engine:
        """Starts the engine."""
        return engine.start(
            kind,
            self._job,
            ray,
            isolate=isolate,
            deadline=self._deadline,
            stop=self._stop,
            marks=self._marks,
            log=self._log,
        )

    def _advance(self, meter: Meter, count: int) -> None:
        meter.advance(count)
        if self._progress is not None:
            self._progress(meter.now())

    def run(self, opened: Engine, most: float, new_run: bool) -> Summary:
        """Computes what is missing."""
        plan = Manifest(manifest.plain(opened.said))
        fresh = self._compare(plan, new_run)
        done, damaged = self._verify(plan)
        counts = sum(done.values(), Counts())
        missing = [number for number in range(plan.shards) if number not in done]
        # A prediction, and every method.
        passes = 1 + len(self._job.options)
        meter = Meter(plan.records, counts, len(opened.devices), passes)
        say = lambda state, why="", computed=0, verdict=None: self._summary(
            plan, opened, meter, damaged, state, why, computed, verdict
        )
        if not missing:
            return say("complete")
        verdict = opened.prove()
        meter.restart()
        if fresh:
            self._describe(plan, verdict)
        if not verdict.bitwise:
            self._log.say(_DIFFERING + ", ".join(verdict.notes))
        computed = 0
        ranges = {number: plan.range(number) for number in missing}
        self._log.say(f"run {plan.run}: {len(missing)} of {plan.shards} shards to do")
        try:
            self._check_bad(meter.counts, plan.records, most)
            advance = lambda count: self._advance(meter, count)
            for number, result in opened.results(ranges, advance):
                verdict = self._noted(plan, number, result, verdict)
                meter.commit(shard.commit(self._out, number, plan.run, result))
                self._marks.end(number)
                computed += 1
                self._log.say(f"shard {number}: {meter.now()}")
                if self._progress is not None:
                    self._progress(meter.now())
                self._check_bad(meter.counts, plan.records, most)
                self._stop.check()
        except Preempted as error:
            self._give_up(missing)
            return say("preempted", str(error), computed, verdict)
        except TooManyBad as error:
            self._give_up(missing)
            return say("too_many_bad", str(error), computed, verdict)
        except Exception as error:
            self._give_up(missing)
            why = f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError):
                say("fault", why, computed, verdict)
            raise
        return say("complete", "", computed, verdict)

    def _noted(
        self, plan: Manifest, number: int, result: Result, verdict: Verdict
    ) -> Verdict:
        """Logs how a shard was computed; the verdict with what the canary found."""
        for line in result.log:
            self._log.say(f"shard {number}: {line}")
        if not result.differing:
            return verdict
        self._log.say(_DIFFERING + ", ".join(result.differing))
        notes = dict.fromkeys([*verdict.notes, *result.differing])
        found = Verdict(False, tuple(notes))
        self._describe(plan, found)
        return found

    def _describe(self, plan: Manifest, verdict: Verdict) -> None:
        """Writes `run.json`."""
        beside = {"model": str(self._job.model), "bitwise": verdict.bitwise}
        manifest.write(self._out, plan, beside)

    def _give_up(self, missing: Sequence[int]) -> None:
        """This process ends in order: none of the shards is to blame."""
        for number in missing:
            self._marks.end(number)

    def _compare(self, plan: Manifest, new_run: bool) -> bool:
        """Whether the folder is fresh; one of another run is refused."""
        try:
            known = manifest.load(self._out)
        except ValueError as error:
            if not new_run:
                raise
            self._log.say(str(error))
            known = Manifest({})
        if known is None:
            return True
        if known.run == plan.run:
            return False
        lines = manifest.difference(known.said, plan.said)
        if not new_run:
            raise Changed(
                f"{self._out} holds a run of another fingerprint; pass --new-run to "
                "put it aside:\n  " + "\n  ".join(lines)
            )
        self._put_aside(known.run)
        return True

    def _put_aside(self, run: str) -> None:
        place = self._out / "previous" / run
        number = 1
        while place.exists():
            number += 1
            place = self._out / "previous" / f"{run}-{number}"
        place.mkdir(parents=True)
        # The fingerprint goes last: until then a rerun refuses as this one would have.
        for name in (shard.SHARDS, shard.QUARANTINE, SUMMARY, manifest.NAME):
            if (self._out / name).exists():
                (self._out / name).rename(place / name)
        for name in (shard.SHARDS, shard.QUARANTINE):
            (self._out / name).mkdir()
        self._log.say(f"the run {run} lies in {place} now")

    def _verify(self, plan: Manifest) -> tuple[dict[int, Counts], list[int]]:
        """Shards that are there, and the numbers of damaged ones."""
        there = [n for n in range(plan.shards) if shard.path_of(self._out, n).exists()]
        done, damaged = {}, []

        def look(number: int) -> Counts | shard.Damaged:
            begin, end = plan.range(number)
            try:
                return shard.verify(self._out, number, plan.run, end - begin)
            except shard.Damaged as error:
                return error

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for number, found in zip(there, pool.map(look, there), strict=True):
                if isinstance(found, shard.Damaged):
                    self._log.say(f"shard {number} is computed again: {found}")
                    damaged.append(number)
                else:
                    done[number] = found
        return done, damaged

    def _check_bad(self, counts: Counts, records: int, most: float) -> None:
        bad, seen = counts.quarantined, counts.records
        enough = seen >= min(records, _FEW)
        if bad > most * records or (enough and bad > most * seen):
            reasons = dict(counts.reasons.most_common())
            raise TooManyBad(
                f"{bad} of {seen} records cannot be explained, more than the share of "
                f"{most:g} that `max_bad_fraction` allows: {reasons}"
            )

    def _summary(
        self,
        plan: Manifest,
        opened: Engine,
        meter: Meter,
        damaged: Sequence[int],
        state: str,
        why: str,
        computed: int,
        verdict: Verdict | None,
    ) -> Summary:
        counts, now = meter.counts, meter.now()
        found = Summary(
            state=state,
            why=why,
            run=plan.run,
            records=plan.records,
            explained=counts.explained,
            unconverged=counts.unconverged,
            quarantined=counts.quarantined,
            reasons=dict(sorted(counts.reasons.items())),
            numerics=dict(sorted(counts.numerics.items())),
            bitwise=None if verdict is None else verdict.bitwise,
            notes=() if verdict is None else verdict.notes,
            shards=plan.shards,
            computed=computed,
            damaged=tuple(damaged),
            ids=plan.said["ids"],
            seconds=round(meter.seconds(), 3),
            records_per_second=round(now.rate, 3),
            devices=tuple(opened.devices),
            hung=opened.hung(),
        )
        self._log.say(f"{state}: {now}{'; ' if why else ''}{why}")
        found.write(self._out)
        return found
