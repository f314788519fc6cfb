"""What the TPU kernels share: layout, the band of a mask, and the masked tile.

Keys lie on sublanes and queries on lanes, so that what belongs to a query (its
logsumexp, its weights) broadcasts along sublanes for free.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from xviz_jax.kernels.attention_map import AttentionMap

# Mosaic's own default leaves no room for the larger tiles of `block_q, block_k`.
VMEM_LIMIT_BYTES = 48 * 2**20


def require_support(attention: AttentionMap) -> None:
    """Raises NotImplementedError for what no TPU kernel here computes."""
    for name in ("mask", "bias", "threshold", "positions"):
        if getattr(attention, name) is not None:
            raise NotImplementedError(f"mosaic_tpu does not support {name}")
    if attention.q.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            f"mosaic_tpu supports q of float32 or bfloat16, got {attention.q.dtype}"
        )


def heads_first(x: jax.Array) -> jax.Array:
    """`[B, N, H, D]` as `[B, H, N, D]`."""
    return jnp.moveaxis(x, 2, 1)


def result_like(shape: tuple[int, ...], *operands: jax.Array) -> jax.ShapeDtypeStruct:
    """A float32 result that varies over a mesh as all the operands together do."""

    def touch(*xs):
        return jnp.stack([jnp.ravel(x)[0].astype(jnp.float32) for x in xs]).sum()

    return jax.eval_shape(lambda *xs: jnp.broadcast_to(touch(*xs), shape), *operands)


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Band:
    """Which blocks of queries and keys meet under `causal` and `window`.

    Query i sees keys from `i + offset - left` to `i + offset + right`, where None is
    an open side.
    """

    nq: int
    nk: int
    bq: int
    bk: int
    offset: int
    left: int | None
    right: int | None

    @classmethod
    def of(cls, attention: AttentionMap, bq: int, bk: int) -> "Band":
        """The band of `attention` cut into blocks of `bq` queries and `bk` keys."""
        _, _, _, nq, nk = attention.shape
        left, right = attention.window or (None, None)
        if attention.causal:
            right = 0 if right is None else min(right, 0)
        return cls(nq, nk, bq, bk, attention.q_offset, left, right)

    def query_blocks(self, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First and last query block that meet key block j; none if first > last."""
        first, last = jnp.int32(0), jnp.int32(-(-self.nq // self.bq) - 1)
        if self.right is not None:
            first = lax.div(
                jnp.maximum(j * self.bk - self.right - self.offset, 0), self.bq
            )
        if self.left is not None:
            row = (j + 1) * self.bk - 1 + self.left - self.offset
            last = jnp.minimum(last, lax.div(row + self.bq, self.bq) - 1)
        return first, last

    def key_blocks(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First and last key block that meet query block i; none if first > last."""
        first, last = jnp.int32(0), jnp.int32(-(-self.nk // self.bk) - 1)
        if self.left is not None:
            first = lax.div(
                jnp.maximum(i * self.bq + self.offset - self.left, 0), self.bk
            )
        if self.right is not None:
            key = (i + 1) * self.bq - 1 + self.offset + self.right
            last = jnp.minimum(last, lax.div(key, self.bk))
        return first, last

    def _span(self, fixed, walked, count):
        if self.left is None or self.right is None:
            return count
        return min(count, (fixed + self.left + self.right + walked - 2) // walked + 1)

    @property
    def query_steps(self) -> int:
        """The most query blocks that meet one key block."""
        return self._span(self.bk, self.bq, -(-self.nq // self.bq))

    @property
    def key_steps(self) -> int:
        """The most key blocks that meet one query block."""
        return self._span(self.bq, self.bk, -(-self.nk // self.bk))

    def allowed(
        self, i: jax.Array, j: jax.Array, key_mask: jax.Array | None
    ) -> jax.Array:
        """Where block (i, j) attends, bool `[bk, bq]`; False in the padding."""
        shape = (self.bk, self.bq)
        query = i * self.bq + lax.broadcasted_iota(jnp.int32, shape, 1)
        key = j * self.bk + lax.broadcasted_iota(jnp.int32, shape, 0)
        ok = (query < self.nq) & (key < self.nk)
        if self.right is not None:
            ok &= key <= query + (self.offset + self.right)
        if self.left is not None:
            ok &= key >= query + (self.offset - self.left)
        if key_mask is not None:
            ok &= key_mask > 0
        return ok


def products(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y^T in float32; exact products also of float32 operands."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x,
        y,
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=precision,
    )


def scores(
    k: jax.Array, q: jax.Array, scale: float, softcap: float | None
) -> jax.Array:
    """Scaled and capped scores of a block, `[bk, bq]`, not yet masked."""
    s = products(k, q) * scale
    return s if softcap is None else softcap * jnp.tanh(s / softcap)
