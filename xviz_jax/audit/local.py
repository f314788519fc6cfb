"""The default engine: one process, all its devices, one shard after another.

While a shard is computed the next one is read, and the one before is committed. What
comes after a shard that hangs is computed in a process of its own.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from xviz_jax.audit.isolated import Isolated
from xviz_jax.audit.shard import Result
from xviz_jax.audit.state import Marks
from xviz_jax.audit.stopping import Preempted, Stop
from xviz_jax.audit.worker import Worker

_POLL = 0.1
Range = tuple[int, int]
# Of a signal that ends a run: how long microbatches under way are waited for.
GRACE = 25.0


class Background:
    """A call on a thread that does not keep the process alive."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        """Begins the call."""
        self._answer: Any = None
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._call = function, args
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        function, args = self._call
        try:
            self._answer = function(*args)
        except BaseException as error:
            self._error = error
        del function, args, self._call
        self._done.set()

    def wait(self, seconds: float) -> bool:
        """Whether it is done by then."""
        return self._done.wait(seconds)

    def answer(self) -> Any:
        """What it returned; waits for it, and raises what it raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._answer


class Local:
    """Computes shards in this process.

    Attributes:
      hung: Whether a thread of this process never came back.
    """

    def __init__(
        self,
        worker: Worker,
        isolated: Isolated,
        marks: Marks,
        *,
        deadline: float,
        stop: Stop,
        advance: Callable[[int], Any] = lambda count: None,
    ):
        """Nothing is computed yet.

        Args:
          worker: Computes.
          isolated: The same in a process of its own.
          marks: Remembers which shards were begun.
          deadline: Seconds for one shard.
          stop: Whether someone asked for an end.
          advance: Called with the number of rows of a method that were done.
        """
        self._worker, self._isolated, self._marks = worker, isolated, marks
        self._deadline, self._stop, self._advance = deadline, stop, advance
        self.hung = self._closed = False

    def results(self, ranges: Mapping[int, Range]) -> Iterator[tuple[int, Result]]:
        """The shards, in order.

        Args:
          ranges: The records of each shard: the first, and the one after the last.

        Raises:
          Preempted: If someone asked for an end.
        """
        numbers = sorted(ranges)
        following = [*numbers[1:], None]
        current = self._begin(numbers[0], ranges, self._read(numbers[0], ranges))
        number = numbers[0]
        try:
            for number, after in zip(numbers, following, strict=True):
                read = None if after is None else self._read(after, ranges)
                result = self._finish(current)
                if result is None:
                    self.hung = True
                    break
                # The next one is computed while the caller commits this one.
                if after is not None and read is not None:
                    current = self._begin(after, ranges, read)
                yield number, result
        finally:
            self._closed = True
            if not self.hung:
                current.wait(GRACE)
        if self.hung:
            left = {each: ranges[each] for each in numbers if each >= number}
            yield from apart(left, self._isolated, self._deadline)

    def _read(self, number: int, ranges: Mapping[int, Range]) -> Background:
        return Background(self._worker.read, *ranges[number])

    def _begin(
        self, number: int, ranges: Mapping[int, Range], read: Background
    ) -> Background:
        self._marks.begin(number)
        begin, end = ranges[number]

        def check(count: int) -> None:
            self._stop.check()
            if self._closed:
                raise Preempted("nobody waits for this shard")
            self._advance(count)

        return Background(
            lambda: self._worker.compute(begin, end, read.answer(), check)
        )

    def _finish(self, current: Background) -> Result | None:
        """The result; None if it does not come in time."""
        begin = time.monotonic()
        asked: float | None = None
        while not current.wait(_POLL):
            now = time.monotonic()
            if asked is None and self._stop.asked:
                asked = now
            if asked is not None and now - asked > GRACE:
                raise Preempted("asked to end; microbatches under way were left")
            if now - begin > self._deadline:
                return None
        return current.answer()


def apart(
    ranges: Mapping[int, Range], isolated: Isolated, deadline: float
) -> Iterator[tuple[int, Result]]:
    """Shards computed in a process of its own, which may die or hang."""
    for number in sorted(ranges):
        yield number, isolated.compute(*ranges[number], deadline)
