"""Places where a test makes the process die, stop or fail.

`XVIZ_FAILPOINT=before_rename` kills the process there; `after_tmp@3:full` makes the
third write run out of space. Several are separated by commas. Without the variable,
which no user sets, a place costs one look-up.
"""

import errno
import os
import signal

VARIABLE = "XVIZ_FAILPOINT"

_seen: dict[str, int] = {}


def reach(name: str) -> None:
    """Does what the environment wants to happen at this place.

    Raises:
      OSError: If the environment wants it.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    _seen[name] = _seen.get(name, 0) + 1
    for each in wanted.split(","):
        place, _, action = each.partition(":")
        place, _, number = place.partition("@")
        if place == name and (not number or int(number) == _seen[name]):
            _act(action or "kill", name)


def _act(action: str, name: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action in ("full", "eio"):
        number = errno.ENOSPC if action == "full" else errno.EIO
        raise OSError(number, f"{os.strerror(number)} (failpoint)", name)
    else:
        raise ValueError(f"no such action at a failpoint: {action!r}")
