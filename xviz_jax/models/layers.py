"""What several of the architectures are built from."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# As `hidden_act` of config.json names them.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


class LayerNorm(nnx.LayerNorm):
    """Layer normalisation, in float32 whatever the activations are."""

    def __init__(self, width: int, *, epsilon: float, rngs: nnx.Rngs):
        """Starts at scale one and bias zero."""
        # The fast variance loses digits where the mean is far from zero.
        super().__init__(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalises the last axis; the dtype stays."""
        return super().__call__(x.astype(jnp.float32), mask=mask).astype(x.dtype)


class RMSNorm(nnx.RMSNorm):
    """Root mean square normalisation, in float32 whatever the activations are."""

    def __init__(self, width: int, *, epsilon: float, rngs: nnx.Rngs):
        """Starts at scale one."""
        super().__init__(width, epsilon=epsilon, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Normalises the last axis; the dtype stays."""
        return super().__call__(x.astype(jnp.float32), mask).astype(x.dtype)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Multi-head attention over one sequence, with a float32 softmax.

    Args:
      query: [length, heads, dim].
      key: [length, key heads, dim]; its heads divide the query's.
      value: Like the key.
      mask: True where a query may see a key, [length, length] or [1, length].
      scale: Of the query-key product; by default `dim ** -0.5`.

    Returns:
      [length, heads * dim].
    """
    # JAX's own function mixes bfloat16 and float32 without saying so.
    with jax.numpy_dtype_promotion("standard"):
        mixed = jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=None if mask is None else mask[None],
            scale=scale,
        )
    return mixed.reshape(query.shape[0], -1)


def stack(
    make: Callable[[nnx.Rngs], nnx.Module], depth: int, *, scan: bool, rngs: nnx.Rngs
) -> Any:
    """Makes equal layers, for `run`.

    Args:
      make: Makes one layer.
      depth: How many.
      scan: One module whose parameters have a leading layer axis, instead of a list.
      rngs: Draws the parameters.
    """

    @nnx.split_rngs(splits=depth)
    @nnx.vmap
    def stacked(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    together = stacked(rngs)
    if scan:
        return together
    # Taken apart, because a list of layers made one by one is slow to trace.
    graph, state = nnx.split(together)
    leaves, structure = jax.tree.flatten(state)
    rows = [jax.tree.unflatten(structure, row) for row in zip(*leaves, strict=True)]
    return nnx.List([nnx.merge(graph, row) for row in rows])


def run(layers: Any, x: jax.Array, *rest: Any, each: Any = None) -> jax.Array:
    """Applies layers one after the other, as a loop where they are stacked.

    Args:
      layers: As `stack` makes them.
      x: What the first layer takes.
      *rest: Further arguments, the same for every layer.
      each: Further keyword arguments of each layer: a dict of sequences of numbers.
    """
    each = {} if each is None else each
    if isinstance(layers, nnx.List):
        for index, layer in enumerate(layers):
            x = layer(x, *rest, **{name: rows[index] for name, rows in each.items()})
        return x
    graph, state = nnx.split(layers)

    def step(x: jax.Array, turn: Any) -> tuple[jax.Array, None]:
        one, own = turn
        return nnx.merge(graph, one)(x, *rest, **own), None

    rows = {name: jnp.asarray(values) for name, values in each.items()}
    return jax.lax.scan(step, x, (state, rows))[0]


def at(x: jax.Array, position: int, mask: jax.Array | None) -> jax.Array:
    """The state at one position of a sequence, counted among the real tokens.

    Args:
      x: [length, ...].
      position: From the first real token, or, if negative, from the last.
      mask: [length], True for real tokens, which come first; None if all are.

    Returns:
      `x[position]`; NaN where the mask leaves no such token.

    Raises:
      ValueError: If the sequence is too short.
    """
    length = x.shape[0]
    if not -length <= position < length:
        raise ValueError(
            f"`position` is from {-length} to {length - 1} for {length} tokens, got "
            f"{position}"
        )
    if mask is None:
        return x[position]
    count = jnp.sum(mask.astype(jnp.int32))
    index = position if position >= 0 else count + position
    places = jnp.arange(length).reshape(length, *(1,) * (x.ndim - 1))
    picked = jnp.sum(jnp.where(places == index, x, 0), axis=0, dtype=x.dtype)
    return jnp.where((index >= 0) & (index < count), picked, jnp.nan)


def causal(
    length: int, mask: jax.Array | None, window: int | jax.Array | None = None
) -> jax.Array:
    """Which keys a query sees in a decoder: itself and earlier real tokens.

    Args:
      length: Of the sequence.
      mask: [length], True for real tokens; None if all are.
      window: How many tokens it sees, itself included; None for all.

    Returns:
      bool [length, length], rows are queries.
    """
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    seen = query >= key
    if window is not None:
        seen = seen & (query - key < window)
    return seen if mask is None else seen & mask.astype(bool)[None, :]


def reader(position: int) -> Callable[..., jax.Array]:
    """Reads a decoder's logits at one position, as `at` counts it.

    Args:
      position: Negative from the last real token.

    Returns:
      A function of `(module, tokens, mask=None)`.
    """

    def read(module: Any, tokens: jax.Array, mask: jax.Array | None = None):
        return module.read(at(module.encode(tokens, mask), position, mask))

    return read


def outputs(config: Any) -> int:
    """How many logits a decoder's own output table has; 0 where it has none."""
    if config.head == "sequence":
        return config.classes
    return config.vocabulary if config.head == "causal_lm" and not config.tied else 0
