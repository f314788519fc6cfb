"""The engine for clusters: Ray places the workers and replaces those that die.

Each worker is an actor that holds the model and its compiled programs. This process
hands out shards and commits what comes back; it needs no device. What a worker held
that died goes to others, and one that does not start again is given up.
"""

import collections
import dataclasses
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from xviz_jax.audit.canary import Verdict
from xviz_jax.audit.extra import require
from xviz_jax.audit.isolated import CRASH, TIMEOUT
from xviz_jax.audit.job import Job, configure, settings
from xviz_jax.audit.local import Range
from xviz_jax.audit.manifest import difference
from xviz_jax.audit.shard import Result
from xviz_jax.audit.stopping import Stop
from xviz_jax.audit.worker import Worker

_POLL = 0.2
# Shards that wait at each worker, so that none waits for this process.
_AHEAD = 2
# How often a worker that died is started before it is given up.
_STARTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ray:
    """A Ray cluster, for the engine `ray`.

    Attributes:
      address: Of the cluster; None starts one on this machine, `auto` finds one.
      actors: How many workers.
      cpus: Processors of each.
      gpus: GPUs of each.
      resources: Other resources of each, such as `{"TPU": 4}`.
      retries: How often a shard is tried again when its worker died, by whichever is
        free, before the record that kills it is looked for.
      restarts: How often Ray starts a worker again that died; -1 for always.
    """

    address: str | None = None
    actors: int = 1
    cpus: float = 1
    gpus: float = 0
    resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    retries: int = 2
    restarts: int = -1


class Cluster:
    """Workers on a Ray cluster."""

    def __init__(
        self,
        job: Job,
        options: Ray,
        stop: Stop,
        deadline: float,
        say: Callable[[str], Any] = lambda text: None,
    ):
        """Starts the workers.

        Args:
          job: What they are told; it is pickled.
          options: The cluster.
          stop: Whether someone asked for an end.
          deadline: Seconds for one shard.
          say: Told of workers that are given up.

        Raises:
          ImportError: If Ray is not installed.
          ValueError: If there are no actors.
        """
        if options.actors < 1:
            raise ValueError(f"`actors` is positive, got {options.actors}")
        self._ray = require("ray", "the engine 'ray'", "ray")
        self._stop, self._deadline, self._say = stop, deadline, say
        self._started = not self._ray.is_initialized()
        if self._started:
            self._ray.init(
                address=options.address, log_to_driver=False, include_dashboard=False
            )
        make = self._ray.remote(
            num_cpus=options.cpus,
            num_gpus=options.gpus,
            resources=dict(options.resources),
            max_restarts=options.restarts,
            max_task_retries=_STARTS,
        )(_Remote)
        packed, known = self._ray.cloudpickle.dumps(job), settings()
        self._retries = options.retries
        self._actors = {n: make.remote(packed, known) for n in range(options.actors)}
        # Calls that workers which died answer once they are there again.
        self._starting: dict[Any, int] = {}

    def describe(self) -> dict[str, Any]:
        """As a worker's; all must agree.

        Raises:
          ValueError: If they are not of one kind.
        """
        first, *others = self._all("describe")
        for other in others:
            if other != first:
                lines = difference(first, other)
                raise ValueError(
                    "workers are not of one kind, and rows would depend on which had "
                    "them:\n  " + "\n  ".join(lines)
                )
        return first

    def devices(self) -> list[str]:
        """Of all workers."""
        found = self._all("devices")
        named = zip(self._actors, found, strict=True)
        return [f"worker {n} {each}" for n, names in named for each in names]

    def prove(self) -> Any:
        """The canary, on every worker.

        Raises:
          ValueError: If the model draws random numbers.
        """
        found = self._all("prove")
        notes = tuple(sorted({note for each in found for note in each.notes}))
        return Verdict(all(each.bitwise for each in found), notes)

    def results(self, ranges: Mapping[int, Range]) -> Iterator[tuple[int, Result]]:
        """The shards, in the order in which they are done.

        A shard that ends its worker again and again, or hangs, is halved until the
        record is found.

        Raises:
          Preempted: If someone asked for an end.
          RuntimeError: If all workers died and do not start again.
        """
        waiting = collections.deque(_Part(n, *ranges[n]) for n in sorted(ranges))
        parts: dict[int, list[tuple[int, Result]]] = collections.defaultdict(list)
        busy: dict[Any, tuple[_Part, int, float]] = {}
        while waiting or busy:
            while waiting:
                actor = self._idle(busy, waiting[0])
                if actor is None:
                    break
                part = waiting.popleft()
                # Tried once: Ray would wait for the same worker to start again.
                call = self._actors[actor].call.options(max_task_retries=0)
                called = call.remote(part.method, *part.arguments)
                busy[called] = part, actor, time.monotonic()
            calls = [*busy, *self._starting]
            done, _ = self._ray.wait(calls, num_returns=1, timeout=_POLL)
            self._stop.check()
            for late in [] if done else self._late(busy):
                _, actor, _ = busy[late]
                self._ray.kill(self._actors[actor], no_restart=False)
                guilty, *others = self._lost(actor, busy)
                said = TIMEOUT, "no answer in time"
                waiting.extendleft([*others, *guilty.smaller(*said)])
            for reference in done:
                if reference in self._starting:
                    self._started_again(reference)
                    continue
                part, actor, _ = busy[reference]
                try:
                    result = self._ray.get(reference)
                except self._died as error:
                    guilty, *others = self._lost(actor, busy)
                    said = CRASH, str(error).splitlines()[0]
                    waiting.extendleft([*others, *guilty.again(self._retries, *said)])
                    continue
                except self._ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                del busy[reference]
                found = parts[part.number]
                found.append((part.begin, result))
                begin, end = ranges[part.number]
                if sum(_records(each) for _, each in found) == end - begin:
                    yield part.number, _joined(parts.pop(part.number))

    @property
    def _died(self) -> tuple[type[Exception], ...]:
        known = self._ray.exceptions
        return known.RayActorError, known.OutOfMemoryError

    def _lost(
        self, actor: int, busy: dict[Any, tuple["_Part", int, float]]
    ) -> list["_Part"]:
        """What a worker held that died: the part it was at, and those behind it."""
        self._starting[self._actors[actor].call.remote("memory")] = actor
        held = [call for call, (_, other, _) in busy.items() if other == actor]
        return [busy.pop(call)[0] for call in held]

    def _started_again(self, call: Any) -> None:
        """A worker that died is there again, or will not be."""
        actor = self._starting.pop(call)
        try:
            self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            self._give_up(actor, error)

    def _give_up(self, actor: int, error: Exception) -> None:
        self._ray.kill(self._actors.pop(actor))
        said = str(error).splitlines()[0]
        left = len(self._actors)
        self._say(f"worker {actor} is given up, workers left: {left}; {said}")
        if not self._actors:
            raise RuntimeError(f"no worker is left: {said}") from error

    def _idle(
        self, busy: Mapping[Any, tuple["_Part", int, float]], part: "_Part"
    ) -> int | None:
        """A worker for a part. A suspected one has it alone: no other may suffer."""
        ready = self._actors.keys() - self._starting.values()
        work: dict[int, list[_Part]] = {n: [] for n in sorted(ready)}
        for other, actor, _ in busy.values():
            work[actor].append(other)
        for actor in sorted(work, key=lambda n: len(work[n])):
            held = work[actor]
            if not held or (
                len(held) < _AHEAD and not part.suspect and not held[0].suspect
            ):
                return actor
        return None

    def close(self) -> None:
        """Ends the workers, and the cluster if it was started for them."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()

    def _all(self, method: str) -> list[Any]:
        """Asks all workers; one that does not start is given up."""
        calls = {n: actor.call.remote(method) for n, actor in self._actors.items()}
        waiting = [*calls.values()]
        while waiting:
            _, waiting = self._ray.wait(
                waiting, num_returns=len(waiting), timeout=_POLL
            )
            self._stop.check()
        found = []
        for actor, call in calls.items():
            try:
                found.append(self._ray.get(call))
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except self._died as error:
                self._give_up(actor, error)
        return found

    def _late(self, busy: Mapping[Any, tuple["_Part", int, float]]) -> list[Any]:
        # One call runs at a time; the next one has waited for it.
        now, limit = time.monotonic(), _AHEAD * self._deadline
        return [ref for ref, (_, _, since) in busy.items() if now - since > limit][:1]


class _Remote:
    """A worker in an actor; what is wrong with its job is said by the first call."""

    def __init__(self, packed: bytes, known: Mapping[str, Any]):
        configure(known)
        # Only now, for it may hold arrays, and those a device.
        self._job: Job = pickle.loads(packed)
        self._worker: Worker | None = None

    def call(self, method: str, *args: Any) -> Any:
        if self._worker is None:
            self._worker = Worker(self._job)
        return getattr(self._worker, method)(*args)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A shard, or a range of one whose worker did not survive it."""

    number: int
    begin: int
    end: int
    suspect: bool = False
    refused: tuple[str, ...] | None = None
    tries: int = 0

    @property
    def method(self) -> str:
        return "compute" if self.refused is None else "refuse"

    @property
    def arguments(self) -> tuple[Any, ...]:
        if self.refused is None:
            return self.begin, self.end
        return self.begin, *self.refused

    def again(self, retries: int, reason: str, message: str) -> list["_Part"]:
        """The same, a few times; then what is smaller."""
        if self.tries < retries:
            return [dataclasses.replace(self, tries=self.tries + 1)]
        return dataclasses.replace(self, tries=0).smaller(reason, message)

    def smaller(self, reason: str, message: str) -> list["_Part"]:
        """Its halves; or a single record, set aside."""
        if self.refused is not None:
            if len(self.refused) > 2:
                raise RuntimeError(f"workers do not start any more: {message}")
            # Not even its name can be read: it is called by its number.
            named = (*self.refused, str(self.begin))
            return [dataclasses.replace(self, refused=named)]
        if self.end - self.begin == 1 and self.suspect:
            return [dataclasses.replace(self, refused=(reason, message))]
        if self.end - self.begin == 1:
            return [dataclasses.replace(self, suspect=True)]
        middle = (self.begin + self.end) // 2
        return [
            dataclasses.replace(self, begin=middle, suspect=True),
            dataclasses.replace(self, end=middle, suspect=True),
        ]


def _records(result: Result) -> int:
    return len(result.explained) + len(result.quarantined)


def _joined(parts: list[tuple[int, Result]]) -> Result:
    first, *others = [result for _, result in sorted(parts, key=lambda part: part[0])]
    for other in others:
        first = first.joined(other)
    return first
