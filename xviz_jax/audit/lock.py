"""One runner for one output folder.

The kernel holds the lock and gives it back when the process ends, however it ends: a
lock is never stale, no clock is asked, and no process number is mistaken for another.
A stopped process still holds it.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

NAME = "lock"
_POLL = 0.2


class Busy(RuntimeError):
    """Another runner writes into the folder."""


@contextlib.contextmanager
def held(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Holds a folder's lock.

    Args:
      folder: What is locked, by the file `lock` inside.
      wait: Seconds to wait for another runner to end.

    Raises:
      Busy: If another one still runs, saying which.
      OSError: If the file system knows no locks.
    """
    until = time.monotonic() + wait
    with (folder / NAME).open("a+") as file:
        while not _take(file.fileno()):
            if time.monotonic() >= until:
                file.seek(0)
                raise Busy(
                    f"{folder} is being written by another runner: {file.read(500)}"
                )
            time.sleep(_POLL)
        file.truncate(0)
        # For people; the lock itself does not depend on it.
        json.dump({"host": platform.node(), "process": os.getpid()}, file)
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _take(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True
