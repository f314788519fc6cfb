"""The methods by name, for whoever is given names."""

import inspect
from collections.abc import Callable

import xviz_jax as xv
from xviz_jax.attribution import Attribution


def methods() -> dict[str, Callable]:
    """The methods by name: functions whose one positional argument is a model."""
    found = {}
    # Not of `dir`, which lists what needs an extra too.
    for name, value in sorted(vars(xv).items()):
        if not name.startswith("_") and inspect.isfunction(value):
            signature = inspect.signature(value)
            first, *rest = signature.parameters.values()
            explains = signature.return_annotation == Callable[..., Attribution]
            options = all(p.kind == p.KEYWORD_ONLY for p in rest)
            if first.name == "model" and options and explains:
                found[name] = value
    return found
