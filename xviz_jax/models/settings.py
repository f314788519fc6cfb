"""Read `config.json` of a published checkpoint, and refuse what is not implemented."""

from collections.abc import Collection, Mapping
from typing import Any

from xviz_jax.models.layers import ACTIVATIONS


def integer(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer.

    Args:
      raw: As the file has it.
      key: Which setting.
      default: What the published code takes where the file is silent; None if it
        must not be.

    Raises:
      ValueError: If it is missing or anything else.
    """
    value = default if raw.get(key) is None else raw[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{key}` in config.json is a positive integer, got {value!r}")
    return value


def number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number; as `integer`."""
    value = default if raw.get(key) is None else raw[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"`{key}` in config.json is a positive number, got {value!r}")
    return value


def choice(raw: Mapping[str, Any], key: str, known: Collection, default: Any) -> Any:
    """One of several values, or the default.

    Raises:
      ValueError: If it is none of them.
    """
    value = default if raw.get(key) is None else raw[key]
    if value not in known:
        raise ValueError(
            f"`{key}` in config.json is {value!r}; read are {sorted(known, key=str)}"
        )
    return value


def flag(raw: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false; as `choice`."""
    return choice(raw, key, (True, False), default)


def activation(raw: Mapping[str, Any], key: str, default: str) -> str:
    """The name of an activation; as `choice`."""
    return choice(raw, key, ACTIVATIONS, default)


def architecture(raw: Mapping[str, Any], known: Collection[str]) -> str:
    """The class that the checkpoint was saved from.

    Raises:
      ValueError: If it is not among those known.
    """
    named = raw.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or named[0] not in known:
        raise ValueError(
            f"`architectures` in config.json is {named!r}; read are {list(known)}"
        )
    return named[0]


def heads(raw: Mapping[str, Any], key: str, default: int, width: int) -> int:
    """How many heads share a width evenly.

    Raises:
      ValueError: If they do not.
    """
    count = integer(raw, key, default)
    if width % count:
        raise ValueError(
            f"`{key}` is {count}, which does not divide a width of {width}"
        )
    return count


def classes(raw: Mapping[str, Any]) -> int:
    """How many classes a head has; two where the file is silent, as published."""
    named = raw.get("id2label")
    return len(named) if named else integer(raw, "num_labels", 2)


def refuse(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuses variants that are not implemented.

    Args:
      raw: As the file has it.
      settings: The only value that is implemented, by key.

    Raises:
      ValueError: If the file asks for another.
    """
    for key, only in settings.items():
        if raw.get(key) not in (None, only):
            raise ValueError(
                f"`{key}` in config.json is {raw[key]!r}; only {only!r} is read"
            )
