"""JSON and numbers from texts that are not trusted."""

import json
import re
from typing import Any, NoReturn

import numpy as np

from xviz_jax.audit.sources.record import BadRecord, Limits

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_OPENS, _CLOSES = b"[{", b"]}"


def parse(line: bytes, limits: Limits) -> Any:
    """One JSON value; nothing of it is taken silently for something else.

    Raises:
      BadRecord: If it is not UTF-8, not JSON, cut off, nested too deep, holds NaN or
        infinities, or names a field twice.
    """
    if _depth(line, limits.depth) > limits.depth:
        raise BadRecord("UNDECODABLE", f"brackets are nested above {limits.depth} deep")
    try:
        return json.loads(
            line.decode(), parse_constant=_constant, object_pairs_hook=_object
        )
    except UnicodeDecodeError as error:
        raise BadRecord("BAD_UTF8", f"byte {error.start}: {error.reason}") from None
    except json.JSONDecodeError as error:
        cut = error.pos >= len(error.doc.rstrip()) or "Unterminated" in error.msg
        reason = "TRUNCATED" if cut else "UNDECODABLE"
        raise BadRecord(reason, f"no JSON: {error}") from None
    except BadRecord:
        raise
    except (ValueError, RecursionError) as error:
        # Integers of too many digits.
        raise BadRecord("UNDECODABLE", f"no JSON: {error}") from None


def bracketed(text: str) -> bool:
    """Whether a text looks like a JSON array."""
    text = text.strip()
    return text[:1] == "[" and text[-1:] == "]"


def numbers(text: str, limits: Limits, single: bool) -> Any:
    """Numbers that a text holds: a JSON array, or separated by spaces.

    Args:
      text: `[1, 2]`, `1 2`, or one number.
      limits: For the JSON array.
      single: One number is itself, and no list of one.

    Raises:
      BadRecord: If it holds anything else.
    """
    text = text.strip()
    if text[:1] == "[":
        return parse(text.encode(), limits)
    parts = text.split()
    if not text.isascii() or "_" in text:
        raise BadRecord("UNDECODABLE", f"{text!r:.60} holds no numbers")
    found = _all(int, parts) or _all(float, parts)
    if parts and found is None:
        raise BadRecord("UNDECODABLE", f"{text!r:.60} holds no numbers")
    return found[0] if single and found and len(found) == 1 else found or []


def _all(kind: type, parts: list[str]) -> list[Any] | None:
    try:
        return [kind(part) for part in parts]
    except ValueError:
        return None


def _depth(line: bytes, limit: int) -> int:
    """How deep brackets are nested; 0 where they are too few to reach the limit."""
    if sum(line.count(byte) for byte in (b"[", b"{")) <= limit:
        return 0
    code = np.frombuffer(_STRING.sub(b"", line), np.uint8)
    up, down = np.isin(code, list(_OPENS)), np.isin(code, list(_CLOSES))
    return int(np.cumsum(up.astype(np.int64) - down).max(initial=0))


def _constant(name: str) -> NoReturn:
    raise BadRecord("NONFINITE_INPUT", f"{name} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise BadRecord("UNDECODABLE", "an object names a field twice")
    return found
