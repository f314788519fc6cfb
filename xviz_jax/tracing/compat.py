"""Everything that differs between JAX versions, in one place.

Only public names, `jax.extend.core` and the attributes every jaxpr has. Facts
behind each branch: JAX 0.9.2 made `get_bind_params` return one dict; newer
releases merge `Jaxpr` and `ClosedJaxpr` and describe the operands of a scan by
`ft_in`; `shard_map` renamed its manual axes in 0.10.
"""

import contextlib
import inspect
import math
from typing import Any

import jax
from jax.extend import core as extend_core

try:
    from jax.extend import source_info_util
except ImportError:
    source_info_util = None

Literal = extend_core.Literal
Tracer = jax.core.Tracer  # pyright: ignore[reportAttributeAccessIssue]
evaluate_jaxpr = extend_core.jaxpr_as_fun

_SCAN_PARAMETERS = frozenset(inspect.signature(jax.lax.scan).parameters)


def open_jaxpr(jaxpr: Any) -> Any:
    """The object that has `eqns`, `invars` and `outvars`."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def consts(jaxpr: Any) -> list[Any]:
    """The constants a closed jaxpr carries."""
    return list(getattr(jaxpr, "consts", ()))


def is_jaxpr(value: Any) -> bool:
    """Whether `value` is a jaxpr, open or closed."""
    inner = open_jaxpr(value)
    return hasattr(inner, "eqns") and hasattr(inner, "invars")


def source_context(eqn: Any) -> contextlib.AbstractContextManager:
    """Keeps the user's name scopes and tracebacks on what is emitted inside."""
    if source_info_util is None:
        return contextlib.nullcontext()
    source = eqn.source_info
    stack = source_info_util.current_name_stack() + source.name_stack
    return source_info_util.user_context(source.traceback, name_stack=stack)


def bind(eqn: Any, values: list[Any]) -> list[Any]:
    """Emits `eqn` again on other operands."""
    parameters = eqn.primitive.get_bind_params(eqn.params)
    with source_context(eqn):
        if isinstance(parameters, tuple):
            functions, parameters = parameters
            out = eqn.primitive.bind(*functions, *values, **parameters)
        else:
            out = eqn.primitive.bind(*values, **parameters)
    return list(out) if eqn.primitive.multiple_results else [out]


def scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants and how many are carried."""
    if "ft_in" in params:
        constants, carried, _ = params["ft_in"].unpack()
        return len(constants), len(carried)
    return params["num_consts"], params["num_carry"]


def scan_options(params: dict[str, Any]) -> dict[str, Any]:
    """Keywords that make `jax.lax.scan` emit the same loop."""
    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    if params.get("_split_transpose") and "_split_transpose" in _SCAN_PARAMETERS:
        options["_split_transpose"] = True
    return options


def manual_axes(params: dict[str, Any]) -> tuple[str, ...]:
    """Mesh axes over which a `shard_map` body is written by hand, in mesh order."""
    renamed = "newly_manual_axes" in params
    axes = params["newly_manual_axes" if renamed else "manual_axes"]
    return tuple(axis for axis in params["mesh"].axis_names if axis in axes)


def shard_count(params: dict[str, Any]) -> int:
    """How many shards the body of a `shard_map` runs on."""
    return math.prod(params["mesh"].shape[axis] for axis in manual_axes(params))


def name_stack(eqn: Any) -> str:
    """The name scopes an equation was written in, joined by slashes."""
    return str(eqn.source_info.name_stack)
