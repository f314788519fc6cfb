"""Compiles the TPU kernels ahead of time, for TPUs that are not there.

Lowering alone misses what only the compiler knows, such as tiles too large for a
core's memory. This needs libtpu, which would make every other test look for a TPU, so
it runs as a script in an environment of its own:

    python tests/kernels/aot_tpu.py [v5e:2x2 v6e:2x2 ...]

Exits with the number of kernels that did not compile.
"""

import functools
import itertools
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

from xviz_jax.kernels.attention_lse import attention_lse
from xviz_jax.kernels.attention_row_product import attention_row_product

RELU = "relu_gradient_x_attention"


def programs(sharding):
    """Names, functions and abstract arguments: each course the kernels can take."""

    def array(*shape, dtype: Any = jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def arrays(n, m, dtype, dim, relevance="attention", masked=False):
        queries, keys = (array(2, n, heads, dim, dtype=dtype) for heads in (4, 2))
        found = dict(r=array(2, m, n), q=queries, k=keys)
        if relevance != "attention":
            found |= dict(v=keys, dout=queries)
        if masked:
            found["key_mask"] = array(2, n, dtype=jnp.bool_)
        return found

    product: Any = functools.partial(attention_row_product, implementation="mosaic_tpu")
    for dtype, n, m in itertools.product(
        (jnp.float32, jnp.bfloat16), (197, 4096), (1, 5)
    ):
        for relevance, fusion in (("attention", "mean"), (RELU, "mean"), (RELU, "max")):
            name = f"{relevance} {fusion} {dtype.__name__} N={n} M={m}"
            function = functools.partial(
                product, relevance=relevance, head_fusion=fusion
            )
            yield name, function, arrays(n, m, dtype, 64, relevance)
    for name, scoring, dim in (
        ("causal", dict(causal=True), 80),
        ("window", dict(causal=True, window=(256, None)), 128),
        ("softcap", dict(softcap=30.0, window=(99, 7)), 16),
    ):
        function = functools.partial(product, **scoring)
        yield name, function, arrays(2000, 1, jnp.bfloat16, dim)
        lse = functools.partial(attention_lse, implementation="mosaic_tpu", **scoring)
        qk = arrays(2000, 1, jnp.bfloat16, dim)
        del qk["r"]
        yield f"lse {name}", lse, qk
    yield "key_mask", product, arrays(2000, 9, jnp.bfloat16, 64, masked=True)
    yield "512 vectors", product, arrays(4096, 512, jnp.float32, 64)
    fast = functools.partial(product, precision="fast")
    yield "fast", fast, arrays(2000, 9, jnp.bfloat16, 64)


def main(names):
    failures = 0
    for name in names:
        description = topologies.get_topology_desc(name, platform="tpu")
        device = description.devices[0]
        start, compiled = time.perf_counter(), 0
        for program, function, arrays in programs(SingleDeviceSharding(device)):
            try:
                text = jax.jit(function).lower(**arrays).compile().as_text()
                if "tpu_custom_call" not in (text or ""):
                    raise AssertionError("the compiled program holds no kernel")
                compiled += 1
            except Exception as error:
                failures += 1
                print(f"FAILED {name}: {program}: {str(error)[:400]}", flush=True)
        seconds = time.perf_counter() - start
        print(f"{device.device_kind}: compiled {compiled} programs in {seconds:.0f} s")
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["v5e:2x2", "v6e:2x2"]))
