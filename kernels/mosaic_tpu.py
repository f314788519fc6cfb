"""What the TPU kernels share: layout, the band of a mask, and the tiles of F.

Keys lie on sublanes and queries on lanes, so that what belongs to a query (its
logsumexp, its weights) broadcasts along sublanes for free.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from xviz_jax.kernels.attention_map import (
    AttentionMap,
    larger,
    positive_part,
    smaller,
)

LANES, SUBLANES = 128, 8
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


def clip_blocks(attention: AttentionMap, bq: int, bk: int) -> tuple[int, int]:
    """The block sizes, no longer than the attention they cut."""
    _, _, _, nq, nk = attention.shape
    if bq % LANES or bk % LANES:
        raise ValueError(f"config wants multiples of {LANES}, got {bq} and {bk}")
    return min(bq, round_up(nq, LANES)), min(bk, round_up(nk, LANES))


def heads_first(x: jax.Array) -> jax.Array:
    """`[B, N, H, D]` as `[B, H, N, D]`."""
    return jnp.moveaxis(x, 2, 1)


def result_like(shape: tuple[int, ...], *operands: jax.Array) -> jax.ShapeDtypeStruct:
    """A float32 result that varies over a mesh as all the operands together do."""

    def touch(*xs):
        return jnp.stack([jnp.ravel(x)[0].astype(jnp.float32) for x in xs]).sum()

    return jax.eval_shape(lambda *xs: jnp.broadcast_to(touch(*xs), shape), *operands)


def cost(attention: AttentionMap, bytes_accessed: int) -> pl.CostEstimate:
    """What XLA should think one pass over the scores costs."""
    b, heads, _, nq, nk = attention.shape
    flops = 2 * nq * nk * b * heads * attention.q.shape[3]
    return pl.CostEstimate(
        flops=flops * (1 if attention.v is None else 2),
        transcendentals=b * heads * nq * nk,
        bytes_accessed=bytes_accessed,
    )


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

    def query_block(self, j: jax.Array, step: jax.Array) -> jax.Array:
        """The query block that key block j meets at `step`, or one that it has met.

        Steps beyond the band repeat a block, and a repeated block is not copied.
        """
        first, last = self.query_blocks(j)
        blocks = -(-self.nq // self.bq)
        return jnp.clip(first + step, 0, jnp.clip(last, 0, blocks - 1))

    def key_block(self, i: jax.Array, step: jax.Array) -> jax.Array:
        """The key block that query block i meets at `step`, or one that it has met."""
        first, last = self.key_blocks(i)
        blocks = -(-self.nk // self.bk)
        return jnp.clip(first + step, 0, jnp.clip(last, 0, blocks - 1))

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


def score_operands(
    attention: AttentionMap, band: Band, *per_key: jax.Array | None
) -> tuple[list[pl.BlockSpec], list[jax.Array]]:
    """q, k and, where given, the key mask and other flags `[B, Nk]` as columns.

    For a grid of examples, heads, query blocks, and steps along `band.key_block`.
    """
    _, heads, kv_heads, _, _ = attention.shape
    dim, group = attention.q.shape[3], heads // kv_heads
    specs = [
        pl.BlockSpec((None, None, band.bq, dim), lambda b, h, i, n: (b, h, i, 0)),
        pl.BlockSpec(
            (None, None, band.bk, dim),
            lambda b, h, i, n: (b, lax.div(h, group), band.key_block(i, n), 0),
        ),
    ]
    operands = [heads_first(attention.q), heads_first(attention.k)]
    for flags in (attention.key_mask, *per_key):
        if flags is not None:
            specs.append(
                pl.BlockSpec(
                    (None, band.bk, 1), lambda b, h, i, n: (b, band.key_block(i, n), 0)
                )
            )
            operands.append(flags.astype(jnp.float32)[..., None])
    return specs, operands


@dataclasses.dataclass(frozen=True)
class Tiles:
    """F in blocks of keys by queries: which operands a kernel reads, and how.

    A kernel takes the references of `operands` first, before its own.
    """

    band: Band
    heads: int
    scale: float
    softcap: float | None
    relevance: str
    head_fusion: str
    masked: bool

    @classmethod
    def of(cls, attention: AttentionMap, bq: int, bk: int) -> "Tiles":
        """The tiles of `attention` in blocks of `bq` queries and `bk` keys."""
        return cls(
            Band.of(attention, bq, bk),
            attention.q.shape[2],
            attention.scale,
            attention.softcap,
            attention.relevance,
            attention.head_fusion,
            attention.key_mask is not None,
        )

    def operands(
        self,
        attention: AttentionMap,
        lse: jax.Array,
        at: Callable[..., tuple[Any, Any, Any, Any]],
    ) -> tuple[list[pl.BlockSpec], list[jax.Array]]:
        """What `__call__` reads; `at` turns grid indices to example, head, i and j."""
        b, heads, kv_heads, _, _ = attention.shape
        group, bq, bk = heads // kv_heads, self.band.bq, self.band.bk

        def spec(shape, index, **options):
            return pl.BlockSpec(shape, lambda *grid: index(*at(*grid)), **options)

        per_query = lambda x: spec(
            (None, None, bq, x.shape[3]), lambda b, h, i, j: (b, h, i, 0)
        )
        per_key = lambda x: spec(
            (None, None, bk, x.shape[3]),
            lambda b, h, i, j: (b, lax.div(h, group), j, 0),
        )
        weights = jnp.broadcast_to(attention.fusion_weights(), (b, heads))
        specs = [
            spec(
                (None, None, 1, 1),
                lambda b, h, i, j: (b, h, 0, 0),
                memory_space=pltpu.SMEM,
            ),
            spec((None, None, 1, bq), lambda b, h, i, j: (b, h, 0, i)),
            per_query(attention.q),
            per_key(attention.k),
        ]
        # A row that attends nothing is all masked, whatever its logsumexp.
        lse = jnp.where(lse == -jnp.inf, 0.0, lse)
        arrays = [
            weights[..., None, None],
            lse[:, :, None],
            heads_first(attention.q),
            heads_first(attention.k),
        ]
        if attention.v is not None and attention.dout is not None:
            specs += [per_query(attention.dout), per_key(attention.v)]
            arrays += [heads_first(attention.dout), heads_first(attention.v)]
        if attention.key_mask is not None:
            specs.append(spec((None, bk, 1), lambda b, h, i, j: (b, j, 0)))
            arrays.append(attention.key_mask.astype(jnp.float32)[..., None])
        return specs, arrays

    def split(self, refs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """The references of `operands`, and the kernel's own."""
        count = 4 + 2 * (self.relevance != "attention") + self.masked
        return refs[:count], refs[count:]

    @property
    def linear(self) -> bool:
        """Whether F is a sum over heads, so that heads need not meet."""
        return self.head_fusion not in ("max", "min")

    def __call__(self, refs: Sequence[Any], i: jax.Array, j: jax.Array) -> jax.Array:
        """T(P) of one head on block (i, j), `[bk, bq]`, weighted; zero where masked."""
        weight, lse, q, k, *rest = refs
        key_mask = rest.pop()[...] if self.masked else None
        p = jnp.exp(scores(k[...], q[...], self.scale, self.softcap) - lse[...])
        if rest:
            dout, v = rest
            gradient = products(v[...], dout[...])
            if self.relevance == "relu_gradient_x_attention":
                gradient = positive_part(gradient)
            p = p * gradient
        # Masking the product, not the score, also removes what padding held.
        p = jnp.where(self.band.allowed(i, j, key_mask), p, 0.0)
        return p * weight[0, 0] if self.linear else p

    def fuse(self, fused: Any, head: jax.Array, p: jax.Array) -> None:
        """Adds the tile of `head` to the `fused` one, which head 0 starts."""
        fuse = {"max": larger, "min": smaller}.get(self.head_fusion, jnp.add)

        @pl.when(head == 0)
        def _():
            fused[...] = p

        @pl.when(head > 0)
        def _():
            fused[...] = fuse(fused[...], p)


def accurate_products(x: jax.Array, y: jax.Array, axis: int, fast: bool) -> jax.Array:
    """x `[m, n]` times y along its `axis`, of float32 operands, on the matrix unit.

    Unless fast, from the bfloat16 parts of both: an error near 1e-6 at half the cost
    of float32 products.
    """

    def multiply(x, y):
        return lax.dot_general(
            x, y, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
        )

    x_high, y_high = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    if fast:
        return multiply(x_high, y_high)
    x_low = (x - x_high.astype(jnp.float32)).astype(jnp.bfloat16)
    y_low = (y - y_high.astype(jnp.float32)).astype(jnp.bfloat16)
    # Both parts of x meet the high part of y while it is loaded.
    both = multiply(jnp.concatenate([x_high, x_low]), y_high)
    n = x.shape[0]
    return both[:n] + both[n:] + multiply(x_high, y_low)
