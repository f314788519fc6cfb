"""Paired timing: what is measured and its floor take turns, A B A B.

Machines are shared, so absolute times mean little; ratios of neighbours in time do.
"""

import argparse
import dataclasses
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

RESULTS = Path(__file__).parent / "RESULTS.md"


@dataclasses.dataclass(frozen=True)
class Pair:
    """Times of a thing over times of its floor, pair by pair."""

    name: str
    seconds: float
    floor_seconds: float
    ratios: tuple[float, ...]
    error: str

    def row(self) -> str:
        """One line of a table."""
        low, high = min(self.ratios), max(self.ratios)
        median = statistics.median(self.ratios)
        times = f"{1e3 * self.seconds:.1f} | {1e3 * self.floor_seconds:.1f}"
        spread = f"{median:.3f} | {low:.3f} - {high:.3f}"
        return f"| {self.name} | {times} | {spread} | {self.error} |"


def paired(
    name: str,
    measured: Callable,
    floor: Callable,
    *,
    rounds: int,
    error: str,
    clock: Callable[[], float] = time.perf_counter,
) -> Pair:
    """Times two functions of no arguments, after one call of each to compile.

    With `time.process_time` as the clock it is the processor's time that counts,
    which neighbours on the machine disturb less.
    """
    jax.block_until_ready(measured())
    jax.block_until_ready(floor())
    mine, base = [], []
    for _ in range(rounds):
        for function, times in ((measured, mine), (floor, base)):
            begin = clock()
            jax.block_until_ready(function())
            times.append(clock() - begin)
    ratios = tuple(a / b for a, b in zip(mine, base, strict=True))
    return Pair(name, statistics.median(mine), statistics.median(base), ratios, error)


def arguments(description: str | None) -> argparse.Namespace:
    """`--small` for shapes that only show that the script runs; `--save`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny shapes, two rounds")
    parser.add_argument("--save", action="store_true", help="write into RESULTS.md")
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def report(title: str, command: str, pairs: Sequence[Pair], *, save: bool) -> None:
    """Prints a table, and replaces the one of the same title in RESULTS.md."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib")
    )
    machine = f"{jax.devices()[0].device_kind} ({platform.machine()})"
    lines = [
        f"## {title}",
        "",
        f"`{command}`, {machine}, Python {platform.python_version()}, {versions}. "
        "Times in milliseconds, medians; ratios pair by pair.",
        "",
        "| what | time | floor | time / floor | spread | error |",
        "|---|---|---|---|---|---|",
        *[pair.row() for pair in pairs],
        "",
    ]
    print("\n".join(lines))
    if save:
        replace_section(title, lines)


def replace_section(title: str, lines: Sequence[str]) -> None:
    """Replaces the section of RESULTS.md that `lines` begin with a heading of."""
    text = RESULTS.read_text() if RESULTS.exists() else "# Results\n\n"
    before, _, rest = text.partition(f"## {title}\n")
    _, found, after = rest.partition("\n## ")
    kept = f"\n## {after}" if found else ""
    whole = f"{before.rstrip()}\n\n" + "\n".join(lines) + kept
    RESULTS.write_text(whole.rstrip() + "\n")
