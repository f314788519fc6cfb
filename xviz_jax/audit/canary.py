"""Is a row the same bits wherever it is computed? A few rows tell, of each program."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from xviz_jax.audit.programs import PREDICT, Programs


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the start-up canary found.

    Attributes:
      bitwise: Whether rows did not depend on their neighbours, place or device.
      notes: What differed, where it is not.
    """

    bitwise: bool
    notes: tuple[str, ...] = ()


class Random(ValueError):
    """One and the same input gave two answers."""


def prove(
    programs: Programs,
    batch: Any,
    key: str,
    microbatch: int,
    check: Callable[[int], Any] | None = None,
) -> Verdict:
    """Explains the same rows again, alone, in another order, and on each device.

    Args:
      programs: What is tried.
      batch: A few rows of one shape.
      key: Names it.
      microbatch: Rows computed at once.
      check: Called between microbatches; what it raises ends the call.

    Returns:
      The verdict: a run whose rows depend on more than their record is not
      reproducible bit for bit, but may still be wanted.

    Raises:
      Random: If the same call gives two answers: the model draws random numbers.
    """
    count = len(jax.tree.leaves(batch)[0])
    pick = lambda order: jax.tree.map(lambda leaf: leaf[np.asarray(order)], batch)

    def run(order: Any, device: int = 0) -> list[dict[str, bytes]]:
        predicted, found = programs.run(
            pick(order), key, microbatch, in_flight=1, device=device, check=check
        )
        answers = {PREDICT: predicted, **found}
        return [
            {name: _bytes(each, row) for name, each in answers.items()}
            for row in range(len(order))
        ]

    everyone = np.arange(count)
    known = run(everyone)
    again = run(everyone)
    random = sorted(
        {n for a, b in zip(known, again, strict=True) for n in a if a[n] != b[n]}
    )
    if random:
        raise Random(
            f"one and the same input gave two answers ({', '.join(random)}): the model "
            "draws random numbers, or is in training mode; an audited model is "
            "deterministic"
        )
    differing = {}
    for row in everyone:
        differing |= _compare(known[row], run([row])[0], "alone")
    if count > 1:
        order = np.roll(everyone, 1)
        for row, found in zip(order, run(order), strict=True):
            differing |= _compare(known[row], found, "in another order")
    for device in range(1, len(programs.devices)):
        for row, found in zip(everyone, run(everyone, device), strict=True):
            differing |= _compare(known[row], found, "on another device")
    return Verdict(not differing, tuple(sorted(differing)))


def _compare(known: dict, found: dict, where: str) -> dict[str, None]:
    return {f"{name} {where}": None for name in known if known[name] != found[name]}


def _bytes(answer: Any, row: int) -> bytes:
    return b"".join(
        np.ascontiguousarray(leaf[row]).tobytes() for leaf in jax.tree.leaves(answer)
    )
