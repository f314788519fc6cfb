"""Files that are there whole or not at all."""

import contextlib
import errno
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from xviz_jax.audit import failpoints

# What passes by itself on a busy network file system.
_PASSING = (errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT)
_TRIES = 4
_TEMPORARY = ".tmp"


def write(path: Path, fill: Callable[[BinaryIO], object] | bytes) -> None:
    """Writes a file under another name, and gives it its own once it is on disk.

    Whoever looks sees the old file, or none, or the whole new one, also after a
    power failure. Errors that pass by themselves are tried again a few times.

    Args:
      path: The file.
      fill: Its bytes, or what writes them.

    Raises:
      OSError: If the disk is full, say. What was there stays.
    """
    for number in range(_TRIES):
        try:
            return _write(path, fill)
        except OSError as error:
            if error.errno not in _PASSING or number == _TRIES - 1:
                raise
            time.sleep(0.05 * 4**number * (1 + random.random()))


def _write(path: Path, fill: Callable[[BinaryIO], object] | bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with aside.open("wb") as file:
            if isinstance(fill, bytes):
                file.write(fill)
            else:
                fill(file)
            file.flush()
            failpoints.reach("after_tmp")
            os.fsync(file.fileno())
        failpoints.reach("after_fsync")
        failpoints.reach("before_rename")
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    failpoints.reach("after_rename")
    sync(path.parent)
    failpoints.reach("after_dir_fsync")


def sync(folder: Path) -> None:
    """Makes what was renamed in a folder, or taken out of it, last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> int:
    """Removes what writers that died have left; nobody else may be writing."""
    left = [*folder.glob(f".*{_TEMPORARY}")]
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)
