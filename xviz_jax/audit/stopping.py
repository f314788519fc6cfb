"""Signals that ask for an end: finish what is under way, keep what is done."""

import atexit
import contextlib
import os
import signal
import threading
from collections.abc import Iterator

# What a shell reports of a process that SIGTERM ended; a resumable audit.
EXIT = 143
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(Exception):
    """The run was asked to end. What is committed stays, and it can be resumed."""


class Stop:
    """Whether someone asked for an end."""

    def __init__(self) -> None:
        """Nobody has."""
        self._event = threading.Event()

    def ask(self) -> None:
        """Asks."""
        self._event.set()

    @property
    def asked(self) -> bool:
        """Whether someone did."""
        return self._event.is_set()

    def check(self) -> None:
        """Called between microbatches.

        Raises:
          Preempted: If someone asked.
        """
        if self.asked:
            raise Preempted("asked to end; run the same command again to go on")


@contextlib.contextmanager
def listening(stop: Stop, *, to_the_end: bool = False) -> Iterator[None]:
    """Lets SIGTERM and SIGINT ask; a second one ends the process at once.

    Signals reach the main thread only: elsewhere, whoever holds `stop` asks.

    Args:
      stop: What is asked.
      to_the_end: Whether, once someone asked, a signal still does so afterwards, while
        the process ends by itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: object) -> None:
        del number, frame
        if stop.asked:
            os._exit(EXIT)
        stop.ask()

    before = [signal.signal(each, ask) for each in _SIGNALS]
    try:
        yield
    finally:
        if to_the_end and stop.asked:
            # The interpreter takes handlers back before its last steps.
            atexit.register(_ignore)
        else:
            for each, handler in zip(_SIGNALS, before, strict=True):
                signal.signal(each, handler)


def _ignore() -> None:
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
