# pyright: reportPrivateImportUsage=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# The names and signatures of JAX >= 0.11, which the oldest supported JAX lacks.
"""The walk of the Hopper kernels along the keys of each query.

Warp groups each hold a block of queries while blocks of keys stream through shared
memory once for all of them. Queries lie on the rows of a tile, so that what is summed
over keys is summed in registers.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from xviz_jax.kernels import mosaic_gpu
from xviz_jax.kernels.attention_map import AttentionMap


class Tile(NamedTuple):
    """What a step of `walk_keys` sees of a block of queries by keys.

    Attributes:
      products: q.k and, with a gradient, dout.v, `[block_q, block_k]`.
      seen: where attention is allowed, or None for everywhere.
      query: positions of the queries among the keys, int32.
      key: positions of the keys, int32.
      per_query: the numbers of its queries, `[block_q]` each.
      per_key: the numbers of its keys, for each array a list of `[block_k]`.
    """

    products: list[jax.Array]
    seen: jax.Array | None
    query: jax.Array
    key: jax.Array
    per_query: tuple[jax.Array, ...]
    per_key: list[list[jax.Array]]

    def along_rows(self, x: jax.Array) -> jax.Array:
        """A number of each query, along its row."""
        return lax.broadcast_in_dim(x, self.key.shape, [0])

    def along_columns(self, x: jax.Array) -> jax.Array:
        """A number of each key, along its column."""
        return lax.broadcast_in_dim(x, self.key.shape, [1])

    def keep_seen(self, x: jax.Array, otherwise: float) -> jax.Array:
        """`x` where attention is allowed."""
        return x if self.seen is None else jnp.where(self.seen, x, otherwise)


def walk_keys(
    operation: str,
    attention: AttentionMap,
    config: Mapping[str, int] | None,
    *,
    vectors: int = 0,
    per_query: Sequence[jax.Array] = (),
    per_key: Sequence[jax.Array] = (),
    start: Sequence[float],
    step: Callable[..., Sequence[jax.Array]],
    finish: Callable[..., Sequence[jax.Array]],
    outputs: int,
    interpret: Any,
    candidates: Sequence[tuple[int, int, int]] = ((64, 128, 2),),
) -> jax.Array:
    """Walks along the keys of each query, carrying a few numbers per query.

    Args:
      operation: names the kernel and its entries in the table of block sizes.
      attention: what defines the scores; with v and dout, their products too.
      config: sizes that the caller insists on; `block_q` is that of a warp group.
      vectors: as in `tuning.block_sizes`.
      per_query: float32 `[B, H, Nq]`, numbers of each query and head.
      per_key: float32 `[B, n, Nk]`, numbers of each key.
      start: the first values of what is carried, which is `[block_q]` each.
      step: `(tile, carry) -> carry`, where `tile` is a `Tile`.
      finish: `(per_query, carry) -> outputs`, `[block_q]` each.
      outputs: how many there are.
      interpret: as in `plgpu.kernel`.
      candidates: as in `block_sizes`; smaller ones follow.

    Returns:
      float32 `[B, H, outputs, Nq]`.
    """
    b, h, kv_heads, nq, nk = attention.shape
    numbers = sum(x.shape[1] for x in per_key) + 1
    bq, bk, groups = mosaic_gpu.block_sizes(
        operation,
        attention,
        config,
        vectors=vectors,
        candidates=[*candidates, (64, 64, 2), (64, 64, 1)],
        held=lambda bq, bk, groups: (
            groups * bq + mosaic_gpu.STAGES * bk,
            mosaic_gpu.STAGES * numbers * bk + outputs * groups * bq,
        ),
    )
    group = h // kv_heads
    q_pad, k_pad = -nq % (bq * groups), -nk % bk
    k_blocks = (nk + k_pad) // bk
    left, right = mosaic_gpu.band(attention)
    offset = attention.q_offset
    layout = plgpu.Layout.WGMMA
    tiled = mosaic_gpu.transforms()

    stationary = [mosaic_gpu.pad_lengths(attention.q, 1, q_pad)]
    streamed = [mosaic_gpu.pad_lengths(attention.k, 1, k_pad)]
    if attention.v is not None and attention.dout is not None:
        stationary.append(mosaic_gpu.pad_lengths(attention.dout, 1, q_pad))
        streamed.append(mosaic_gpu.pad_lengths(attention.v, 1, k_pad))
    own_numbers = [mosaic_gpu.pad_lengths(x, 2, q_pad) for x in per_query]
    key_numbers = [mosaic_gpu.pad_lengths(x, 2, k_pad) for x in per_key]
    guarded = attention.key_mask is not None or k_pad > 0
    if guarded:
        allowed = jnp.ones((b, nk), jnp.float32)
        if attention.key_mask is not None:
            allowed = attention.key_mask.astype(jnp.float32)
        key_numbers.append(mosaic_gpu.pad_lengths(allowed, 1, k_pad)[:, None])
    operands = [*stationary, *streamed, *own_numbers, *key_numbers]
    sizes = [len(x) for x in (stationary, streamed, own_numbers, key_numbers)]

    def split(refs):
        parts = []
        for size in sizes:
            parts.append(refs[:size])
            refs = refs[size:]
        return (*parts, refs)

    def body(*refs):
        fixed, walked, own, shared_by_keys, scratch = split(refs)
        out, tiles, results, barriers, *turn_barriers = scratch
        turns = mosaic_gpu.Turns(turn_barriers)
        example, head = lax.axis_index("batch"), lax.axis_index("heads")
        kv_head = lax.div(head, jnp.array(group, head.dtype))
        warp_group = lax.axis_index("warp_group")
        first_query = lax.axis_index("queries") * (groups * bq)
        own_query = first_query + warp_group * bq
        queries = pl.ds(own_query, bq)
        # The key blocks that any query of this thread block meets; at least one.
        first, last = jnp.int32(0), jnp.int32(k_blocks - 1)
        if left is not None:
            first = lax.div(jnp.maximum(first_query + offset - left, 0), bk)
            first = jnp.minimum(first, k_blocks - 1)
        if right is not None:
            key = first_query + groups * bq - 1 + offset + right
            last = jnp.maximum(jnp.minimum(lax.div(key, bk), last), first)
        rows, columns = layout.reduce(1), layout.reduce(0)

        def compute(pipeline):
            for n, ref in enumerate(fixed):
                plgpu.copy_gmem_to_smem(
                    ref.at[example, queries, head],
                    tiles[n].at[warp_group],
                    barriers.at[n * groups + warp_group],
                )
            for n in range(len(fixed)):
                plgpu.barrier_wait(barriers.at[n * groups + warp_group])
            carry = tuple(
                plgpu.layout_cast(jnp.full((bq,), x, jnp.float32), rows) for x in start
            )
            queries_numbers = tuple(
                # Out of global memory there is no optimized way.
                plgpu.load(ref.at[example, head, queries], layout=rows, optimized=False)
                for ref in own
            )
            walk = functools.partial(pipeline, (queries_numbers, carry))
            ends = finish(*turns.around(walk, warp_group))
            for n, end in enumerate(ends):
                results.at[warp_group, n][...] = end
            plgpu.commit_smem()
            for n in range(outputs):
                plgpu.copy_smem_to_gmem(
                    results.at[warp_group, n], out.at[example, head, n, queries]
                )
            plgpu.wait_smem_to_gmem(0)

        def walk(index, *refs):
            *refs, (queries_numbers, carry) = refs
            walked_tiles, by_key = refs[: sizes[1]], refs[sizes[1] :]
            products, _ = mosaic_gpu.wgmma(
                [
                    (tile.at[warp_group], block)
                    for tile, block in zip(tiles, walked_tiles, strict=True)
                ],
                meanwhile=turns.change,
            )
            shape = (bq, bk)
            iota = lambda axis: plgpu.broadcasted_iota(
                jnp.int32, shape, axis, layout=layout
            )
            query = iota(0) + (own_query + offset)
            key = iota(1) + (first + index[0]) * bk
            by_key = [
                [plgpu.load(ref.at[n], layout=columns) for n in range(ref.shape[0])]
                for ref in by_key
            ]
            if by_key:
                # Numbers that threads have read give way to a copy of the next ones.
                plgpu.commit_smem()
            seen = None
            if guarded:
                (flags,) = by_key.pop()
                seen = lax.broadcast_in_dim(flags, shape, [1]) > 0.0
            for side, ok in (
                (right, lambda side: key <= query + side),
                (left, lambda side: key >= query - side),
            ):
                if side is not None:
                    seen = ok(side) if seen is None else seen & ok(side)
            tile = Tile(products, seen, query, key, queries_numbers, by_key)
            carry = tuple(step(tile, carry))
            turns.change()
            return queries_numbers, carry

        vector = lambda n: plgpu.BlockSpec(
            block_shape=(n, bk), index_map=lambda i: (0, first + i)
        )
        specs = [
            plgpu.BlockSpec(
                block_shape=(bk, ref.shape[3]),
                index_map=lambda i: (first + i, 0),
                transforms=list(tiled),
            )
            for ref in walked
        ]
        specs += [vector(ref.shape[1]) for ref in shared_by_keys]
        streams = [ref.at[example, :, kv_head, :] for ref in walked]
        streams += [ref.at[example] for ref in shared_by_keys]
        banded = left is not None or right is not None
        mosaic_gpu.pipeline(
            walk,
            specs,
            steps=last - first + 1 if banded else k_blocks,
            stages=min(mosaic_gpu.STAGES, k_blocks),
            groups=groups,
            context=compute,
        )(*streams)

    tile = lambda x: plgpu.SMEM((groups, bq, x.shape[3]), x.dtype, transforms=tiled)
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((b, h, outputs, nq + q_pad), jnp.float32),
        scratch_types=[
            [tile(x) for x in stationary],
            plgpu.SMEM((groups, outputs, bq), jnp.float32),
            plgpu.Barrier(num_barriers=len(stationary) * groups),
            *mosaic_gpu.Turns.scratch(groups),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(h, (nq + q_pad) // (bq * groups), b),
        grid_names=("heads", "queries", "batch"),
        num_threads=groups + 1,
        thread_name="warp_group",
        interpret=interpret,
        kernel_name=operation,
    )(*operands)
    return out[..., :nq]
