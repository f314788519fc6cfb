"""Records as rows of programs; one that cannot be explained as what is wrong."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from xviz_jax.audit import rows
from xviz_jax.audit.explainers import Question, shape_key
from xviz_jax.audit.job import Job
from xviz_jax.audit.model import Model
from xviz_jax.audit.programs import row_of
from xviz_jax.audit.sources import BadRecord, Source, open_source

# Columns that are explained where neither job nor model names any.
_INPUTS = ("image", "x", "tokens")
# Records that are looked at for good ones before it is said that there are none.
_LOOKED_AT = 1000


@dataclasses.dataclass(frozen=True)
class Prepared:
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

    prepared: Sequence[Prepared]
    quarantined: Sequence[rows.Quarantined]

    def of_each_shape(self) -> "Batch":
        """One record for each program."""
        return Batch([*{each.key: each for each in self.prepared}.values()], [])


class Unusable(ValueError):
    """No record at the beginning of the data can be explained."""


class Reading:
    """The data of a job, as its model takes it.

    Attributes:
      source: The data.
      columns: The model's arguments; None for the one that a record has.
      total: How many records there are to explain.
      classes: How many classes the model has, once that is known.
    """

    def __init__(self, job: Job, model: Model, question: Question):
        """Opens the data.

        Raises:
          ValueError: If there is none, or it lacks the model's columns.
        """
        self._model, self._question = model, question
        self.source = _opened(job, model)
        self.columns = job.columns or model.columns
        self.total = min(len(self.source), job.limit or len(self.source))
        if self.total == 0:
            raise ValueError("there are no records to explain")
        self.classes: int | None = None

    def batch(self, begin: int, end: int) -> Batch:
        """Reads a range of records and sorts out those that cannot be explained."""
        found = [self.read(index) for index in range(begin, end)]
        return Batch(
            [each for each in found if isinstance(each, Prepared)],
            [each for each in found if isinstance(each, rows.Quarantined)],
        )

    def read(self, index: int) -> Prepared | rows.Quarantined:
        """One record.

        Raises:
          OSError: If the storage failed. That is no fault of the record's.
        """
        name = str(index)
        try:
            record = self.source[index]
            name = _writable("id", record.id)
            label = record.label
            label = None if label is None else _writable("label", str(label))
            columns = self.columns or _default(record)
            args, length = self._model.arguments(record, columns)
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
        query = self._model.query
        if length is not None and query < 0:
            query += length
        row = row_of(args, record.id, query, target)
        return Prepared(index, record.id, label, row, shape_key(args), length)

    def name(self, index: int) -> str:
        """A record's id, without the rest of it where the source can do that."""
        source = self.source
        if hasattr(source, "id_of"):
            return source.id_of(index)
        if not isinstance(source, Source):
            return str(index)
        return source.names.of_bad(index, source.reader)

    def ids(self) -> dict[str, int]:
        """How many ids were renamed, and how many are missing, of those looked at."""
        if not isinstance(self.source, Source):
            return {"renamed": 0, "missing": 0}
        names = self.source.names
        return {"renamed": names.repeated, "missing": names.missing}

    def look(self, begin: int, wanted: int) -> list[Prepared]:
        """The first good records, by which the programs are tried.

        Raises:
          Unusable: If there are none.
        """
        good: list[Prepared] = []
        reasons: collections.Counter[str] = collections.Counter()
        last = ""
        for index in range(begin, min(self.total, begin + _LOOKED_AT)):
            found = self.read(index)
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

    def shapes(self, sample: int) -> dict[str, int]:
        """How many records of an even sample go to each program, bad ones as `bad`."""
        step = max(1, self.total // sample)
        found = [self.read(index) for index in range(0, self.total, step)]
        keys = [f.key if isinstance(f, Prepared) else "bad" for f in found]
        return dict(collections.Counter(keys))

    def _target(self, label: Any) -> int | None:
        """The class that is known before the model is run.

        Raises:
          BadRecord: If the label is wanted and is no class.
        """
        if self._question.target != "label":
            known = self._question.target
            return known if isinstance(known, int) else None
        classes = self._model.classes or ()
        if isinstance(label, str) and label in classes:
            label = classes.index(label)
        if not isinstance(label, int) or isinstance(label, bool):
            raise BadRecord("MISSING", f"the label {label!r:.40} is no class")
        if label < 0 or (self.classes is not None and label >= self.classes):
            raise BadRecord(
                "WRONG_SHAPE", f"the label {label} is none of {self.classes} classes"
            )
        return label


def _default(record: Any) -> tuple[str, ...]:
    for name in _INPUTS:
        if name in record.columns:
            return (name,)
    raise BadRecord("MISSING", f"no image, x or tokens in {list(record.columns)}")


def _writable(what: str, text: str) -> str:
    """A text that can be written.

    Raises:
      BadRecord: If it is none; an id is then called by what stands for it in Python.
    """
    try:
        text.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        said = repr(text)[:100]
        name = said if what == "id" else ""
        raise BadRecord("BAD_UTF8", f"the {what} {said}: {error}", name) from None
    return text


def _opened(job: Job, model: Model) -> Any:
    # A source of the caller's own, that says what it is; others are opened.
    if hasattr(job.data, "fingerprint"):
        return job.data
    wanted = job.columns or model.columns
    schema = dict(model.schema or {})
    return open_source(
        job.data, columns=wanted, schema=schema, duplicates=job.duplicates
    )
