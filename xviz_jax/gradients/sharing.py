"""Runs a program and computes what it computes twice only once.

Value numbering (Cocke and Schwartz, 1970): two equations of the same primitive,
parameters and operands have the same result, so the second one is not emitted.
Calls are opened first, for the same operations lie in different calls when a model
is run for its output and when it is run for its gradient. Loops and branches are
compared whole.
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np

from xviz_jax.tracing import compat

_CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call")
_JAXPRS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def shared(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with nothing in it computed twice.

    Args:
      function: Any JAX function of arrays and pytrees of arrays.

    >>> import jax.numpy as jnp
    >>> twice = lambda x: (jnp.sin(x) + 1, jnp.sin(x) + 2)
    >>> str(jax.make_jaxpr(shared(twice))(1.0)).count("sin")
    1
    """

    def once(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        numbering = _Numbering()
        ins = [numbering.value(leaf) for leaf in jax.tree.leaves(args)]
        outs = numbering.run(closed, ins)
        values = [numbering.values[number] for number in outs]
        return jax.tree.unflatten(jax.tree.structure(shape), values)

    return once


class _Numbering:
    """Values by number; equal numbers, equal values."""

    def __init__(self):
        self.values: list[Any] = []
        self.known: dict[Hashable, list[int]] = {}

    def value(self, value: Any, key: Hashable = None) -> int:
        """The number of a value from outside the program."""
        key = ("value", id(value)) if key is None else key
        if key not in self.known:
            self.known[key] = [len(self.values)]
            self.values.append(value)
        return self.known[key][0]

    def run(self, closed: Any, ins: list[int]) -> list[int]:
        """Emits a program; numbers in, numbers out."""
        jaxpr = compat.open_jaxpr(closed)
        number = dict(zip(jaxpr.invars, ins, strict=True))
        for var, const in zip(jaxpr.constvars, compat.consts(closed), strict=True):
            number[var] = self.value(const, _content(const))

        def of(atom: Any) -> int:
            if isinstance(atom, compat.Literal):
                return self.value(
                    atom.val, ("literal", str(atom.aval), _bits(atom.val))
                )
            return number[atom]

        for eqn in jaxpr.eqns:
            outs = self._equation(eqn, [of(atom) for atom in eqn.invars])
            number.update(zip(eqn.outvars, outs, strict=True))
        return [of(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, ins: list[int]) -> list[int]:
        inner = _opened(eqn)
        if inner is not None:
            return self.run(inner, ins)
        key = (eqn.primitive, _frozen(eqn.params), tuple(ins))
        if eqn.effects or key not in self.known:
            values = compat.bind(eqn, [self.values[number] for number in ins])
            first = len(self.values)
            self.values.extend(values)
            self.known[key] = list(range(first, first + len(values)))
        return self.known[key]


def _opened(eqn: Any) -> Any:
    """The program that a plain call runs; None for anything else."""
    if eqn.primitive.name not in _CALLS:
        return None
    shardings = (
        *eqn.params.get("in_shardings", ()),
        *eqn.params.get("out_shardings", ()),
    )
    if any(isinstance(each, jax.sharding.Sharding) for each in shardings):
        return None
    for name in _JAXPRS:
        if name in eqn.params:
            return eqn.params[name]
    return None


def _frozen(value: Any) -> Hashable:
    """A parameter as something that is equal where it means the same."""
    if compat.is_jaxpr(value):
        return _structure(value)
    if isinstance(value, dict):
        return tuple((name, _frozen(value[name])) for name in sorted(value))
    if isinstance(value, list | tuple):
        return (type(value).__name__, *map(_frozen, value))
    if isinstance(value, np.ndarray):
        return _content(value)
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def _structure(closed: Any) -> Hashable:
    """A jaxpr without the names of its variables."""
    jaxpr = compat.open_jaxpr(closed)
    number: dict[Any, int] = {}

    def define(var: Any) -> tuple[int, str]:
        number[var] = len(number)
        return number[var], str(var.aval)

    def of(atom: Any) -> Hashable:
        if isinstance(atom, compat.Literal):
            return "literal", str(atom.aval), _bits(atom.val)
        return number[atom]

    constants = tuple(map(_content, compat.consts(closed)))
    ins = tuple(map(define, (*jaxpr.constvars, *jaxpr.invars)))
    equations = tuple(
        (
            eqn.primitive,
            _frozen(_opened(eqn) or eqn.params),
            tuple(map(of, eqn.invars)),
            tuple(map(define, eqn.outvars)),
        )
        for eqn in jaxpr.eqns
    )
    return constants, ins, equations, tuple(map(of, jaxpr.outvars))


def _bits(value: Any) -> Hashable:
    return np.asarray(value).tobytes()


def _content(value: Any) -> Hashable:
    """Arrays of numpy by what they hold; others by what they are."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        return "array", value.shape, str(value.dtype), value.tobytes()
    return "value", id(value)
