# pyright: reportPrivateImportUsage=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# The names and signatures of JAX >= 0.11, which the oldest supported JAX lacks.
"""`attention_row_product` on NVIDIA Hopper.

Warp groups each hold a block of keys while query blocks stream through shared memory
once for all of them. Keys lie on the rows of a tile, so that what belongs to a query
broadcasts along it and columns of the result are summed in registers. In a linear
fusion every head writes its own partial sums; XLA adds them, so the result is
deterministic. A maximum or minimum is in `extremum`.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from xviz_jax.kernels import mosaic_gpu
from xviz_jax.kernels.attention_lse import mosaic_gpu as lse_kernel
from xviz_jax.kernels.attention_map import AttentionMap
from xviz_jax.kernels.attention_row_product import mosaic_gpu_extremum, xla
from xviz_jax.kernels.dispatch import differentiated_as

# So many vectors are summed in registers at a time, and so many times the scores
# are worth computing again rather than forming the matrix.
_VECTORS_PER_PASS = 8
_MAX_PASSES = 4
# So many are loaded while the tensor cores compute; more would fill the registers.
_VECTORS_AT_HAND = 2


def attention_row_product(
    r: jax.Array,
    attention: AttentionMap,
    *,
    precision: Literal["default", "fast"] = "default",
    config: Mapping[str, int] | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`[B, M, Nq]` times F `[B, Nq, Nk]`; both precisions sum in float32."""
    mosaic_gpu.require_support(attention)
    most = _VECTORS_PER_PASS * _MAX_PASSES
    if r.shape[1] > most:
        raise NotImplementedError(
            f"mosaic_gpu multiplies at most {most} vectors r, got {r.shape[1]}"
        )
    kernel = functools.partial(call, config=config, interpret=interpret)
    plain = functools.partial(xla.attention_row_product, precision=precision)
    return differentiated_as(plain, kernel)(r, attention)


def call(
    r: jax.Array,
    attention: AttentionMap,
    *,
    config: Mapping[str, int] | None,
    interpret: Any,
) -> jax.Array:
    """The kernel itself, which has no derivative."""
    lse = attention.lse
    if lse is None:
        lse = lse_kernel.call(attention, config=None, interpret=interpret)
    linear = attention.fuses_linearly
    one_pass = _pass if linear else mosaic_gpu_extremum.one_pass
    per_pass = _VECTORS_PER_PASS if linear else mosaic_gpu_extremum.VECTORS_PER_PASS
    passes = [
        one_pass(r[:, m : m + per_pass], lse, attention, config, interpret)
        for m in range(0, r.shape[1], per_pass)
    ]
    out = jnp.concatenate(passes, 1)
    if attention.key_mask is not None:
        # The logsumexp left masked keys out; their columns are all that remains.
        out = jnp.where(attention.key_mask[:, None], out, 0.0)
    return out


def _pass(r, lse, attention, config, interpret):
    b, h, kv_heads, nq, nk = attention.shape
    m, group = r.shape[1], h // kv_heads
    left, right = mosaic_gpu.band(attention)
    banded = left is not None or right is not None
    with_gradient = attention.relevance != "attention"
    # Under a band more of a wide block is masked; of two products registers spill.
    wide = [] if banded or with_gradient else [(128, 128, 2)]
    bq, bk, groups = mosaic_gpu.block_sizes(
        "attention_row_product",
        attention,
        config,
        vectors=m,
        candidates=[*wide, (128, 64, 2), (64, 64, 2), (64, 64, 1)],
        held=lambda bq, bk, groups: (
            groups * bk + mosaic_gpu.STAGES * bq,
            mosaic_gpu.STAGES * (m + 1) * bq + m * groups * bk,
        ),
    )
    q_pad, k_pad = -nq % bq, -nk % (bk * groups)
    q_blocks = (nq + q_pad) // bq
    offset = attention.q_offset
    scale = attention.scale * mosaic_gpu.LOG2_E

    pad = mosaic_gpu.pad_lengths
    operands = [
        pad(r, 2, q_pad),
        pad(mosaic_gpu.base_two(lse), 2, q_pad, jnp.inf),
        pad(attention.q, 1, q_pad),
        pad(attention.k, 1, k_pad),
    ]
    if with_gradient:
        operands += [pad(attention.v, 1, k_pad), pad(attention.dout, 1, q_pad)]
    layout = plgpu.Layout.WGMMA
    tiled = mosaic_gpu.transforms()

    def body(r_ref, lse_ref, q_ref, k_ref, *refs):
        v_ref, dout_ref = refs[:2] if with_gradient else (None, None)
        out_ref, shared, barriers, *turn_barriers = refs[2 * with_gradient :]
        turns = mosaic_gpu.Turns(turn_barriers)
        example, head = lax.axis_index("batch"), lax.axis_index("heads")
        kv_head = lax.div(head, jnp.array(group, head.dtype))
        warp_group = lax.axis_index("warp_group")
        first_key = lax.axis_index("keys") * (groups * bk)
        own_key = first_key + warp_group * bk
        # The query blocks that meet any key of this thread block; at least one.
        first, last = jnp.int32(0), jnp.int32(q_blocks - 1)
        if right is not None:
            first = lax.div(jnp.maximum(first_key - right - offset, 0), bq)
            first = jnp.minimum(first, q_blocks - 1)
        if left is not None:
            row = jnp.maximum(first_key + groups * bk - 1 + left - offset, 0)
            last = jnp.maximum(jnp.minimum(lax.div(row, bq), last), first)

        def columns(pipeline):
            keys = pl.ds(own_key, bk)
            fixed = [(k_ref, 0)] + ([(v_ref, 1)] if with_gradient else [])
            for ref, n in fixed:
                plgpu.copy_gmem_to_smem(
                    ref.at[example, keys, kv_head],
                    shared[n].at[warp_group],
                    barriers[n].at[warp_group],
                )
            for _, n in fixed:
                plgpu.barrier_wait(barriers[n].at[warp_group])
            zero = plgpu.layout_cast(jnp.zeros((bk,), jnp.float32), layout.reduce(1))
            walk = functools.partial(pipeline, (zero,) * m)
            sums = turns.around(walk, warp_group)
            result = shared[-1].at[warp_group]
            for n in range(m):
                result.at[n][...] = sums[n]
            plgpu.commit_smem()
            for n in range(m):
                plgpu.copy_smem_to_gmem(
                    result.at[n], out_ref.at[example, head, n, keys]
                )
            plgpu.wait_smem_to_gmem(0)

        def step(index, q_s, lse_s, r_s, *rest):
            *dout_s, q_used, lse_used, r_used = rest[: 3 + with_gradient]
            *dout_used, sums = rest[3 + with_gradient :]
            across = lambda x: lax.broadcast_in_dim(x, (bk, bq), [1])
            by_query = functools.partial(plgpu.load, layout=layout.reduce(0))

            vectors = lambda: [by_query(r_s.at[n]) for n in range(m)]

            def numbers():
                found = by_query(lse_s), vectors() if m <= _VECTORS_AT_HAND else None
                turns.change()
                return found

            (s, *gradient), (norm, weights) = mosaic_gpu.wgmma(
                [
                    (keys.at[warp_group], queries)
                    for keys, queries in zip(shared, (q_s, *dout_s), strict=False)
                ],
                meanwhile=numbers,
            )
            for used in (q_used, *dout_used):
                plgpu.barrier_arrive(used)
            p = jnp.exp2(s * scale - across(norm))
            if gradient:
                p = p * mosaic_gpu.counted_gradient(attention, gradient[0])
            # After the gradient, which may be NaN where nothing is attended.
            if banded:
                iota = lambda axis: plgpu.broadcasted_iota(
                    jnp.int32, (bk, bq), axis, layout=layout
                )
                at = iota(1) + ((first + index[0]) * bq + offset)
                key = iota(0) + own_key
                if right is not None:
                    p = jnp.where(key <= at + right, p, 0.0)
                if left is not None:
                    p = jnp.where(key >= at - left, p, 0.0)
            weights = weights or vectors()
            # Numbers that threads have read give way to a copy of the next ones.
            plgpu.commit_smem()
            for used in (lse_used, r_used):
                plgpu.barrier_arrive(used)
            sums = tuple(
                total + jnp.sum(p * across(w), axis=1)
                for total, w in zip(sums, weights, strict=True)
            )
            turns.change()
            return sums

        features = lambda dim: plgpu.BlockSpec(
            block_shape=(bq, dim),
            index_map=lambda i: (first + i, 0),
            transforms=list(tiled),
        )
        specs = [
            features(q_ref.shape[3]),
            plgpu.BlockSpec(block_shape=(bq,), index_map=lambda i: (first + i,)),
            plgpu.BlockSpec(block_shape=(m, bq), index_map=lambda i: (0, first + i)),
        ]
        streams = [
            q_ref.at[example, :, head, :],
            lse_ref.at[example, head, :],
            r_ref.at[example],
        ]
        if dout_ref is not None:
            specs.append(features(dout_ref.shape[3]))
            streams.append(dout_ref.at[example, :, head, :])
        mosaic_gpu.pipeline(
            step,
            specs,
            steps=last - first + 1 if banded else q_blocks,
            stages=min(mosaic_gpu.STAGES, q_blocks),
            groups=groups,
            context=columns,
            manual_consumed_barriers=True,
        )(*streams)

    key_tile = lambda x: plgpu.SMEM((groups, bk, x.shape[3]), x.dtype, transforms=tiled)
    shared = [key_tile(x) for x in operands[3:5]]
    shared.append(plgpu.SMEM((groups, m, bk), jnp.float32))
    partial = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((b, h, m, nk + k_pad), jnp.float32),
        scratch_types=[
            shared,
            [plgpu.Barrier(num_barriers=groups)] * (1 + with_gradient),
            # On an H200 relevance gains 5% by turns; the plain product loses as much.
            *(mosaic_gpu.Turns.scratch(groups) if with_gradient else ()),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(h, (nk + k_pad) // (bk * groups), b),
        grid_names=("heads", "keys", "batch"),
        num_threads=groups + 1,
        thread_name="warp_group",
        interpret=interpret,
        kernel_name=f"attention_row_product_{attention.relevance}",
    )(*operands)
    return mosaic_gpu.sum_heads(attention, partial[..., :nk])
