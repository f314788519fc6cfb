"""What can be seen inside a model, which methods will work, and what to do else."""

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xviz_jax import tracing
from xviz_jax.attention.sites import self_attention
from xviz_jax.tracing import Site

_INPUT = re.compile(r"(\w+)\[([\d, ]*)\]")


def find_model(name: str) -> tuple[Callable, tuple[Any, ...]]:
    """The function a name stands for, and the inputs it is known to take.

    Args:
      name: `embedded`, or `package.module:function`.

    Raises:
      ValueError: If there is no such function.
    """
    if name == "embedded":
        # Flax takes longer to import than JAX, and a function needs none of it.
        from xviz_jax.models import embedded

        return embedded.load(), (jax.ShapeDtypeStruct((28, 28), jnp.float32),)
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"a model is `embedded` or `module:function`, got {name!r}")
    try:
        model = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} cannot be imported: {error}") from error
    if not callable(model):
        raise ValueError(f"{name!r} is not a function")
    return model, ()


def parse_input(text: str) -> jax.ShapeDtypeStruct:
    """Reads the shape and dtype of an input, such as `float32[28, 28]`.

    Raises:
      ValueError: If it is written otherwise.

    >>> parse_input("int32[128]")
    ShapeDtypeStruct(shape=(128,), dtype=int32)
    """
    match = _INPUT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"an input is written like float32[28,28], got {text!r}")
    try:
        dtype = jnp.dtype(match[1])
    except TypeError as error:
        raise ValueError(f"there is no dtype {match[1]!r}") from error
    shape = tuple(int(size) for size in match[2].split(",") if size.strip())
    return jax.ShapeDtypeStruct(shape, dtype)


def advice(sites: Sequence[Site], args: Sequence[Any]) -> dict[str, str]:
    """For each method, `works`, or why it does not and what to do.

    Args:
      sites: What tracing found.
      args: Arrays or shapes of the model's arguments; the first is explained.
    """
    attention = "works"
    try:
        self_attention(sites)
    except ValueError as error:
        attention = f"no: {error}"
    gradients = "works"
    leaves = jax.tree.leaves(args[:1])
    if any(not jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        found = [s for s in sites if s.kind == "embedding" and 0 in s.inputs]
        gradients = (
            "works, with one score for each token"
            if found
            else "no: the first argument holds integers that look up no embedding; "
            "explain the embeddings themselves"
        )
    return {
        "attention_rollout": attention,
        "attention_relevance": attention,
        "saliency": gradients,
        "input_x_gradient": gradients,
        "integrated_gradients": gradients,
    }


def report(model: Callable, args: Sequence[Any], console: Console) -> None:
    """Prints the table of sites, and what each method can do with them.

    Args:
      model: Any JAX function; it is traced, and not run.
      args: Arrays or shapes of its arguments.
      console: Where to print.
    """
    sites = tracing.sites(model, *args)
    table = Table(title="sites")
    for heading in ("name", "kind", "shape", "causal", "values", "note"):
        table.add_column(heading)
    for site in sites:
        causal = "" if site.causal is None else str(site.causal).lower()
        shape = " x ".join(map(str, site.shape))
        cells = (site.name, site.kind, shape, causal, ", ".join(site.values), site.why)
        table.add_row(*map(Text, cells))
    console.print(table if sites else "tracing found no sites")
    methods = Table(title="methods")
    methods.add_column("method")
    methods.add_column("verdict")
    for name, verdict in advice(sites, args).items():
        methods.add_row(name, Text(verdict))
    console.print(methods)
