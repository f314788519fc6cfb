"""The definitions: plain JAX that forms every attention map in full.

Each operation's `reference` is one line on top of these. Memory is O(H N^2).
"""

import functools

import jax
import jax.numpy as jnp

from xviz_jax.kernels.attention_map import (
    AttentionMap,
    larger,
    positive_part,
    smaller,
)


def allowed(attention: AttentionMap) -> jax.Array:
    """Where a query may attend, bool `[B or 1, H or 1, Nq, Nk]`."""
    i = attention.query_positions()[:, None, :, None]
    j = jnp.arange(attention.k.shape[1], dtype=jnp.int32)[None, None, None]
    ok = jnp.ones((*i.shape[:3], j.shape[3]), bool)
    if attention.causal:
        ok &= j <= i
    if attention.window is not None:
        left, right = attention.window
        if left is not None:
            ok &= j >= i - left
        if right is not None:
            ok &= j <= i + right
    if attention.key_mask is not None:
        ok = ok & attention.key_mask[:, None, None]
    if attention.mask is not None:
        ok = ok & attention.mask
    return ok


def scores(attention: AttentionMap) -> jax.Array:
    """The softmax's argument, `[B, H, Nq, Nk]`; -inf where nothing is attended."""
    s = _per_head(attention, attention.q, attention.k) * attention.scale
    if attention.softcap is not None:
        s = attention.softcap * jnp.tanh(s / attention.softcap)
    if attention.bias is not None:
        s = s + attention.bias.astype(s.dtype)
    return jnp.where(allowed(attention), s, -jnp.inf)


def lse(attention: AttentionMap) -> jax.Array:
    """Natural-log normalisers `[B, H, Nq]`; -inf for a row that attends nothing."""
    return jax.nn.logsumexp(scores(attention), -1)


def probabilities(attention: AttentionMap) -> jax.Array:
    """`[B, H, Nq, Nk]`; rows sum to one, or to zero where nothing is attended."""
    norm = lse(attention) if attention.lse is None else attention.lse
    norm = jnp.where(norm == -jnp.inf, 0.0, norm)
    s = scores(attention)
    return jnp.where(s == -jnp.inf, 0.0, jnp.exp(s - norm[..., None]))


def relevance(attention: AttentionMap) -> jax.Array:
    """T(P) of every head, `[B, H, Nq, Nk]`."""
    p = probabilities(attention)
    if attention.relevance == "attention":
        return p
    gradient = _per_head(attention, attention.dout, attention.v)
    if attention.relevance == "relu_gradient_x_attention":
        gradient = positive_part(gradient)
    # An unattended key contributes nothing, whatever its value vector holds.
    return jnp.where(p == 0.0, 0.0, p * gradient)


def fused(attention: AttentionMap) -> jax.Array:
    """The fused matrix F, `[B, Nq, Nk]`."""
    heads = relevance(attention)
    if attention.head_fusion in ("max", "min"):
        fuse = larger if attention.head_fusion == "max" else smaller
        out = functools.reduce(fuse, jnp.unstack(heads, axis=1))
    else:
        out = (heads * attention.fusion_weights()[..., None, None]).sum(1)
    if attention.threshold is None:
        return out
    threshold = attention.threshold[:, None, None].astype(out.dtype)
    return jnp.where(out < threshold, 0.0, out)


def _per_head(attention, x, y):
    """x_i . y_j for each query head, with its key head repeated."""
    y = jnp.repeat(y, x.shape[2] // y.shape[2], axis=2)
    return jnp.einsum(
        "bihd,bjhd->bhij",
        x,
        y,
        precision="highest",
        preferred_element_type=attention.dtype,
    )
