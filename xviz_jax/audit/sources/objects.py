"""Records out of Python objects: random access, or arrays in memory."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from xviz_jax.audit.sources.record import BadRecord, Reader, Record
from xviz_jax.audit.sources.schema import utf8

# So many elements are asked which columns there are.
_ASKED = 8


class Objects(Reader):
    """A reader of anything with `__len__` and `__getitem__`, such as grain's sources.

    An element is a mapping of columns, a `Record`, a text (`text`) or an array (`x`).
    The object is pickled with the source.
    """

    def __init__(self, elements: Any):
        """Asks the first elements for their columns.

        Raises:
          ValueError: If none of them has any.
        """
        super().__init__()
        self.elements, self.count = elements, len(elements)
        fault = "it is empty"
        for row in range(min(self.count, _ASKED)):
            try:
                self.names = tuple(self._columns(row))
                return
            except BadRecord as error:
                fault = str(error)
        raise ValueError(f"a {type(elements).__name__} gives no record: {fault}")

    def __len__(self) -> int:
        """The number of records."""
        return self.count

    def read(self, row: int, names: tuple[str, ...]) -> dict[str, Any]:
        """The columns of one element."""
        found = self._columns(row)
        return {name: found[name] for name in names if name in found}

    def identity(self) -> dict[str, Any]:
        """The object's class, and a hash of the first, middle and last element."""
        content = hashlib.sha256()
        for row in sorted({0, self.count // 2, self.count - 1}):
            try:
                found = self._columns(row)
            except BadRecord as error:
                content.update(str(error).encode(errors="replace"))
                continue
            for name in sorted(found):
                said = f"{name} {_spell(found[name])}"
                content.update(said.encode(errors="replace"))
        kind = type(self.elements)
        return {
            "format": f"{kind.__module__}.{kind.__qualname__}",
            "content": content.hexdigest(),
        }

    def _columns(self, row: int) -> dict[str, Any]:
        try:
            element = self.elements[row]
        except (BadRecord, MemoryError):
            raise
        except Exception as error:
            raise BadRecord("UNREADABLE", f"{type(error).__name__}: {error}") from error
        if isinstance(element, Record):
            beside = {"id": element.id, "label": element.label}
            return {**element.columns, **beside}
        if isinstance(element, Mapping):
            return {str(name): value for name, value in element.items()}
        if isinstance(element, str):
            return {"text": element}
        if hasattr(element, "shape"):
            return {"x": element}
        raise BadRecord(
            "WRONG_DTYPE",
            f"{type(element).__name__}, a mapping, a Record, a text or an array is "
            "wanted",
        )


class Arrays(Reader):
    """A reader of arrays in memory, with a row for each record."""

    def __init__(self, arrays: Mapping[str, Any]):
        """Takes the arrays, which are pickled with the source.

        Raises:
          ValueError: If they are no arrays of numbers or texts of one length.
        """
        super().__init__()
        self.arrays = {str(name): np.asarray(value) for name, value in arrays.items()}
        for name, array in self.arrays.items():
            if array.dtype.kind not in "biufUS" or not array.ndim:
                raise ValueError(
                    f"{name!r} is {array.dtype}{list(array.shape)}, numbers or texts "
                    "with a row for each record are wanted"
                )
        counts = {name: len(array) for name, array in self.arrays.items()}
        if len(set(counts.values())) != 1:
            raise ValueError(f"columns are of one length, got {counts}")
        self.count = next(iter(counts.values()))
        self.names = tuple(self.arrays)
        self.kinds = {n: (a.dtype, a.shape[1:]) for n, a in self.arrays.items()}

    def __len__(self) -> int:
        """The number of records."""
        return self.count

    def read(self, row: int, names: tuple[str, ...]) -> dict[str, Any]:
        """One row of each array."""
        found = {name: self.arrays[name][row] for name in names if name in self.arrays}
        return {
            name: utf8(name, value.item()) if value.dtype.kind in "US" else value
            for name, value in found.items()
        }

    def identity(self) -> dict[str, Any]:
        """A hash of each array."""
        content = {
            name: hashlib.sha256(_spell(array).encode()).hexdigest()
            for name, array in self.arrays.items()
        }
        return {"format": "arrays", "content": content}


def _spell(value: Any) -> str:
    """A value's kind and content."""
    if isinstance(value, Mapping | list | tuple):
        return repr(value)
    array = np.ascontiguousarray(value)
    if array.dtype.hasobject:
        return repr(value)
    content = hashlib.sha256(array.tobytes()).hexdigest()
    return f"{array.dtype.str}{list(array.shape)} {content}"
