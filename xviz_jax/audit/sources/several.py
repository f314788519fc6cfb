"""Several files of one format as one source, in the order of their names."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from xviz_jax.audit.sources.place import Place
from xviz_jax.audit.sources.record import Reader

# Opening a file in an object store is a request or two.
_AT_ONCE = 8


class Several(Reader):
    """A reader of files, of which each thread holds one open."""

    def __init__(self, places: Sequence[Place], open_one: Callable[[Place], Reader]):
        """Opens all of them once.

        Raises:
          ValueError: If one is damaged, or has not the columns of the first.
        """
        super().__init__()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            self.parts = list(pool.map(open_one, places))
        one = self.parts[0]
        for place, part in zip(places, self.parts, strict=True):
            if set(part.names) != set(one.names) or part.kinds != one.kinds:
                raise ValueError(
                    f"{place.name} has the columns {_spell(part)}, and "
                    f"{places[0].name} has {_spell(one)}"
                )
        self.first = np.cumsum([0, *map(len, self.parts)])
        self.names, self.kinds, self.folder = one.names, one.kinds, one.folder
        self.loose, self.textual = one.loose, one.textual

    def __len__(self) -> int:
        """The number of records."""
        return int(self.first[-1])

    def read(self, row: int, names: tuple[str, ...]) -> dict[str, Any]:
        """One row of one file."""
        number = int(np.searchsorted(self.first, row, "right")) - 1
        part = self.parts[number]
        before = getattr(self.handles, "part", part)
        if before is not part:
            before.close()
        self.handles.part = part
        return part.read(row - int(self.first[number]), names)

    def identity(self) -> dict[str, Any]:
        """What each of the files is."""
        return {"parts": [part.identity() for part in self.parts]}


def _spell(part: Reader) -> list[str]:
    return [f"{name} {part.kinds.get(name, ('',))[0]}".strip() for name in part.names]
