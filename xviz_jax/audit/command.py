"""The command `xviz-jax audit`: arguments and a file become a call of `run`."""

import dataclasses
import inspect
import json
import os
import sys
import threading
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from xviz_jax.audit.estimate import estimate
from xviz_jax.audit.job import Job
from xviz_jax.audit.lock import Busy
from xviz_jax.audit.progress import Progress
from xviz_jax.audit.ray import Ray
from xviz_jax.audit.run import run
from xviz_jax.audit.sources import Buckets
from xviz_jax.audit.stopping import EXIT, Preempted, Stop, listening
from xviz_jax.audit.worker import Unusable
from xviz_jax.escape import terminal

_CODES = {"complete": 0, "too_many_bad": 3, "preempted": EXIT}
_DONE, _FAULT, _BAD_CALL, _TOO_MANY_BAD = 0, 1, 2, 3
# Seconds between lines where nobody watches.
_EVERY = 30.0


def main(given: Mapping[str, Any]) -> int:
    """Runs an audit as the command line asks.

    Args:
      given: Arguments by name; None for those that were not given.

    Returns:
      The exit code: 0 done, 1 a fault, 2 a bad call, 3 too many bad records, 143
      ended early and resumable.
    """
    console = Console()
    try:
        options = settings(given)
        if options.pop("dry_run", False):
            names = {field.name for field in dataclasses.fields(Job)}
            job = Job(**{k: v for k, v in options.items() if k in names})
            console.print(Text(str(estimate(job))))
            return _DONE
        stop = Stop()
        with listening(stop, to_the_end=True), _Line(console) as line:
            out = options.pop("out")
            summary = run(out, **options, progress=line.show, stop=stop)
    except Unusable as error:
        return _failed(error, _TOO_MANY_BAD)
    except (ValueError, ImportError) as error:
        return _failed(error, _BAD_CALL)
    except Preempted as error:
        return _failed(error, EXIT)
    except (Busy, OSError, RuntimeError) as error:
        return _failed(error, _FAULT)
    console.print(
        Text(
            f"{summary.state}: {summary.explained:,} of {summary.records:,} records "
            f"explained, {summary.unconverged:,} of them unconverged, "
            f"{summary.quarantined:,} quarantined"
            f"{f' {summary.reasons}' if summary.reasons else ''}; "
            f"{summary.computed} of {summary.shards} shards in {summary.seconds:,.1f} s"
        ),
        soft_wrap=True,
    )
    ids = [f"{count} ids {what}" for what, count in summary.ids.items() if count]
    for note in (summary.why, *ids, *summary.notes):
        if note:
            _tell(note)
    if summary.bitwise is False:
        _tell("rows are not reproducible to the bit")
    code = _CODES[summary.state]
    if summary.hung:
        # A thread that never comes back would keep the process alive.
        sys.stdout.flush()
        os._exit(code)
    return code


def _failed(error: BaseException, code: int) -> int:
    _tell(str(error))
    return code


def _tell(text: str) -> None:
    """Says what may quote the data."""
    print(f"xviz-jax audit: {terminal(text)}", file=sys.stderr)


def settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of `run`, from a file and from what is given over it.

    Args:
      given: Arguments by name, as texts where the command line has texts.

    Raises:
      ValueError: If a name is unknown, a value malformed, or something is missing.
    """
    said = {k: v for k, v in given.items() if v is not None}
    options = _read(said.pop("config", None))
    extra = said.pop("options", [])
    options |= said
    methods = options.get("methods")
    if isinstance(methods, str):
        methods = methods.split(",")
    if isinstance(methods, Sequence):
        methods = {name: {} for name in methods}
    if methods is not None or extra:
        options["methods"] = _with_options(methods or {}, extra)
    if isinstance(options.get("columns"), str):
        options["columns"] = options["columns"].split(",")
    options["target"] = _target(options.get("target"))
    options["microbatch"] = _microbatch(options.get("microbatch"))
    if isinstance(options.get("buckets"), str | Sequence):
        options["buckets"] = _buckets(options["buckets"])
    if isinstance(options.get("ray"), Mapping):
        options["ray"] = _checked(Ray, options["ray"], "ray")
    known = {*inspect.signature(run).parameters, "dry_run"} - {"progress", "stop"}
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"settings are {sorted(known)}, got {unknown}")
    needed = ["data"] if options.get("dry_run") else ["data", "out"]
    if missing := [f"--{name}" for name in needed if options.get(name) is None]:
        raise ValueError(f"pass {' and '.join(missing)}")
    return {name: value for name, value in options.items() if value is not None}


def _read(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is no TOML file: {error}") from error


def _checked(kind: Any, said: Mapping[str, Any], name: str) -> Any:
    known = [field.name for field in dataclasses.fields(kind)]
    if unknown := sorted(said.keys() - set(known)):
        raise ValueError(f"`{name}` has {known}, got {unknown}")
    return kind(**said)


def _with_options(
    methods: Mapping[str, Mapping[str, Any]], extra: Sequence[str]
) -> dict[str, dict[str, Any]]:
    found = {name: dict(options) for name, options in methods.items()}
    for each in extra:
        place, given, value = each.partition("=")
        method, dot, name = place.partition(".")
        if not given or not dot or method not in found:
            raise ValueError(
                f"`--option` is METHOD.NAME=VALUE of one of {list(found)}, got {each!r}"
            )
        try:
            found[method][name] = json.loads(value)
        except ValueError:
            found[method][name] = value
    return found


def _target(said: Any) -> Any:
    if isinstance(said, list):
        return tuple(said)
    if not isinstance(said, str):
        return said
    parts = said.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        return said
    first, *others = [int(part) for part in parts]
    return (first, *others) if others else first


def _microbatch(said: Any) -> int | None:
    if said in (None, "auto"):
        return None
    try:
        return int(said)
    except ValueError:
        raise ValueError(
            f"`microbatch` is auto or a positive integer, got {said!r}"
        ) from None


def _buckets(said: str | Sequence[int]) -> Buckets:
    try:
        lengths = said.split(",") if isinstance(said, str) else said
        return Buckets(column="tokens", lengths=tuple(int(each) for each in lengths))
    except ValueError as error:
        raise ValueError(f"`buckets` are lengths such as 64,128: {error}") from error


class _Line:
    """How far a run is: a line that changes, or now and then one more."""

    def __init__(self, console: Console):
        self._console, self._last = console, -_EVERY
        self._lock = threading.Lock()
        self._live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> "_Line":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, progress: Progress) -> None:
        """Called from any thread."""
        with self._lock:
            if self._console.is_terminal:
                self._live.update(Text(str(progress)))
                return
            now = time.monotonic()
            if now - self._last >= _EVERY:
                self._last = now
                self._console.print(Text(str(progress)), soft_wrap=True)
