"""Which weights a model has, and whether they are numbers."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax.audit.model import Model
from xviz_jax.tracing import compat

# Where an object lies in memory, in the text of a traced program.
_ADDRESS = re.compile("0x[0-9a-f]+")


def hashed(model: Model, args: Sequence[Any], *, allow_nonfinite: bool = False) -> str:
    """A hash of the weights, those that the function holds included.

    Args:
      model: The model.
      args: Shapes of its arguments.
      allow_nonfinite: Take arrays that hold NaN or infinity. Of those that the
        function holds -inf is always taken: masks of attention are of it.

    Raises:
      ValueError: If a weight is not finite; or if two traces of the function differ:
        it draws random numbers, or is not in inference mode.
    """
    leaves = jax.tree_util.tree_flatten_with_path(model.parameters)[0]
    if not (allow_nonfinite or model.checked):
        _refuse(
            (f"parameters{jax.tree_util.keystr(path)}", ~np.isfinite(leaf))
            for path, leaf in _floats(leaves)
        )
    if model.fingerprint:
        return model.fingerprint

    def traced() -> tuple[str, list[Any]]:
        # Not the same function object, whose trace JAX would remember.
        jaxpr = jax.make_jaxpr(lambda p, *rest: model.forward(p, *rest))(
            model.parameters, *args
        )
        return _ADDRESS.sub("", str(jaxpr)), _constants(jaxpr)

    program, held = traced()
    if not allow_nonfinite:
        _refuse(
            (f"array {number} that it holds", ~(np.isfinite(leaf) | (leaf == -np.inf)))
            for number, leaf in _floats(enumerate(held))
        )
    first = _digest(program, held)
    if first != _digest(*traced()):
        raise ValueError(
            "two traces of the model differ: it draws random numbers while it is "
            "traced; an audited model is deterministic, with dropout switched off"
        )
    return _digest(first, [leaf for _, leaf in leaves])


def _floats(named: Iterable[tuple[Any, Any]]) -> Iterable[tuple[Any, np.ndarray]]:
    for name, leaf in named:
        stored = np.asarray(leaf)
        if jnp.issubdtype(stored.dtype, jnp.inexact):
            yield name, stored


def _refuse(found: Iterable[tuple[str, np.ndarray]]) -> None:
    """Refuses weights of which some are bad, by name."""
    for name, bad in found:
        if bad.any():
            raise ValueError(
                f"the model has weights that are not finite: {name} "
                f"{list(bad.shape)}, {bad.sum()} of {bad.size} numbers; pass "
                "`allow_nonfinite` to explain it nevertheless"
            )


def _constants(jaxpr: Any) -> list[Any]:
    """Arrays that a function closes over, those of functions inside included."""
    found = compat.consts(jaxpr)
    for equation in compat.open_jaxpr(jaxpr).eqns:
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=compat.is_jaxpr
        ):
            if compat.is_jaxpr(value):
                found += _constants(value)
    return found


def _digest(program: str, arrays: Sequence[Any]) -> str:
    found = hashlib.sha256(program.encode())
    for each in arrays:
        stored = np.asarray(each)
        found.update(f"{stored.dtype}{list(stored.shape)}".encode())
        found.update(np.ascontiguousarray(stored).view(np.uint8).data)
    return found.hexdigest()
