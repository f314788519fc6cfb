# pyright: reportPrivateImportUsage=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# The names and signatures of JAX >= 0.11, which the oldest supported JAX lacks.
"""What the Hopper kernels share: what they support, their blocks, their products."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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


def pipeline(
    step: Callable[..., Any],
    specs: Sequence[Any],
    *,
    steps: Any,
    stages: int,
    groups: int,
    context: Callable[..., None],
    **options: Any,
) -> Callable[..., None]:
    """Calls `step` with block after block, which one more warp group copies.

    Args:
      step: `(index, *blocks, carry) -> carry`.
      specs: of the blocks.
      steps: how many there are, which may be traced.
      stages: how many blocks are on their way, or read, at a time.
      groups: warp groups that compute.
      context: `(pipeline)`, which calls it with the first carry.
      **options: as in `plgpu.emit_pipeline_warp_specialized`.
    """
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        in_specs=specs,
        max_concurrent_steps=stages,
        num_compute_wgs=groups,
        memory_registers=40,
        wg_axis="warp_group",
        compute_context=context,
        **options,
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
