"""Compiles the TPU kernels ahead of time, for TPUs that are not there.

Lowering alone misses what only the compiler knows, such as tiles too large for a
core's memory. This needs libtpu, which would make every other test look for a TPU, so
it runs as a script in an environment of its own:

    python tests/kernels/aot_tpu.py [v5e:2x2 v6e:2x2 ...]

Exits with the number of programs that did not do as they should: hold the kernel, or
be refused where its tiles overflow the memory.
"""

import functools
import os
import sys
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from xviz_jax.kernels.attention_col_product import attention_col_product
from xviz_jax.kernels.attention_fused_matrix import attention_fused_matrix
from xviz_jax.kernels.attention_lse import attention_lse
from xviz_jax.kernels.attention_row_product import attention_row_product
from xviz_jax.kernels.attention_statistics import attention_statistics

RELU = {"relevance": "relu_gradient_x_attention"}
MAX = {"head_fusion": "max"}
CAUSAL = {"causal": True}
F32, BF16 = jnp.float32, jnp.bfloat16

# Each course a kernel can take, at a length that fills its blocks and one that does
# not. Most products compile a logsumexp too, of the same masks.
PROGRAMS: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (attention_row_product, {}, dict(n=4096, dtype=F32)),
    (attention_row_product, {}, dict(n=4096)),
    (attention_row_product, RELU, dict(n=4096, m=5)),
    (attention_row_product, RELU, dict(n=4096, dtype=F32)),
    (attention_row_product, RELU | MAX, dict(n=4096)),
    (attention_row_product, RELU | MAX, dict(n=197, m=5, dtype=F32)),
    (attention_row_product, {}, dict(n=197)),
    (attention_row_product, CAUSAL, dict(dim=80)),
    (attention_row_product, CAUSAL | dict(window=(256, None)), dict(dim=128)),
    (attention_row_product, dict(softcap=30.0, window=(99, 7)), dict(dim=16)),
    (attention_row_product, {}, dict(m=9, masked=True)),
    (attention_row_product, dict(precision="fast"), dict(m=9)),
    (attention_row_product, {}, dict(n=4096, m=512, dtype=F32)),
    (attention_lse, CAUSAL | dict(window=(256, None)), dict(masked=True)),
    (attention_lse, {}, dict(n=4096, dtype=F32)),
    (attention_col_product, {}, dict(n=4096)),
    (attention_col_product, RELU | MAX | CAUSAL, dict(m=9, dtype=F32, masked=True)),
    (attention_fused_matrix, CAUSAL, dict(n=4096)),
    (attention_fused_matrix, RELU | MAX, dict(n=197, dtype=F32)),
    (attention_statistics, dict(top_k=4), dict(n=4096, marked=True)),
    (attention_statistics, CAUSAL | dict(top_k=0), dict(n=197, dtype=F32)),
    (attention_statistics, dict(window=(99, 7), top_k=12), dict(dim=128, masked=True)),
]
# Two blocks of keys, one arriving while the other is read, take 64 MB.
TOO_LARGE = dict(config=dict(block_q=128, block_k=2048))


def arrays(
    operation: Any,
    sharding: Any,
    *,
    n: int = 2000,
    m: int = 1,
    dim: int = 64,
    dtype: Any = BF16,
    gradient: bool = False,
    masked: bool = False,
    marked: bool = False,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract arguments of an operation, of two examples, 4 heads and 2 key heads."""

    def array(*shape, dtype: Any):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    queries, keys = (array(2, n, heads, dim, dtype=dtype) for heads in (4, 2))
    found = dict(q=queries, k=keys)
    if gradient:
        found |= dict(v=keys, dout=queries)
    vectors = {attention_row_product: "r", attention_col_product: "x"}.get(operation)
    if vectors is not None:
        found[vectors] = array(2, m, n, dtype=jnp.float32)
    for name, given in (("key_mask", masked), ("marked_keys", marked)):
        if given:
            found[name] = array(2, n, dtype=jnp.bool_)
    return found


def compile_for(sharding: Any, operation: Any, static: Any, shapes: Any) -> str:
    """The text of the compiled program."""
    function = functools.partial(operation, implementation="mosaic_tpu", **static)
    gradient = "relevance" in static
    arguments = arrays(operation, sharding, gradient=gradient, **shapes)
    return jax.jit(function).lower(**arguments).compile().as_text() or ""


def main(names: list[str]) -> int:
    failures = 0
    for name in names:
        description = topologies.get_topology_desc(name, platform="tpu")
        device = description.devices[0]
        sharding = SingleDeviceSharding(device)
        start, compiled = time.perf_counter(), 0
        for operation, static, shapes in PROGRAMS:
            program = f"{operation.__name__} {static} {shapes}"
            try:
                text = compile_for(sharding, operation, static, shapes)
                if "tpu_custom_call" not in text or operation.__name__ not in text:
                    raise AssertionError("the compiled program holds no kernel")
                compiled += 1
            except Exception as error:
                failures += 1
                print(f"FAILED {name}: {program}: {str(error)[:400]}", flush=True)
        try:
            compile_for(sharding, attention_lse, TOO_LARGE, dict(n=2048, dim=8192))
            refusal = ""
        except Exception as error:
            refusal = str(error)
        if "vmem" not in refusal.lower():
            failures += 1
            print(f"FAILED {name}: {TOO_LARGE} wants a refusal, got {refusal[:400]!r}")
        seconds = time.perf_counter() - start
        print(
            f"{device.device_kind}: {compiled} of {len(PROGRAMS)} programs compiled, "
            f"in {seconds:.0f} s; tiles too large: {refusal[:60]!r}",
            flush=True,
        )
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["v5e:2x2", "v6e:2x2"]))
