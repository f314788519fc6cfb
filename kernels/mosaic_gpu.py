# pyright: reportPrivateImportUsage=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# The names and signatures of JAX >= 0.11, which the oldest supported JAX lacks.
"""What the Hopper kernels share: what they support, and the walk along the keys.

Warp groups each hold a block of queries while blocks of keys stream through shared
memory once for all of them. Queries lie on the rows of a tile, so that what is summed
over keys is summed in registers.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from xviz_jax.kernels import tuning
from xviz_jax.kernels.attention_map import AttentionMap

LOG2_E = math.log2(math.e)
# What a thread block of an H100 may have, less some for barriers and reductions.
_SHARED_BYTES = 227 * 1024 - 4096
# Blocks that are on their way, or read, at a time.
STAGES = 3


def require_support(attention: AttentionMap) -> None:
    """Raises NotImplementedError for what no GPU kernel here computes."""
    if not hasattr(plgpu, "kernel") or not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError(
            f"implementation='mosaic_gpu' wants JAX >= 0.11, this is {jax.__version__}"
        )
    for name in ("mask", "bias", "threshold", "positions", "softcap"):
        if getattr(attention, name) is not None:
            raise NotImplementedError(f"mosaic_gpu does not support {name}")
    if attention.q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"mosaic_gpu supports q of bfloat16 or float16, got {attention.q.dtype}"
        )
    for name in ("q", "v"):
        x = getattr(attention, name)
        if x is not None and x.shape[3] % 64:
            raise NotImplementedError(
                f"mosaic_gpu supports head_dim in multiples of 64, got {name} of "
                f"{x.shape[3]}"
            )
    if jax.default_backend() == "gpu":
        require_device(attention, jax.devices()[0])


def require_device(attention: AttentionMap, device: Any) -> None:
    """Raises NotImplementedError for a GPU, or its software, that is no help here."""
    if getattr(device, "compute_capability", None) != "9.0":
        raise NotImplementedError(
            f"mosaic_gpu wants compute capability 9.0, this is {device}"
        )
    version = re.search(r"cuda (\d+)", device.client.platform_version)
    banded = attention.causal or attention.window is not None
    # JAX's own attention kernels refuse the same versions.
    if banded and version and 12080 <= int(version[1]) < 12091:
        raise NotImplementedError(
            "mosaic_gpu does not support causal or window on CUDA 12.8.0 to 12.9.1, "
            "whose ptxas compiles such masks wrongly; install CUDA 13"
        )


def block_sizes(
    operation: str,
    attention: AttentionMap,
    config: Mapping[str, int] | None,
    *,
    vectors: int,
    candidates: Sequence[tuple[int, int, int]],
    held: Callable[[int, int, int], tuple[int, int]],
) -> tuple[int, int, int]:
    """Queries, keys and warp groups of a thread block.

    Args:
      operation: as in `tuning.block_sizes`.
      attention: what defines the scores.
      config: sizes that the caller insists on.
      vectors: as in `tuning.block_sizes`.
      candidates: the sizes to take, the first of them that fits.
      held: `(block_q, block_k, warp_groups)` -> how many rows of features, and how
        many float32 numbers, shared memory holds at a time.

    Raises:
      NotImplementedError: none fits into shared memory, or not the ones of `config`.
    """
    width = attention.q.shape[3]
    if attention.v is not None:
        width += attention.v.shape[3]

    def taken(blocks):
        rows, numbers = held(*blocks)
        return rows * width * attention.q.dtype.itemsize + 4 * numbers

    fitting = [blocks for blocks in candidates if taken(blocks) <= _SHARED_BYTES]
    bq, bk, groups = (fitting or candidates)[0]
    bq, bk, groups = tuning.block_sizes(
        operation,
        attention,
        config,
        vectors=vectors,
        block_q=bq,
        block_k=bk,
        warp_groups=groups,
    )
    if bq % 64 or bk % 64:
        raise ValueError(f"config wants blocks in multiples of 64, got {bq} and {bk}")
    if taken((bq, bk, groups)) > _SHARED_BYTES:
        raise NotImplementedError(
            f"mosaic_gpu has {_SHARED_BYTES} bytes of shared memory; head_dim {width} "
            f"(of q and v together), {vectors} vectors and {bq} x {bk} blocks want "
            f"{taken((bq, bk, groups))}"
        )
    return bq, bk, groups


def band(attention: AttentionMap) -> tuple[int | None, int | None]:
    """How far to the left and to the right of itself a query sees; None is open."""
    left, right = attention.window or (None, None)
    if attention.causal:
        right = 0 if right is None else min(right, 0)
    return left, right


def pad_lengths(x: jax.Array, axis: int, n: int, value: float = 0.0) -> jax.Array:
    """`x` with `n` more entries at the end of an axis."""
    widths = [(0, n if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


def transforms() -> tuple[Any, ...]:
    """How tiles that the tensor cores read lie in shared memory."""
    return plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)


def wgmma(
    pairs: Sequence[tuple[Any, Any]], meanwhile: Callable[[], Any] = lambda: None
) -> tuple[list[jax.Array], Any]:
    """fixed streamed^T in float32 for each pair of tiles in shared memory.

    `meanwhile` runs while the tensor cores do; its result is the second.
    """

    def multiply(*accumulators):
        for accumulator, (fixed, streamed) in zip(accumulators, pairs, strict=True):
            plgpu.wgmma(accumulator, fixed, streamed.transpose((1, 0)))
        found = meanwhile()
        return [accumulator[...] for accumulator in accumulators], found

    shape = lambda fixed, streamed: (fixed.shape[0], streamed.shape[0])
    return pl.run_scoped(
        multiply, *(plgpu.ACC(shape(*pair), jnp.float32) for pair in pairs)
    )


class Turns:
    """Two warp groups in turns: one multiplies while one takes exponentials.

    Left alone they fall into step, and then the special-function units wait for the
    tensor cores and these for those: as FlashAttention-3 has them (Shah et al. 2024).
    """

    def __init__(self, barriers: Sequence[Any]):
        """The barrier of `scratch`, or none, where there are no turns."""
        self.barriers = barriers

    @staticmethod
    def scratch(groups: int) -> list[Any]:
        """What turns take of a kernel's scratch; other numbers of groups have none."""
        return [plgpu.Barrier(num_arrivals=2)] if groups == 2 else []

    def change(self) -> None:
        """Waits for the other warp group to come to its next turn."""
        for barrier in self.barriers:
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)

    def around(self, walk: Callable[[], Any], warp_group: Any) -> Any:
        """`walk()`, each step of which changes turns twice."""
        if not self.barriers:
            return walk()
        pl.when(warp_group == 1)(self.change)
        found = walk()
        pl.when(warp_group == 0)(self.change)
        return found


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
    bq, bk, groups = block_sizes(
        operation,
        attention,
        config,
        vectors=vectors,
        candidates=[*candidates, (64, 64, 2), (64, 64, 1)],
        held=lambda bq, bk, groups: (
            groups * bq + STAGES * bk,
            STAGES * numbers * bk + outputs * groups * bq,
        ),
    )
    group = h // kv_heads
    q_pad, k_pad = -nq % (bq * groups), -nk % bk
    k_blocks = (nk + k_pad) // bk
    left, right = band(attention)
    offset = attention.q_offset
    layout = plgpu.Layout.WGMMA
    tiled = transforms()

    stationary = [pad_lengths(attention.q, 1, q_pad)]
    streamed = [pad_lengths(attention.k, 1, k_pad)]
    if attention.v is not None and attention.dout is not None:
        stationary.append(pad_lengths(attention.dout, 1, q_pad))
        streamed.append(pad_lengths(attention.v, 1, k_pad))
    own_numbers = [pad_lengths(x, 2, q_pad) for x in per_query]
    key_numbers = [pad_lengths(x, 2, k_pad) for x in per_key]
    guarded = attention.key_mask is not None or k_pad > 0
    if guarded:
        allowed = jnp.ones((b, nk), jnp.float32)
        if attention.key_mask is not None:
            allowed = attention.key_mask.astype(jnp.float32)
        key_numbers.append(pad_lengths(allowed, 1, k_pad)[:, None])
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
        turns = Turns(turn_barriers)
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
            products, _ = wgmma(
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
        plgpu.emit_pipeline_warp_specialized(
            walk,
            grid=(last - first + 1 if banded else k_blocks,),
            max_concurrent_steps=min(STAGES, k_blocks),
            num_compute_wgs=groups,
            memory_registers=40,
            wg_axis="warp_group",
            compute_context=compute,
            in_specs=specs,
        )(*streams)

    tile = lambda x: plgpu.SMEM((groups, bq, x.shape[3]), x.dtype, transforms=tiled)
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((b, h, outputs, nq + q_pad), jnp.float32),
        scratch_types=[
            [tile(x) for x in stationary],
            plgpu.SMEM((groups, outputs, bq), jnp.float32),
            plgpu.Barrier(num_barriers=len(stationary) * groups),
            *Turns.scratch(groups),
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


def require_linear(attention: AttentionMap) -> None:
    """Raises NotImplementedError for a fusion in which heads meet before a sum."""
    if not attention.fuses_linearly:
        raise NotImplementedError(
            f"mosaic_gpu does not support head_fusion={attention.head_fusion!r} here"
        )


def base_two(lse: jax.Array) -> jax.Array:
    """`lse` for exp2; infinite, and so a row of zeros, where nothing is attended."""
    return jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2_E)


def counted_gradient(attention: AttentionMap, gradient: jax.Array) -> jax.Array:
    """The gradient as `attention.relevance` counts it."""
    if attention.relevance == "relu_gradient_x_attention":
        return jnp.maximum(gradient, 0.0)
    return gradient


def sum_heads(attention: AttentionMap, partial: jax.Array) -> jax.Array:
    """The weighted sum over heads of `[B, H, M, N]`, as `[B, M, N]`."""
    weights = jnp.broadcast_to(attention.fusion_weights(), partial.shape[:2])
    return jnp.sum(weights[..., None, None] * partial, axis=1)
