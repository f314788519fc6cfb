"""An audit over the bare compiled loop, and how its costs grow.

The loop explains the same records with the same compiled programs, all in memory, and
keeps what it finds; the audit reads, checks, explains, writes and syncs. Each figure is
a ratio within one run. Forced host devices share cores: two over one is reported, and
says nothing of two machines.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from attention_rows import status
from timing import arguments, paired, replace_section, report

from xviz_jax import audit
from xviz_jax.audit.job import Job
from xviz_jax.audit.worker import Worker
from xviz_jax.models import embedded

# The cheap ones: the less a record's explanation costs, the more the rest counts.
METHODS = ("attention_rollout", "saliency")
ROOT = Path(__file__).parent.parent
TITLE = "An audit over the bare compiled loop"


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--measured":
        return measured(json.loads(sys.argv[2]))
    options = arguments(__doc__)
    count = 24 if options.small else 20_000
    rounds = 1 if options.small else min(options.rounds, 3)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pairs = [throughput(folder, count, rounds)]
    report(TITLE, "python benchmarks/audit.py --save", pairs, save=options.save)
    lines = growth(options.small)
    print("\n".join(lines))
    if options.save:
        replace_section("How an audit's costs grow", [f"## {lines[0]}", *lines[1:]])


def records(path: Path, count: int) -> None:
    """The embedded images, repeated with noise, under `path`."""
    images, labels = embedded.images()
    random = np.random.default_rng(0)
    which = np.arange(count) % len(images)
    noise = random.normal(0, 0.02, (count, 28, 28)).astype(np.float32)
    np.savez(path, image=images[which] + noise, label=labels[which])


def throughput(folder: Path, count: int, rounds: int):
    """Time of an audit over the loop's."""
    data = folder / "d.npz"
    records(data, count)
    job = Job(model="embedded", data=str(data), methods=METHODS, devices=1)
    worker = Worker(job)
    # The same programs for both, compiled before either is timed.
    worker.compute(0, min(count, worker.microbatch))
    read = worker.read(0, count)
    rows = jax.tree.map(lambda *each: np.stack(each), *[r.row for r in read.prepared])
    key, runs = read.prepared[0].key, iter(range(2 * rounds + 2))

    def loop():
        return worker.programs.run(rows, key, worker.microbatch)

    def whole():
        # The engine's own steps, without loading, compiling and the canary.
        from xviz_jax.audit.isolated import Isolated
        from xviz_jax.audit.local import Local
        from xviz_jax.audit.manifest import Manifest
        from xviz_jax.audit.shard import QUARANTINE, SHARDS, commit
        from xviz_jax.audit.state import Marks

        out = folder / f"out{next(runs)}"
        for name in (SHARDS, QUARANTINE):
            (out / name).mkdir(parents=True)
        plan = Manifest(worker.describe())
        marks, stop = Marks(out), audit.Stop()
        engine = Local(worker, Isolated(job), marks, deadline=1e9, stop=stop)
        ranges = {number: plan.range(number) for number in range(plan.shards)}
        for number, result in engine.results(ranges):
            commit(out, number, plan.run, result)
            marks.end(number)

    name = f"embedded model, {count:,} records, rollout and saliency"
    return paired(name, whole, loop, rounds=rounds, error="the same programs")


def growth(small: bool) -> list[str]:
    """Time and memory against the number of records, and what a rerun costs."""
    counts = (200, 400) if small else (10_000, 30_000, 100_000)
    lines = ["How an audit's costs grow", ""]
    lines += ["| records | seconds | peak memory, MB | rerun, s |", "|---|---|---|---|"]
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in counts:
            out = str(Path(scratch) / str(count))
            first = elsewhere({"out": out, "count": count})
            again = elsewhere({"out": out, "count": count})
            found.append((count, first["seconds"], first["peak"]))
            cells = (
                f"{first['seconds']:.1f} | {first['peak']:.0f} | {again['wall']:.1f}"
            )
            lines.append(f"| {count:,} | {cells} |")
        one = elsewhere({"out": f"{scratch}/one", "count": counts[0], "devices": 1})
        two = elsewhere({"out": f"{scratch}/two", "count": counts[0], "devices": 2})
    slope, offset = np.polyfit([c for c, *_ in found], [s for _, s, _ in found], 1)
    lines += [
        "",
        f"Seconds = {offset:.2f} + {1e3 * slope:.3f} per 1,000 records; memory at "
        f"{found[-1][0]:,} over that at {found[0][0]:,}: "
        f"{found[-1][2] / found[0][2]:.3f}; two forced host devices over one, in time: "
        f"{two['seconds'] / one['seconds']:.2f}. Two layers and saliency.",
        "",
    ]
    return lines


def elsewhere(options: dict) -> dict:
    """A run in a process of its own, whose peak memory is its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": str(options.get("devices", 1)),
    }
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, "--measured", json.dumps(options)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "wall": time.perf_counter() - begin}


class Images:
    """Images made as they are read, shaped like the embedded model's."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> audit.Record:
        image = np.random.default_rng(index).random((28, 28), np.float32)
        return audit.Record(str(index), {"image": image})

    def fingerprint(self) -> str:
        return str(self.count)


def layers(weights, image):
    """Two of them: unlike one, their gradients are of no few kinds that compress."""
    first, last = weights
    return last @ jnp.tanh(first @ image.reshape(-1))


def measured(options: dict) -> None:
    draw = np.random.default_rng(0).standard_normal
    weights = draw((32, 784), np.float32) / 28, draw((10, 32), np.float32)
    model = audit.Model(forward=layers, parameters=weights, columns=("image",))
    done = audit.run(
        options["out"],
        model=model,
        data=Images(options["count"]),
        methods=("saliency",),
        microbatch=64,
    )
    # What `getrusage` gives begins with the parent's.
    peak = status("VmHWM") / 2**20
    print(json.dumps({"seconds": done.seconds, "peak": peak}))


if __name__ == "__main__":
    main()
