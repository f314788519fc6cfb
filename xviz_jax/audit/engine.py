"""What computes shards: this process, a process of its own, or a Ray cluster."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from xviz_jax.audit.canary import Verdict
from xviz_jax.audit.isolated import Isolated
from xviz_jax.audit.job import Job
from xviz_jax.audit.local import Background, Local, Range, apart
from xviz_jax.audit.progress import Log
from xviz_jax.audit.ray import Cluster, Ray
from xviz_jax.audit.shard import Result
from xviz_jax.audit.state import START, Marks
from xviz_jax.audit.stopping import Stop
from xviz_jax.audit.worker import Worker

_POLL = 0.1
# Called with the number of rows of a method that were done.
Advance = Callable[[int], Any]


@dataclasses.dataclass(frozen=True)
class Engine:
    """An engine that is ready.

    Attributes:
      said: What its workers are.
      prove: The canary.
      devices: What it runs on.
      results: Computes shards.
      close: Ends it.
      hung: Whether a thread of this process never came back.
    """

    said: dict[str, Any]
    prove: Callable[[], Verdict]
    devices: Sequence[str]
    results: Callable[[Mapping[int, Range], Advance], Iterator[tuple[int, Result]]]
    close: Callable[[], Any]
    hung: Callable[[], bool] = lambda: False


def start(
    kind: str,
    job: Job,
    ray: Ray,
    *,
    isolate: bool,
    deadline: float,
    stop: Stop,
    marks: Marks,
    log: Log,
) -> Engine:
    """Starts an engine: loads the model, and looks at the first records.

    Args:
      kind: `local` or `ray`.
      job: What is computed.
      ray: The cluster.
      isolate: Compute in a process of its own.
      deadline: Seconds for one shard, and for the first records.
      stop: Whether someone asked for an end.
      marks: Remembers which shards were begun.
      log: Is told where the work is done.

    Raises:
      ValueError: If the job is wrong.
      Preempted: If someone asked for an end.
    """
    if kind == "ray":
        found = Cluster(job, ray, stop, deadline, log.say)
        return Engine(
            found.describe(),
            found.prove,
            found.devices(),
            lambda ranges, advance: found.results(ranges),
            found.close,
        )
    isolated = Isolated(job, check=stop.check)
    if isolate or marks.crashing():
        log.say("computing in a process of its own")
        return _apart(isolated, marks, deadline)
    marks.begin(START)
    try:
        started = Background(Worker, job)
        if not _came(started, deadline, stop):
            log.say("the first records hang: going on in a process of its own")
            return _apart(isolated, marks, deadline, hung=True)
        worker = started.answer()
        said = worker.describe()
    finally:
        # Whatever was wrong with the call, this process has survived it.
        marks.end(START)
    running: list[Local] = []

    def results(
        ranges: Mapping[int, Range], advance: Advance
    ) -> Iterator[tuple[int, Result]]:
        here = Local(
            worker, isolated, marks, deadline=deadline, stop=stop, advance=advance
        )
        running.append(here)
        return here.results(ranges)

    return Engine(
        said,
        lambda: worker.prove(lambda count: stop.check()),
        worker.devices(),
        results,
        isolated.close,
        lambda: any(here.hung for here in running),
    )


def _came(started: Background, deadline: float, stop: Stop) -> bool:
    """Whether a worker is ready in time."""
    until = time.monotonic() + deadline
    while not started.wait(_POLL):
        stop.check()
        if time.monotonic() > until:
            return False
    return True


def _apart(
    isolated: Isolated, marks: Marks, deadline: float, *, hung: bool = False
) -> Engine:
    said = isolated.describe(deadline)
    marks.end(START)
    return Engine(
        said,
        lambda: isolated.call("prove"),
        isolated.call("devices"),
        lambda ranges, advance: apart(ranges, isolated, deadline),
        isolated.close,
        lambda: hung,
    )
