"""Which rows of a matrix of attention are asked for."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from xviz_jax.attention.masking import attended
from xviz_jax.attention.stack import Layer
from xviz_jax.tracing import pooling
from xviz_jax.tracing.program import trace

# One position, weights of rows, `mean`: all rows but padding's, alike; or `pooled`:
# as the model's output reads them.
Query = int | jax.Array | Literal["mean", "pooled"]


def resolve(
    query: Query, layers: Sequence[Layer], model: Callable, args: Sequence[Any]
) -> int | jax.Array:
    """A position, or weights of rows, as `propagate` takes them.

    Args:
      query: As a user gives it.
      layers: As `capture` gives them, all of the model's.
      model: Whose layers these are.
      args: Its positional arguments.

    Raises:
      ValueError: If it is neither a position nor weights of all rows, or if it is
        `pooled` and how the model pools is not found.
    """
    length = layers[-1].site.shape[-1]
    if isinstance(query, str):
        if query == "mean":
            return uniform(layers)
        if query != "pooled":
            raise ValueError(
                "`query` is a position, weights of rows, 'mean' or 'pooled', got "
                f"{query!r}"
            )
        query = pooling.weights(trace(model, tuple(args), {}))
    if jnp.ndim(query) == 1:
        return weights_of_rows(query, length)
    one_hot(query, length)
    return query


def one_hot(query: int | jax.Array, length: int) -> jax.Array:
    """A row that is 1 at one position, float32 `[length]`; NaN outside the sequence.

    Raises:
      ValueError: If `query` is no position.
    """
    if isinstance(query, int) and not -length <= query < length:
        raise ValueError(
            f"`query` is a position from {-length} to {length - 1}, got {query}"
        )
    position = jnp.asarray(query)
    if position.shape != () or not jnp.issubdtype(position.dtype, jnp.integer):
        raise ValueError(
            f"`query` is one integer position, got {position.dtype} of shape "
            f"{position.shape}"
        )
    valid = (position >= -length) & (position < length)
    row = jax.nn.one_hot(position % length, length, dtype=jnp.float32)
    return jnp.where(valid, row, jnp.nan)


def weights_of_rows(query: int | jax.Array, length: int) -> jax.Array:
    """Weights of rows, float32 `[length]`.

    Raises:
      ValueError: If these are no floats, or not one for each row.
    """
    weights = jnp.asarray(query)
    if weights.shape != (length,) or not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(
            f"weights of rows in `query` are float[{length}], got {weights.dtype}"
            f"{list(weights.shape)}"
        )
    return weights.astype(jnp.float32)


def of_named(query: Query, length: int) -> jax.Array:
    """A position, or weights of rows, as weights of all rows.

    Raises:
      ValueError: If it is no position and no weights.
    """
    if isinstance(query, str):
        raise ValueError(
            f"`query` of a named layer is a position or weights of rows, got {query!r}"
        )
    weighed = jnp.ndim(query) == 1
    return (weights_of_rows if weighed else one_hot)(query, length)


def uniform(layers: Sequence[Layer]) -> jax.Array:
    """Equal weights of all rows but padding's, float32 `[length]`."""
    return shares(attended(layers))


def shares(counts: jax.Array) -> jax.Array:
    """Equal weights of what counts, float32 `[length]`, of bool."""
    number = jnp.maximum(jnp.sum(counts, dtype=jnp.float32), 1)
    return counts.astype(jnp.float32) / number


def row_weights(query: int | jax.Array, length: int) -> jax.Array:
    """What is resolved as weights of all rows, float32 `[length]`."""
    return jnp.asarray(query) if jnp.ndim(query) == 1 else one_hot(query, length)


def diagnostics(row: jax.Array, query: int | jax.Array) -> dict[str, jax.Array]:
    """`mass`, the sum of a row, and `self_share`, the explained position's own.

    Args:
      row: The scores.
      query: As `resolve` gives it.
    """
    own = jnp.sum(row * row_weights(query, row.shape[0]))
    return {"mass": jnp.sum(row), "self_share": own}
