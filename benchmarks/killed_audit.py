"""An audit of the embedded model that is killed ten times, against one that is not.

Images repeated with noise are explained once undisturbed, then again by processes that
SIGKILL ends at random times, until one ends by itself. The files must be the same,
byte for byte; what is lost is the work on the shards that were under way.
"""

import hashlib
import importlib.metadata
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from timing import arguments, replace_section

from xviz_jax import audit
from xviz_jax.models import embedded

ROOT = Path(__file__).parent.parent
TITLE = "An audit that is killed"
METHODS = "attention_rollout"


def main() -> None:
    options = arguments(__doc__)
    count, kills = (64, 1) if options.small else (100_000, 10)
    with tempfile.TemporaryDirectory() as scratch:
        lines = measured(Path(scratch), count, kills)
    print("\n".join(lines))
    if options.save:
        replace_section(TITLE, lines)


def measured(folder: Path, count: int, kills: int) -> list[str]:
    data = folder / "noisy.npz"
    records(data, count)
    clean, killed = folder / "clean", folder / "killed"
    begin = time.perf_counter()
    ended(start(data, clean))
    whole = time.perf_counter() - begin
    between, draw = max(committed(clean) // kills, 1), random.Random(0)
    spent = time.perf_counter()
    for _ in range(kills):
        kill(start(data, killed), killed, draw.randrange(between), draw)
    ended(start(data, killed))
    spent = time.perf_counter() - spent
    begin = time.perf_counter()
    ended(start(data, killed))
    again = time.perf_counter() - begin
    one, other = digests(clean), digests(killed)
    rows = audit.open(killed)
    if one != other or not rows.complete or len(rows) != count:
        raise SystemExit(f"{len(rows):,} of {count:,} records, alike: {one == other}")
    versions = ", ".join(
        f"{n} {importlib.metadata.version(n)}" for n in ("jax", "pyarrow")
    )
    return [
        f"## {TITLE}",
        "",
        f"`python benchmarks/killed_audit.py --save`, cpu ({platform.machine()}), "
        f"Python {platform.python_version()}, {versions}. Embedded model, {METHODS}.",
        "",
        "| records | shards | SIGKILLs | seconds, undisturbed | seconds, killed | "
        "rerun, s | files |",
        "|---|---|---|---|---|---|---|",
        f"| {count:,} | {len(one)} | {kills} | {whole:.0f} | {spent:.0f} | {again:.1f} "
        "| the same bytes |",
        "",
    ]


def kill(process: subprocess.Popen, out: Path, more: int, draw: random.Random) -> None:
    """Ends a process once it has committed so many shards more, or has begun."""
    wanted = committed(out) + more
    while not out.exists() or committed(out) < wanted:
        if process.poll() is not None:
            raise SystemExit(f"an audit ended with {process.returncode}, not killed")
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 0.2))
    os.killpg(process.pid, signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise SystemExit(f"an audit ended with {process.returncode}, not killed")


def records(path: Path, count: int) -> None:
    images, labels = embedded.images()
    random, which = np.random.default_rng(0), np.arange(count) % len(images)
    noisy = np.empty((count, 28, 28), np.float32)
    for first in range(0, count, 1000):
        some = images[which[first : first + 1000]]
        noise = random.normal(0, 0.05, some.shape).astype(np.float32)
        noisy[first : first + 1000] = np.clip(some + noise, 0, 1)
    np.savez(path, image=noisy, label=labels[which])


def start(data: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "xviz_jax.cli", "audit", "--model", "embedded"]
    command += ["--data", str(data), "--out", str(out), "--methods", METHODS]
    return subprocess.Popen(
        [*command, "--microbatch", "32"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def ended(process: subprocess.Popen) -> None:
    if process.wait() != 0:
        raise SystemExit(f"an audit ended with {process.returncode}")


def committed(out: Path) -> int:
    return len(list((out / "shards").glob("*.parquet")))


def digests(out: Path) -> dict[str, str]:
    files = sorted((out / "shards").glob("*.parquet"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


if __name__ == "__main__":
    main()
