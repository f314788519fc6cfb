"""The methods by name, for whoever is given names."""

import inspect
from collections.abc import Callable

import xviz_jax as xv


def methods() -> dict[str, Callable]:
    """The methods by name: functions whose one positional argument is a model."""
    found = {}
    for name in dir(xv):
        value = getattr(xv, name)
        if not name.startswith("_") and inspect.isfunction(value):
            first, *rest = inspect.signature(value).parameters.values()
            if first.name == "model" and all(p.kind == p.KEYWORD_ONLY for p in rest):
                found[name] = value
    return found
