"""How much arithmetic a function does, with loops counted as often as they turn."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax.tracing import compat

# What moves numbers, or makes them of nothing, and computes none.
_MOVES = frozenset(
    """broadcast_in_dim concatenate convert_element_type copy dynamic_slice
    dynamic_update_slice expand_dims gather iota name pad reshape rev scatter select_n
    slice split squeeze stop_gradient transpose""".split()
)
# Work that no jaxpr shows.
_HIDDEN = frozenset(("ffi_call", "pallas_call", "pure_callback", "while"))
# Their bodies are computed again, and not shared with what surrounds them.
_APART = frozenset(("checkpoint", "remat", "remat2"))


def arithmetic(function: Callable, *args: Any) -> float:
    """The floating-point operations of one call, as a compiler would leave them.

    Multiplications and additions of matrix products and convolutions count apart;
    everything else counts one for each element that comes out, or goes into a sum. What
    is computed twice counts once, and what nobody reads not at all.

    Args:
      function: Any JAX function.
      *args: Its arguments; only their shapes matter.

    Returns:
      Their number; infinity where the function loops until the data say stop, or runs
      a kernel that tracing cannot see into.

    >>> arithmetic(lambda w, x: w @ x, jnp.ones((3, 4)), jnp.ones(4))
    24.0
    """
    jaxpr = jax.make_jaxpr(function)(*args)
    return _cost(jaxpr)


class _Graph:
    """Equations as nodes, the same ones once; nodes are the numbers of their values."""

    def __init__(self) -> None:
        self.known: dict[Any, int] = {}
        self.nodes: list[tuple[float, tuple[int, ...]]] = []

    def add(self, about: Any, inputs: Sequence[int], cost: float) -> int:
        """A node for what an equation computes; an old one if it is known."""
        identity = (about, *inputs)
        if identity not in self.known:
            self.known[identity] = len(self.nodes)
            self.nodes.append((cost, tuple(inputs)))
        return self.known[identity]

    def walk(self, jaxpr: Any, inputs: Sequence[int]) -> list[int]:
        """The nodes of a jaxpr's outputs."""
        inner = compat.open_jaxpr(jaxpr)
        values: dict[Any, int] = dict(zip(inner.invars, inputs, strict=True))

        def read(atom: Any) -> int:
            if isinstance(atom, compat.Literal):
                return self.add(("literal", str(atom.aval), str(atom.val)), (), 0.0)
            return values[atom]

        for var, const in zip(inner.constvars, compat.consts(jaxpr), strict=False):
            values[var] = self.add(("constant", id(const)), (), 0.0)
        for eqn in inner.eqns:
            given = [read(atom) for atom in eqn.invars]
            found = self._equation(eqn, given)
            values |= dict(zip(eqn.outvars, found, strict=True))
        return [read(atom) for atom in inner.outvars]

    def _equation(self, eqn: Any, given: Sequence[int]) -> list[int]:
        name = eqn.primitive.name
        inner = [each for each in _leaves(eqn.params) if compat.is_jaxpr(each)]
        calls = len(inner) == 1 and name not in _HIDDEN | _APART and name != "scan"
        if calls and len(compat.open_jaxpr(inner[0]).invars) == len(given):
            return self.walk(inner[0], given)
        if name in _HIDDEN:
            cost = math.inf
        elif name == "scan":
            cost = eqn.params["length"] * _cost(inner[0])
        elif inner:
            # Branches, of which one is taken.
            cost = max(map(_cost, inner))
        else:
            cost = _own(eqn)
        about = (name, str(eqn.params)) if not inner else (name, id(eqn))
        node = self.add(about, given, cost)
        return [
            self.add((node, place), (node,), 0.0) for place in range(len(eqn.outvars))
        ]

    def total(self, outputs: Sequence[int]) -> float:
        """What the outputs cost, and all that they need."""
        needed, left = set(), list(outputs)
        while left:
            node = left.pop()
            if node not in needed:
                needed.add(node)
                left += self.nodes[node][1]
        return sum((self.nodes[node][0] for node in needed), 0.0)


def _cost(jaxpr: Any) -> float:
    graph = _Graph()
    count = len(compat.open_jaxpr(jaxpr).invars)
    inputs = [graph.add(("input", place), (), 0.0) for place in range(count)]
    return graph.total(graph.walk(jaxpr, inputs))


def _own(eqn: Any) -> float:
    """The operations of an equation without a jaxpr of its own."""
    name = eqn.primitive.name
    if name in _MOVES or not eqn.outvars:
        return 0.0
    out = eqn.outvars[0].aval
    if not jnp.issubdtype(getattr(out, "dtype", jnp.int32), jnp.inexact):
        return 0.0
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        terms = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        return 2.0 * out.size * terms
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * out.size * kernel.size / features
    if name.startswith("reduce"):
        return float(eqn.invars[0].aval.size)
    return float(out.size)


def _leaves(params: dict[str, Any]) -> list[Any]:
    """Values of an equation's parameters, and what tuples of them hold."""
    found: list[Any] = []
    for value in params.values():
        found += value if isinstance(value, tuple | list) else [value]
    return found
