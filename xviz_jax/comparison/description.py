"""What a method was made with, as far as it can be read off what was made."""

import dataclasses
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_DEPTH = 5
# Of longer arrays only the form is told.
_SHOWN = 16


def described(value: Any, depth: int = _DEPTH) -> Any:
    """A method's name and options, for JSON.

    A function is what it is called and what it closes over, an object what its fields
    hold, an array its numbers, or its form if they are many. The model is left out.

    Args:
      value: What a method returned, or any option.
      depth: How far into options of options.

    >>> from xviz_jax.attention import raw_attention
    >>> described(raw_attention(lambda x: x, layer=2))["layer"]
    2
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _array(value)
    if isinstance(value, partial):
        named = {"of": value.func, **dict(enumerate(value.args)), **value.keywords}
        return _all(named, depth)
    if callable(value):
        value = inspect.unwrap(value)
    if inspect.isfunction(value):
        return _all({"of": _name(value), **_closed_over(value)}, depth)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            each.name: getattr(value, each.name) for each in dataclasses.fields(value)
        }
        return _all({"of": _name(type(value)), **fields}, depth)
    if isinstance(value, Mapping):
        return _all(value, depth)
    if isinstance(value, list | tuple | range):
        many = _all(dict(enumerate(value)), depth)
        return list(many.values()) if isinstance(many, dict) else many
    return _name(value if isinstance(value, type) else type(value))


def _all(named: Mapping[Any, Any], depth: int) -> Any:
    """Each of several values; what they are of alone, where it goes too deep."""
    named = {str(key): each for key, each in named.items() if key != "model"}
    if len(named) == 1 and isinstance(named.get("of"), str):
        return named["of"]
    if depth == 0:
        return named.get("of", "...") if isinstance(named.get("of"), str) else "..."
    return {key: described(each, depth - 1) for key, each in named.items()}


def _name(value: Any) -> str:
    """What a function or a class is called; of an inner function, its maker."""
    return value.__qualname__.partition(".<locals>")[0].lstrip("_")


def _closed_over(function: Any) -> dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    found = {}
    for name, cell in cells:
        try:
            found[name] = cell.cell_contents
        except ValueError:  # Not bound yet.
            continue
    return found


def _array(value: Any) -> Any:
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    if value.size > _SHOWN:
        return f"{value.dtype}{list(value.shape)}"
    return np.asarray(
        value, np.float64 if value.dtype == jnp.bfloat16 else None
    ).tolist()
