"""A worker in a process of its own, for records that kill or hang the process.

A range that the process does not survive is halved until the record is found, which
is then set aside. The process is started again each time.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from typing import Any

from xviz_jax.audit.job import Job, configure, settings
from xviz_jax.audit.shard import Result
from xviz_jax.audit.worker import Worker

_POLL = 0.1
# Seconds for a process to be gone that has closed its pipe.
_LAST = 10.0
# Seconds for a process to start, and to compile.
_PATIENCE = 120.0
# Records at the beginning of the data that a first look goes round.
_FARTHEST = 1000
CRASH, TIMEOUT = "CRASH", "TIMEOUT"


class Lost(RuntimeError):
    """The process ended, or did not answer in time.

    Attributes:
      reason: `CRASH` or `TIMEOUT`.
    """

    def __init__(self, reason: str, message: str):
        """Says which."""
        super().__init__(message)
        self.reason = reason


class Isolated:
    """A `Worker` elsewhere: the same answers, and this process survives it."""

    def __init__(self, job: Job, *, check: Callable[[], Any] = lambda: None):
        """Nothing is started yet.

        Args:
          job: What the worker is told; it is pickled.
          check: Called while waiting; what it raises ends the process.
        """
        self._job, self._check = job, check
        self._process: Any = None
        self._pipe: Any = None
        self._avoid = 0

    def describe(self, deadline: float | None = None) -> dict[str, Any]:
        """As the worker's; a first record that ends the process is not looked at."""
        while True:
            try:
                return self.call("describe", deadline=deadline)
            except Lost:
                if self._avoid > _FARTHEST:
                    raise
                self._avoid = 2 * self._avoid + 1

    def call(self, name: str, *args: Any, deadline: float | None = None) -> Any:
        """Calls a method of the worker.

        Args:
          name: Of the method.
          *args: Its arguments.
          deadline: Seconds after which the process is ended.

        Raises:
          Lost: If the process does not answer.
          Exception: What the method raised.
        """
        try:
            if self._process is None:
                self._start()
            self._pipe.send((name, args))
            failed, answer = self._answer(deadline)
        except (EOFError, OSError, Lost) as error:
            raise self._lost(error) from error
        except BaseException:
            self.close()
            raise
        if failed:
            raise answer
        return answer

    def _answer(self, deadline: float | None) -> tuple[bool, Any]:
        begin = time.monotonic()
        while not self._pipe.poll(_POLL):
            self._check()
            if deadline is not None and time.monotonic() - begin > deadline:
                raise Lost(TIMEOUT, f"no answer in {deadline:g} s")
        return self._pipe.recv()

    def compute(self, begin: int, end: int, deadline: float | None = None) -> Result:
        """Explains a range; records that end the process are set aside."""
        if self._process is None:
            # To compile is not the records' fault.
            started = None if deadline is None else deadline + _PATIENCE
            self.call("memory", deadline=started)
        try:
            return self.call("compute", begin, end, deadline=deadline)
        except Lost as lost:
            if end - begin == 1:
                return self._refuse(begin, lost, deadline)
            middle = (begin + end) // 2
            first = self.compute(begin, middle, deadline)
            return first.joined(self.compute(middle, end, deadline))

    def _refuse(self, index: int, lost: Lost, deadline: float | None) -> Result:
        said = index, lost.reason, str(lost)
        patience = _PATIENCE + (deadline or 0.0)
        with contextlib.suppress(Lost):
            return self.call("refuse", *said, deadline=patience)
        # Not even its name can be read: it is called by its number.
        return self.call("refuse", *said, str(index), deadline=patience)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, pickle.dumps(self._job), settings(), self._avoid),
            daemon=True,
        )
        self._process.start()
        theirs.close()
        try:
            self._answer(_PATIENCE)
        except (EOFError, Lost) as error:
            raise RuntimeError(f"no process could be started: {error}") from error

    def _lost(self, error: Exception) -> Lost:
        self._process.join(timeout=_LAST)
        code = self._process.exitcode
        self.close()
        if isinstance(error, Lost):
            return error
        return Lost(CRASH, f"the process ended with exit code {code}")


def _serve(pipe: Any, packed: bytes, config: dict[str, Any], avoid: int) -> None:
    # A signal to the group is the parent's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # On a GPU the parent may hold memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    configure(config)
    # Only now, for it may hold arrays, and those a device.
    job: Job = pickle.loads(packed)
    worker = None
    pipe.send((False, None))
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            name, args = pipe.recv()
            try:
                worker = Worker(job, avoid=avoid) if worker is None else worker
                answer = (False, getattr(worker, name)(*args))
            except Exception as error:
                answer = (True, _portable(error))
            pipe.send(answer)


def _portable(error: Exception) -> Exception:
    """An error that another process can read."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
