# pyright: reportPrivateImportUsage=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# The names and signatures of JAX >= 0.11, which the oldest supported JAX lacks.
"""`attention_row_product` on NVIDIA Hopper for the maximum or minimum over heads.

The heads of a tile pass one after the other while their extremum stays in registers,
so keys stream too. Heads cannot run side by side; the queries are divided instead, and
XLA adds the parts.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from xviz_jax.kernels import mosaic_gpu
from xviz_jax.kernels.attention_map import AttentionMap

# Thread blocks to aim for, two for each multiprocessor of an H100.
_THREAD_BLOCKS = 264


# The fused tile takes registers that more sums would want.
VECTORS_PER_PASS = 4


def one_pass(
    r: jax.Array,
    lse: jax.Array,
    attention: AttentionMap,
    config: Mapping[str, int] | None,
    interpret: Any,
) -> jax.Array:
    """A few vectors `[B, M, Nq]` times F `[B, Nq, Nk]`."""
    b, h, kv_heads, nq, nk = attention.shape
    m, group = r.shape[1], h // kv_heads
    bq, bk, groups = mosaic_gpu.block_sizes(
        "attention_row_product",
        attention,
        config,
        vectors=m,
        candidates=[(128, 64, 2), (64, 64, 2), (64, 64, 1)],
        held=lambda bq, bk, groups: (
            2 * (groups * bk + bq),
            2 * (m + 1) * bq + m * groups * bk,
        ),
    )
    q_pad, k_pad = -nq % bq, -nk % (bk * groups)
    q_blocks, k_blocks = (nq + q_pad) // bq, (nk + k_pad) // (bk * groups)
    parts = min(q_blocks, -(-_THREAD_BLOCKS // (b * k_blocks)))
    left, right = mosaic_gpu.band(attention)
    offset = attention.q_offset
    scale = attention.scale * mosaic_gpu.LOG2_E
    fuse, limit, least = jnp.maximum, jnp.minimum, -jnp.inf
    if attention.head_fusion == "min":
        fuse, limit, least = jnp.minimum, jnp.maximum, jnp.inf

    pad = mosaic_gpu.pad_lengths
    # Heads and lengths on one axis, so that a step is a block of it.
    by_query = lambda x: pad(jnp.moveaxis(x, 2, 1), 2, q_pad).reshape(
        b, h * q_blocks * bq, x.shape[3]
    )
    by_key = lambda x: pad(jnp.moveaxis(x, 2, 1), 2, k_pad).reshape(
        b, kv_heads * k_blocks * groups * bk, x.shape[3]
    )
    operands = [
        pad(r, 2, q_pad),
        pad(mosaic_gpu.base_two(lse), 2, q_pad, jnp.inf).reshape(b, -1),
        by_query(attention.q),
        by_key(attention.k),
    ]
    if attention.v is not None and attention.dout is not None:
        operands += [by_query(attention.dout), by_key(attention.v)]
    layout = plgpu.Layout.WGMMA
    tiled = list(mosaic_gpu.transforms())

    def body(*refs):
        *streams, out_ref, result_ref = refs
        example, part = lax.axis_index("batch"), lax.axis_index("parts")
        block, warp_group = lax.axis_index("keys"), lax.axis_index("warp_group")
        first_key = block * (groups * bk)
        own_rows = pl.ds(warp_group * bk, bk)
        own_key = first_key + warp_group * bk
        # The query blocks that meet any key of this thread block; at least one.
        first, last = jnp.int32(0), jnp.int32(q_blocks - 1)
        if right is not None:
            first = lax.div(jnp.maximum(first_key - right - offset, 0), bq)
            first = jnp.minimum(first, q_blocks - 1)
        if left is not None:
            row = jnp.maximum(first_key + groups * bk - 1 + left - offset, 0)
            last = jnp.maximum(jnp.minimum(lax.div(row, bq), last), first)
        share = lax.div(last - first + parts, parts)
        # A part beyond the last block walks along that one again, for nothing.
        begin = first + part * share
        useful = begin <= last
        begin = jnp.minimum(begin, last)
        count = jnp.minimum(share, last - begin + 1)

        def query_and_head(step):
            return begin + lax.div(step, h), lax.rem(step, h)

        def columns(pipeline):
            zero = plgpu.layout_cast(jnp.zeros((bk,), jnp.float32), layout.reduce(1))
            tile = plgpu.layout_cast(jnp.zeros((bk, bq), jnp.float32), layout)
            _, sums = pipeline((tile, (zero,) * m))
            result = result_ref.at[warp_group]
            for n in range(m):
                result.at[n][...] = sums[n]
            plgpu.commit_smem()
            for n in range(m):
                target = out_ref.at[example, part, n]
                plgpu.copy_smem_to_gmem(result.at[n], target.at[pl.ds(own_key, bk)])
            plgpu.wait_smem_to_gmem(0)

        def step(index, r_s, lse_s, q_s, k_s, *rest):
            *gradient, (fused, sums) = rest
            i, head = query_and_head(index[0])
            across = lambda x: lax.broadcast_in_dim(x, (bk, bq), [1])
            pairs = [(k_s.at[own_rows], q_s)]
            if gradient:
                dout_s, v_s = gradient
                pairs.append((v_s.at[own_rows], dout_s))
            (s, *gradient), _ = mosaic_gpu.wgmma(pairs)
            p = jnp.exp2(s * scale - across(plgpu.load(lse_s, layout=layout.reduce(0))))
            if gradient:
                p = p * mosaic_gpu.counted_gradient(attention, gradient[0])
            iota = lambda axis: plgpu.broadcasted_iota(
                jnp.int32, (bk, bq), axis, layout=layout
            )
            at, key = iota(1) + (i * bq + offset), iota(0) + own_key
            # After the gradient, which may be NaN where nothing is attended.
            if right is not None:
                p = jnp.where(key <= at + right, p, 0.0)
            if left is not None:
                p = jnp.where(key >= at - left, p, 0.0)
            # The first head forgets the block before.
            fused = fuse(limit(fused, jnp.where(head == 0, least, -least)), p)
            counts = jnp.where(useful & (head == h - 1), 1.0, 0.0)
            weights = [plgpu.load(r_s.at[n], layout=layout.reduce(0)) for n in range(m)]
            # Numbers that threads have read give way to a copy of the next ones.
            plgpu.commit_smem()
            return fused, tuple(
                total + jnp.sum(fused * across(w * counts), axis=1)
                for total, w in zip(sums, weights, strict=True)
            )

        def query_block(step):
            i, head = query_and_head(step)
            return head * q_blocks + i

        def key_block(step):
            _, head = query_and_head(step)
            return lax.div(head, group) * k_blocks + block

        by_query = lambda ref: plgpu.BlockSpec(
            block_shape=(bq, ref.shape[2]),
            index_map=lambda n: (query_block(n), 0),
            transforms=tiled,
        )
        by_key = lambda ref: plgpu.BlockSpec(
            block_shape=(groups * bk, ref.shape[2]),
            index_map=lambda n: (key_block(n), 0),
            transforms=tiled,
        )
        specs = [
            plgpu.BlockSpec(
                block_shape=(m, bq), index_map=lambda n: (0, query_and_head(n)[0])
            ),
            plgpu.BlockSpec(block_shape=(bq,), index_map=lambda n: (query_block(n),)),
            *(
                f(ref)
                for f, ref in zip((by_query, by_key) * 2, streams[2:], strict=False)
            ),
        ]
        mosaic_gpu.pipeline(
            step,
            specs,
            steps=count * h,
            stages=min(2, h),
            groups=groups,
            context=columns,
        )(*(ref.at[example] for ref in streams))

    partial = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((b, parts, m, nk + k_pad), jnp.float32),
        scratch_types=[plgpu.SMEM((groups, m, bk), jnp.float32)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(parts, k_blocks, b),
        grid_names=("parts", "keys", "batch"),
        num_threads=groups + 1,
        thread_name="warp_group",
        interpret=interpret,
        kernel_name=f"attention_row_product_{attention.relevance}_{attention.head_fusion}",
    )(*operands)
    return partial[..., :nk].sum(1)
