"""Which shards were begun: what is left of a process that did not come back."""

import contextlib
import json
import re
from pathlib import Path

FOLDER = "state"
START = -1
# A preemption may hit a shard once; one that ends its process every time is another.
_SUSPECT = 2
_NAME = re.compile(r"-?\d+")


class Marks:
    """A small file for each shard under way, with how often it was begun."""

    def __init__(self, folder: Path):
        """Makes the folder.

        Args:
          folder: The output folder.
        """
        self._folder = folder / FOLDER
        self._folder.mkdir(exist_ok=True)

    def begin(self, number: int) -> None:
        """Says that a shard is under way, or with `START` a first look at the data."""
        self._path(number).write_text(json.dumps(self.crashes(number) + 1))

    def end(self, number: int) -> None:
        """Says that it is committed, or was given up on purpose."""
        with contextlib.suppress(FileNotFoundError):
            self._path(number).unlink()

    def crashes(self, number: int) -> int:
        """How often it was begun and neither committed nor given up."""
        try:
            return int(json.loads(self._path(number).read_text()))
        except (OSError, ValueError, TypeError):
            return 0

    def crashing(self) -> bool:
        """Whether the same shard was begun twice and never came to an end."""
        numbers = [
            int(p.name) for p in self._folder.iterdir() if _NAME.fullmatch(p.name)
        ]
        return any(self.crashes(number) >= _SUSPECT for number in numbers)

    def _path(self, number: int) -> Path:
        return self._folder / str(number)
