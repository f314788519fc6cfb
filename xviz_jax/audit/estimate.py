"""What an audit would take, from a few records."""

import dataclasses
import time
from collections.abc import Mapping

from xviz_jax.audit.job import Job
from xviz_jax.audit.manifest import Manifest
from xviz_jax.audit.shard import Result
from xviz_jax.audit.worker import Worker

# Records that are looked at for their shapes, and microbatches that are timed first.
_SAMPLE, _ROUNDS = 1000, 4
# A shard that would take longer is explained in part.
_SECONDS = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What an audit would take.

    Attributes:
      records: All there are.
      shards: Files that will be written.
      shard_size: Records of each.
      microbatch: Records computed at once on a device.
      devices: What it would run on.
      shapes: Of an even sample of records, how many go to each compiled program, by
        the shapes of its arguments; `bad` ones go to none.
      memory_bytes: Of a device, beyond parameters and inputs, for a microbatch shaped
        like the first record.
      compile_seconds: For the programs of all shapes in the first shard.
      probed: Records that were explained to measure the rate: the first shard, or as
        many of it as half a minute allows.
      records_per_second: Measured on them, on all devices.
      seconds: For all records.
      disk_bytes: For all rows, before compression.
    """

    records: int
    shards: int
    shard_size: int
    microbatch: int
    devices: tuple[str, ...]
    shapes: Mapping[str, int]
    memory_bytes: int
    compile_seconds: float
    probed: int
    records_per_second: float
    seconds: float
    disk_bytes: int

    def __str__(self) -> str:
        """As a person reads it."""
        shapes = "\n".join(f"  {n:6d}  {key}" for key, n in self.shapes.items())
        return (
            f"{self.records:,} records in {self.shards:,} shards of "
            f"{self.shard_size:,}, {self.microbatch} at once on each of "
            f"{len(self.devices)} devices\n"
            f"programs, and records of a sample for each:\n{shapes}\n"
            f"memory of a device: {self.memory_bytes / 2**20:,.1f} MiB beyond "
            "parameters and inputs\n"
            f"disk: {self.disk_bytes / 2**20:,.1f} MiB before compression\n"
            f"time: {self.compile_seconds:.1f} s to compile, "
            f"{self.records_per_second:,.1f} records/s measured on the first "
            f"{self.probed:,}, {self.seconds:,.0f} s in all"
        )


def estimate(job: Job) -> Estimate:
    """Explains the first shard of an audit, and writes nothing.

    Args:
      job: What would be explained, and how.

    Raises:
      ValueError: If the job is wrong.
    """
    worker = Worker(job)
    said = worker.describe()
    plan = Manifest(said)
    shard = plan.range(0)[1]
    begin = time.perf_counter()
    memory = worker.memory()
    worker.compute(0, shard, worker.read(0, shard).of_each_shape())
    compiled = time.perf_counter() - begin
    probed = min(_ROUNDS * said["microbatch"] * len(worker.devices()), shard)
    rate, result = _timed(worker, probed)
    more = min(int(rate * _SECONDS), shard)
    if more > probed:
        probed = more
        rate, result = _timed(worker, probed)
    return Estimate(
        records=plan.records,
        shards=plan.shards,
        shard_size=said["shard_size"],
        microbatch=said["microbatch"],
        devices=tuple(worker.devices()),
        shapes=worker.shapes(_SAMPLE),
        memory_bytes=memory,
        compile_seconds=round(compiled, 3),
        probed=probed,
        records_per_second=round(rate, 3),
        seconds=round(plan.records / rate + compiled, 1),
        disk_bytes=result.explained.nbytes * plan.records // probed,
    )


def _timed(worker: Worker, count: int) -> tuple[float, Result]:
    """Records a second, and what came of them."""
    begin = time.perf_counter()
    result = worker.compute(0, count)
    return count / (time.perf_counter() - begin), result
