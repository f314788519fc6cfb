"""What a run is: a fingerprint that its rows depend on, and its shards."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from xviz_jax.audit import files

NAME = "run.json"
_FORMAT = 1
# Where an object lies in memory.
_ADDRESS = re.compile(" at 0x[0-9a-f]+")
# What a row's bits do not depend on.
_ELSEWHERE = ("records", "shard_size", "source", "ids", "microbatch")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The fingerprint of a run.

    Attributes:
      said: What `Worker.describe` says.
    """

    said: dict[str, Any]

    @property
    def run(self) -> str:
        """Names the run: two of one name have the same rows in the same shards."""
        return _short({"format": _FORMAT, **self.said})

    @property
    def records(self) -> int:
        """How many there are."""
        return self.said["records"]

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.records // self.said["shard_size"])

    def range(self, number: int) -> tuple[int, int]:
        """The records of a shard: the first, and the one after the last."""
        size = self.said["shard_size"]
        return number * size, min((number + 1) * size, self.records)

    def numerics_id(self, microbatch: int, key: str) -> str:
        """What the bits of a row depend on besides its record.

        Args:
          microbatch: Records computed at once.
          key: Shapes of the model's arguments.
        """
        kept = {k: v for k, v in self.said.items() if k not in _ELSEWHERE}
        return _short({**kept, "microbatch": microbatch, "shapes": key})


def _short(said: dict[str, Any]) -> str:
    text = json.dumps(said, sort_keys=True, default=_spelled)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write(folder: Path, manifest: Manifest, beside: dict[str, Any]) -> None:
    """Writes `run.json`.

    Args:
      folder: The output folder.
      manifest: The fingerprint.
      beside: What else is good to know, on which no row depends.
    """
    said = {
        "format": _FORMAT,
        "run": manifest.run,
        "fingerprint": manifest.said,
        **beside,
    }
    text = json.dumps(said, indent=2, default=_spelled, allow_nan=False) + "\n"
    files.write(folder / NAME, text.encode())


def load(folder: Path) -> Manifest | None:
    """The run that a folder holds, if any.

    Raises:
      ValueError: If `run.json` is damaged, or of another format.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        said = json.loads(path.read_text())
        found = Manifest(said["fingerprint"])
        if said["format"] != _FORMAT or said["run"] != found.run:
            raise ValueError("it does not say what its name stands for")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no run's fingerprint: {error}; pass --new-run"
        ) from error
    return found


def difference(old: Any, new: Any, name: str = "") -> list[str]:
    """What changed between two fingerprints, a line for each.

    >>> difference({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    ['b.c: 2 -> 3']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        lines = []
        for key in keys:
            inner = f"{name}.{key}" if name else key
            lines += difference(old.get(key), new.get(key), inner)
        return lines
    return [] if old == new else [f"{name}: {old!r} -> {new!r}"]


def plain(said: dict[str, Any]) -> dict[str, Any]:
    """A fingerprint as it looks once it was written and read.

    Arrays become their hashes, and functions their names with what they close over.
    """
    return json.loads(json.dumps(said, default=_spelled))


def _spelled(value: Any) -> Any:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        stored = np.ascontiguousarray(value)
        digest = hashlib.sha256(stored.tobytes()).hexdigest()
        return f"{stored.dtype}{list(stored.shape)} {digest}"
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"is": _qualified(type(value)), **fields}
    if callable(value):
        cells = [cell.cell_contents for cell in getattr(value, "__closure__", ()) or ()]
        return {"is": _qualified(value), "of": cells}
    return _ADDRESS.sub("", repr(value))


def _qualified(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
