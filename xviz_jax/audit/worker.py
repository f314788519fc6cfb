"""One process's part: explains ranges of records, and says what became of each."""

import collections
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from xviz_jax.audit import canary, manifest, rows
from xviz_jax.audit.explainers import Question, check
from xviz_jax.audit.job import Job, numerics
from xviz_jax.audit.model import find
from xviz_jax.audit.programs import Programs, stacked
from xviz_jax.audit.reading import Batch, Prepared, Reading
from xviz_jax.audit.reading import Unusable as Unusable
from xviz_jax.audit.shard import Result
from xviz_jax.audit.stopping import Preempted
from xviz_jax.audit.weights import hashed

# Records of a shard: what a fault may cost, and what a file may weigh.
_SHARD, _SHARD_BYTES, _MULTIPLE = 1024, 64 * 2**20, 64
# Records computed at once by default, and the share of a device's memory they may take.
_MICROBATCH = {"cpu": 8, "gpu": 64, "tpu": 64}
_SHARE = 0.6
# Records by which a program is tried.
_TRIED = 3


class Worker:
    """Explains any range of records. Two workers of one job give the same bits."""

    def __init__(self, job: Job, *, avoid: int = 0):
        """Loads the model and opens the data.

        Args:
          job: What is explained.
          avoid: Records at the beginning by which programs are not tried.

        Raises:
          ValueError: If the job is wrong: no such model, method, option or data.
          Unusable: If nothing in the data can be explained.
        """
        self.job = job
        check(job.options)
        self.model = find(
            job.model,
            vocabulary=job.vocabulary,
            buckets=job.buckets,
            split=job.split,
            weights_sha256=job.weights_sha256,
            allow_nonfinite=job.allow_nonfinite,
        )
        target, classes = job.target, self.model.classes or ()
        if isinstance(target, str) and target in classes:
            target = classes.index(target)
        elif isinstance(target, str) and target.count(",") == 1:
            first, second = target.split(",")
            if first in classes and second in classes:
                target = (classes.index(first), classes.index(second))
        self.question = Question(target, job.seed)
        self.reading = Reading(job, self.model, self.question)
        self.programs = Programs(self.model, job.options, self.question, job.devices)
        self._smaller: dict[str, tuple[int, int]] = {}
        self._verdicts: dict[tuple[str, int], canary.Verdict] = {}
        # What the next result says besides its rows.
        self._log: list[str] = []
        self._differing: list[str] = []
        self._examples = self.reading.look(avoid, _TRIED)
        first = self._examples[0]
        self.diagnostics = self.programs.diagnostics(first.row)
        self._classes = self.reading.classes = self._count_classes(first.row)
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), first.row["arguments"]
        )
        self._weights = hashed(self.model, shapes, allow_nonfinite=job.allow_nonfinite)
        self.microbatch = self._choose_microbatch()
        self._ids: manifest.Manifest | None = None

    def describe(self) -> dict[str, Any]:
        """All that the rows depend on, and how much there is to do."""
        job, columns = self.job, self.reading.columns
        buckets = self.model.buckets
        return {
            "numerics": numerics(),
            "weights": self._weights,
            "mesh": dict(self.model.mesh.shape) if self.model.mesh else None,
            "methods": job.options,
            "target": list(job.target) if isinstance(job.target, tuple) else job.target,
            "seed": job.seed,
            "columns": list(columns) if columns else None,
            "buckets": list(buckets.all()) if buckets else None,
            "microbatch": self.microbatch,
            "shard_size": job.shard_size or self._choose_shard(),
            "records": self.reading.total,
            "source": self.reading.source.fingerprint(),
            "ids": self.reading.ids(),
        }

    def devices(self) -> list[str]:
        """The devices that are used, in words."""
        if self.model.mesh is not None:
            return [str(each) for each in self.model.mesh.devices.flat]
        return [str(each) for each in self.programs.devices]

    def prove(self, check: Callable[[int], Any] | None = None) -> canary.Verdict:
        """Whether rows are the same bits wherever, and beside whomever, they are.

        Args:
          check: Called between microbatches; what it raises ends the call.

        Raises:
          ValueError: If one and the same call gives two answers.
        """
        first = self._examples[0]
        same = [each for each in self._examples if each.key == first.key]
        each = stacked([example.row for example in same])
        return self._proved(each, first.key, self.microbatch, check)

    def read(self, begin: int, end: int) -> Batch:
        """Reads a range of records and sorts out those that cannot be explained."""
        return self.reading.batch(begin, end)

    def compute(
        self,
        begin: int,
        end: int,
        batch: Batch | None = None,
        check: Callable[[int], Any] | None = None,
    ) -> Result:
        """Explains a range of records.

        Args:
          begin: The first record.
          end: The one after the last.
          batch: The same, where it was read before.
          check: Called between microbatches; what it raises ends the call.
        """
        batch = self.read(begin, end) if batch is None else batch
        groups: dict[str, list[Prepared]] = collections.defaultdict(list)
        for each in batch.prepared:
            groups[each.key].append(each)
        found: list[rows.Explained | rows.Quarantined] = [*batch.quarantined]
        for key in sorted(groups):
            found += self._group(groups[key], key, check)
        good = [each for each in found if isinstance(each, rows.Explained)]
        bad = [each for each in found if isinstance(each, rows.Quarantined)]
        log, self._log = self._log, []
        differing, self._differing = self._differing, []
        return Result(
            rows.table(good, self.diagnostics),
            rows.quarantine(bad),
            tuple(log),
            tuple(differing),
        )

    def refuse(
        self, index: int, reason: str, message: str, name: str | None = None
    ) -> Result:
        """A record that a process did not survive; only its name is read."""
        name = self.reading.name(index) if name is None else name
        bad = [rows.Quarantined(index, name, reason, message)]
        return Result(rows.table([], self.diagnostics), rows.quarantine(bad))

    def memory(self) -> int:
        """Bytes of a device that one microbatch takes beyond the parameters."""
        first = self._examples[0]
        return self.programs.bytes(stacked([first.row]), first.key, self.microbatch)

    def shapes(self, sample: int) -> dict[str, int]:
        """How many records of an even sample go to each program, bad ones as `bad`."""
        return self.reading.shapes(sample)

    def _count_classes(self, row: Any) -> int | None:
        logits = jax.eval_shape(
            self.model.forward, self.model.parameters, *row["arguments"]
        )
        classes = logits.shape[0] if logits.ndim else None
        target = self.question.target
        for each in target if isinstance(target, tuple) else (target,):
            if isinstance(each, int) and (classes is None or each >= classes):
                raise ValueError(f"`target` is a class below {classes}, got {each}")
        return classes

    def _choose_microbatch(self) -> int:
        """By the device and its memory, not by time: another start chooses the same."""
        if self.job.microbatch is not None:
            return self.job.microbatch
        device = jax.local_devices()[0]
        chosen = _MICROBATCH.get(device.platform, 8)
        limit = (device.memory_stats() or {}).get("bytes_limit")
        first = self._examples[0]
        while limit and chosen > 1:
            one = stacked([first.row])
            try:
                if self.programs.bytes(one, first.key, chosen) < _SHARE * limit:
                    break
            except Exception as error:
                if not out_of_memory(error):
                    raise
            self.programs.forget(first.key, chosen)
            chosen //= 2
        return chosen

    def _choose_shard(self) -> int:
        row = self._examples[0].row
        target = {"target": np.int32(0)} if self._classes else {}
        size = 0
        for explain in self.programs.explainers.values():
            shapes = jax.eval_shape(explain, self.model.parameters, row | target)
            size += 4 * math.prod(shapes.scores.shape)
        fits = _SHARD_BYTES // max(size, 1)
        fits -= fits % _MULTIPLE if fits > _MULTIPLE else 0
        return max(1, min(_SHARD, fits))

    def _group(
        self, group: list[Prepared], key: str, check: Callable[[int], Any] | None
    ) -> list[rows.Explained | rows.Quarantined]:
        """Explains records of one shape, in a smaller way where memory runs out."""
        while True:
            microbatch, in_flight = self._smaller.get(key, (self.microbatch, 2))
            try:
                return self._explain(group, key, microbatch, in_flight, check)
            except (Preempted, canary.Random):
                raise
            except Exception as error:
                if not out_of_memory(error):
                    return self._halves(group, key, check, error)
                short = f"out of memory for {key}:"
                if in_flight > 1:
                    self._smaller[key] = microbatch, 1
                    self._log.append(f"{short} one microbatch at a time on a device")
                elif microbatch > 1:
                    self.programs.forget(key, microbatch)
                    self._smaller[key] = microbatch // 2, 1
                    self._log.append(
                        f"{short} {microbatch // 2} records at once, not {microbatch}"
                    )
                elif len(group) > 1:
                    return [
                        found
                        for each in group
                        for found in self._group([each], key, check)
                    ]
                else:
                    (one,) = group
                    return [rows.Quarantined(one.index, one.id, "OOM", str(error))]

    def _halves(
        self,
        group: list[Prepared],
        key: str,
        check: Callable[[int], Any] | None,
        error: Exception,
    ) -> list[rows.Explained | rows.Quarantined]:
        """Finds the record that the model fails on."""
        if len(group) == 1:
            said = f"{type(error).__name__}: {error}"
            return [rows.Quarantined(group[0].index, group[0].id, "FAILED", said)]
        half = len(group) // 2
        return [
            *self._group(group[:half], key, check),
            *self._group(group[half:], key, check),
        ]

    def _explain(
        self,
        group: list[Prepared],
        key: str,
        microbatch: int,
        in_flight: int,
        check: Callable[[int], Any] | None,
    ) -> list[rows.Explained | rows.Quarantined]:
        batch = stacked([each.row for each in group])
        if (key, microbatch) not in self._verdicts:
            few = jax.tree.map(lambda leaf: leaf[:_TRIED], batch)
            # These rows are no progress.
            still = None if check is None else lambda count: check(0)
            verdict = self._proved(few, key, microbatch, still)
            where = f"of {key}, {microbatch} at once"
            self._differing += [f"{note}, {where}" for note in verdict.notes]
        predicted, found = self.programs.run(
            batch, key, microbatch, in_flight=in_flight, check=check
        )
        numerics_id = self.numerics_id(microbatch, key)
        return [
            self._answer(each, number, predicted, found, numerics_id)
            for number, each in enumerate(group)
        ]

    def _proved(
        self,
        batch: Any,
        key: str,
        microbatch: int,
        check: Callable[[int], Any] | None,
    ) -> canary.Verdict:
        """The canary of a program; what it found is known from then on."""
        found = canary.prove(self.programs, batch, key, microbatch, check)
        self._verdicts[key, microbatch] = found
        return found

    def numerics_id(self, microbatch: int, key: str) -> str:
        """What the bits of rows of a shape depend on besides the record."""
        if self._ids is None:
            self._ids = manifest.Manifest(self.describe())
        return self._ids.numerics_id(microbatch, key)

    def _answer(
        self,
        each: Prepared,
        number: int,
        predicted: dict[str, np.ndarray],
        found: dict[str, Any],
        numerics_id: str,
    ) -> rows.Explained | rows.Quarantined:
        output = predicted["output"][number]
        scores, diagnostics, status = {}, {}, rows.OK
        for name, attribution in found.items():
            values = attribution.scores[number]
            if each.length is not None and values.shape[:1] == (
                len(each.row["arguments"][0]),
            ):
                values = values[: each.length]
            if not (np.isfinite(values).all() and np.isfinite(output)):
                what = f"{name}: output {output}, scores {_extent(values)}"
                return rows.Quarantined(each.index, each.id, "NONFINITE_OUTPUT", what)
            scores[name] = values
            said = {k: v[number] for k, v in attribution.diagnostics.items()}
            diagnostics[name] = said
            if not said.get("converged", True):
                status = rows.UNCONVERGED
        prediction = int(predicted["prediction"][number])
        target = each.row.get("target", prediction)
        pair = isinstance(self.question.target, tuple)
        return rows.Explained(
            index=each.index,
            id=each.id,
            label=each.label,
            status=status,
            prediction=prediction if self._classes else None,
            target=None if pair or not self._classes else int(target),
            output=float(output),
            numerics_id=numerics_id,
            scores=scores,
            diagnostics=diagnostics,
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether a device had too little memory; JAX knows no class of its own for it."""
    return isinstance(error, jax.errors.JaxRuntimeError) and (
        "RESOURCE_EXHAUSTED" in str(error)
    )


def _extent(values: np.ndarray) -> str:
    return f"from {np.min(values)} to {np.max(values)}"
