"""One process's part: reads records, explains them, and says what became of each."""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from xviz_jax.audit import canary, manifest, rows
from xviz_jax.audit.explainers import Question, check, shape_key
from xviz_jax.audit.job import Job, numerics
from xviz_jax.audit.model import find, hashed
from xviz_jax.audit.programs import Programs, row_of, stacked
from xviz_jax.audit.shard import Result
from xviz_jax.audit.sources import BadRecord, Source, open_source
from xviz_jax.audit.stopping import Preempted

# Records of a shard: what a fault may cost, and what a file may weigh.
_SHARD, _SHARD_BYTES, _MULTIPLE = 1024, 64 * 2**20, 64
# Records computed at once by default, and the share of a device's memory they may take.
_MICROBATCH = {"cpu": 8, "gpu": 64, "tpu": 64}
_SHARE = 0.6
# Records that are looked at for three good ones before it is said that there are none.
_LOOKED_AT = 1000


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A record, ready for its program."""

    index: int
    id: str
    label: str | None
    row: dict[str, Any]
    key: str
    length: int | None


@dataclasses.dataclass(frozen=True)
class Batch:
    """A range of records that was read."""

    prepared: Sequence[_Prepared]
    quarantined: Sequence[rows.Quarantined]


class Unusable(ValueError):
    """No record at the beginning of the data can be explained."""


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
            job.model, vocabulary=job.vocabulary, buckets=job.buckets, split=job.split
        )
        target, classes = job.target, self.model.classes or ()
        if isinstance(target, str) and target in classes:
            target = classes.index(target)
        self.question = Question(target, job.seed)
        self.source = _opened(job, self.model)
        self.total = min(len(self.source), job.limit or len(self.source))
        if self.total == 0:
            raise ValueError("there are no records to explain")
        self.programs = Programs(self.model, job.options, self.question, job.devices)
        self._columns = job.columns or self.model.columns
        self._smaller: dict[str, tuple[int, int]] = {}
        self._examples = self._look(avoid, 3)
        first = self._examples[0]
        self.diagnostics = self.programs.diagnostics(first.row)
        self._classes = self._count_classes(first.row)
        self.microbatch = self._choose_microbatch()
        self._ids: manifest.Manifest | None = None

    def describe(self) -> dict[str, Any]:
        """All that the rows depend on, and how much there is to do."""
        job, first = self.job, self._examples[0]
        arguments = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), first.row["arguments"]
        )
        buckets = self.model.buckets
        return {
            "numerics": numerics(),
            "weights": hashed(self.model, arguments),
            "mesh": dict(self.model.mesh.shape) if self.model.mesh else None,
            "methods": job.options,
            "target": list(job.target) if isinstance(job.target, tuple) else job.target,
            "seed": job.seed,
            "columns": list(self._columns) if self._columns else None,
            "buckets": list(buckets.all()) if buckets else None,
            "microbatch": self.microbatch,
            "shard_size": job.shard_size or self._choose_shard(),
            "records": self.total,
            "source": self.source.fingerprint(),
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
        return canary.prove(self.programs, each, first.key, self.microbatch, check)

    def read(self, begin: int, end: int) -> Batch:
        """Reads a range of records and sorts out those that cannot be explained."""
        found = [self._read(index) for index in range(begin, end)]
        return Batch(
            [each for each in found if isinstance(each, _Prepared)],
            [each for each in found if isinstance(each, rows.Quarantined)],
        )

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
        groups: dict[str, list[_Prepared]] = collections.defaultdict(list)
        for each in batch.prepared:
            groups[each.key].append(each)
        found: list[rows.Explained | rows.Quarantined] = [*batch.quarantined]
        for key in sorted(groups):
            found += self._group(groups[key], key, check)
        good = [each for each in found if isinstance(each, rows.Explained)]
        bad = [each for each in found if isinstance(each, rows.Quarantined)]
        return Result(rows.table(good, self.diagnostics), rows.quarantine(bad))

    def refuse(
        self, index: int, reason: str, message: str, name: str | None = None
    ) -> Result:
        """A record that a process did not survive; only its name is read."""
        name = self._name(index) if name is None else name
        bad = [rows.Quarantined(index, name, reason, message)]
        return Result(rows.table([], self.diagnostics), rows.quarantine(bad))

    def memory(self) -> int:
        """Bytes of a device that one microbatch takes beyond the parameters."""
        first = self._examples[0]
        return self.programs.bytes(stacked([first.row]), first.key, self.microbatch)

    def shapes(self, sample: int) -> dict[str, int]:
        """How many records of an even sample go to each program, bad ones as `bad`."""
        step = max(1, self.total // sample)
        found = [self._read(index) for index in range(0, self.total, step)]
        keys = [f.key if isinstance(f, _Prepared) else "bad" for f in found]
        return dict(collections.Counter(keys))

    def _name(self, index: int) -> str:
        """A record's id, without the rest of it where the source can do that."""
        source = self.source
        if hasattr(source, "id_of"):
            return source.id_of(index)
        if not isinstance(source, Source):
            return str(index)
        return source.names.of_bad(index, source.reader)

    def _read(self, index: int) -> _Prepared | rows.Quarantined:
        name = str(index)
        try:
            record = self.source[index]
            name = _name(record.id)
            columns = self._columns or self._default(record)
            args, length = self.model.arguments(record, columns)
            target = self._target(record.label)
        except BadRecord as error:
            return rows.Quarantined(
                index, error.id or name, error.reason, error.message
            )
        except (OSError, MemoryError):
            # The disk or the network, and not the record.
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            return rows.Quarantined(index, name, "UNREADABLE", said)
        query = self.model.query
        if length is not None and query < 0:
            query += length
        label = None if record.label is None else str(record.label)
        row = row_of(args, record.id, query, target)
        return _Prepared(index, record.id, label, row, shape_key(args), length)

    def _default(self, record: Any) -> tuple[str, ...]:
        for name in ("image", "x", "tokens"):
            if name in record.columns:
                return (name,)
        raise BadRecord("MISSING", f"no image, x or tokens in {list(record.columns)}")

    def _target(self, label: Any) -> int | None:
        """The class that is known before the model is run.

        Raises:
          BadRecord: If the label is wanted and is no class.
        """
        if self.question.target != "label":
            known = self.question.target
            return known if isinstance(known, int) else None
        classes = self.model.classes or ()
        if isinstance(label, str) and label in classes:
            label = classes.index(label)
        if not isinstance(label, int) or isinstance(label, bool):
            raise BadRecord("MISSING", f"the label {label!r:.40} is no class")
        limit = getattr(self, "_classes", None)
        if label < 0 or (limit is not None and label >= limit):
            raise BadRecord(
                "WRONG_SHAPE", f"the label {label} is none of {limit} classes"
            )
        return label

    def _look(self, begin: int, wanted: int) -> list[_Prepared]:
        """The first good records, by which the programs are tried."""
        good: list[_Prepared] = []
        reasons: collections.Counter[str] = collections.Counter()
        last = ""
        for index in range(begin, min(self.total, begin + _LOOKED_AT)):
            found = self._read(index)
            if isinstance(found, rows.Quarantined):
                reasons[found.reason] += 1
                last = f"{found.id}: {found.reason}: {found.message}"
            else:
                good.append(found)
                if len(good) == wanted:
                    break
        if not good:
            raise Unusable(
                f"none of the first {min(self.total, _LOOKED_AT)} records can be "
                f"explained: {dict(reasons)}; the last, {last:.200}"
            )
        return good

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
        self, group: list[_Prepared], key: str, check: Callable[[int], Any] | None
    ) -> list[rows.Explained | rows.Quarantined]:
        """Explains records of one shape, in a smaller way where memory runs out."""
        while True:
            microbatch, in_flight = self._smaller.get(key, (self.microbatch, 2))
            try:
                return self._explain(group, key, microbatch, in_flight, check)
            except Preempted:
                raise
            except Exception as error:
                if not out_of_memory(error):
                    return self._halves(group, key, check, error)
                if in_flight > 1:
                    self._smaller[key] = microbatch, 1
                elif microbatch > 1:
                    self.programs.forget(key, microbatch)
                    self._smaller[key] = microbatch // 2, 1
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
        group: list[_Prepared],
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
        group: list[_Prepared],
        key: str,
        microbatch: int,
        in_flight: int,
        check: Callable[[int], Any] | None,
    ) -> list[rows.Explained | rows.Quarantined]:
        batch = stacked([each.row for each in group])
        predicted, found = self.programs.run(
            batch, key, microbatch, in_flight=in_flight, check=check
        )
        numerics_id = self.numerics_id(microbatch, key)
        return [
            self._answer(each, number, predicted, found, numerics_id)
            for number, each in enumerate(group)
        ]

    def numerics_id(self, microbatch: int, key: str) -> str:
        """What the bits of rows of a shape depend on besides the record."""
        if self._ids is None:
            self._ids = manifest.Manifest(self.describe())
        return self._ids.numerics_id(microbatch, key)

    def _answer(
        self,
        each: _Prepared,
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


def _name(id: str) -> str:
    """An id that can be written.

    Raises:
      BadRecord: If it is none.
    """
    try:
        id.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        said = repr(id)[:100]
        raise BadRecord("BAD_UTF8", f"the id {said}: {error}", said) from None
    return id


def _extent(values: np.ndarray) -> str:
    return f"from {np.min(values)} to {np.max(values)}"


def _opened(job: Job, model: Any) -> Any:
    # A source of the caller's own, that says what it is; others are opened.
    if hasattr(job.data, "fingerprint"):
        return job.data
    wanted = job.columns or model.columns
    schema = {k: v for k, v in (model.schema or {}).items()}
    return open_source(
        job.data, columns=wanted, schema=schema, duplicates=job.duplicates
    )
