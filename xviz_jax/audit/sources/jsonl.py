"""JSON Lines: an object in each line."""

from typing import Any, BinaryIO

from xviz_jax.audit.sources import json_text
from xviz_jax.audit.sources.lines import Lines, skip_bom
from xviz_jax.audit.sources.place import Place
from xviz_jax.audit.sources.record import BadRecord, Limits

# So many records are asked which columns there are.
_ASKED = 64


class Jsonl(Lines):
    """A reader of one `.jsonl`."""

    def __init__(self, place: Place, limits: Limits):
        """Finds where the lines begin, and the columns of the first of them.

        Raises:
          ValueError: If no line of the first ones holds an object.
        """
        super().__init__(place, limits)
        names: dict[str, None] = {}
        fault = "it is empty"
        for row in range(min(len(self), _ASKED)):
            try:
                names |= dict.fromkeys(self.parse(self.record(row)))
            except BadRecord as error:
                fault = str(error)
        if not names:
            raise ValueError(f"{place.name} holds no JSON objects: {fault}")
        self.names = tuple(names)

    def head(self, file: BinaryIO) -> int:
        """Nothing but a byte order mark."""
        return skip_bom(file)

    def parse(self, record: bytes) -> dict[str, Any]:
        """The object."""
        found = json_text.parse(record, self.limits)
        if not isinstance(found, dict):
            raise BadRecord(
                "UNDECODABLE", f"{type(found).__name__}, a JSON object is wanted"
            )
        return found
