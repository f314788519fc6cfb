"""Block sizes: what the caller asks for, what was measured, or a rule of thumb.

`block_sizes.json` holds, for each device kind and minor version of JAX, the best block
sizes that `benchmarks/tune_kernels.py` found, and how it measured them. Nothing is
measured when a kernel is called; optima are flat, and a rule serves where no
measurement does.
"""

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from xviz_jax.kernels import dispatch
from xviz_jax.kernels.attention_map import AttentionMap

TABLE = Path(__file__).with_name("block_sizes.json")
# Vectors are told apart where a kernel takes another course.
_VECTOR_BUCKETS = (0, 1, 2, 8, 32, 128, 512)


def block_sizes(
    operation: str,
    attention: AttentionMap,
    config: Mapping[str, int] | None,
    *,
    vectors: int = 0,
    **defaults: int,
) -> tuple[int, ...]:
    """`config` over what was measured on this device over `defaults`, in their order.

    Raises:
      ValueError: `config` names no block size of the operation, or one below 1.
    """
    measured = best(
        key(operation, attention, vectors), dispatch.device_kind(), jax.__version__
    )
    return dispatch.block_sizes(config, **(defaults | measured))


def key(operation: str, attention: AttentionMap, vectors: int = 0) -> str:
    """What a measurement depends on: all that changes the course of a kernel."""
    nk, dim = attention.k.shape[1], attention.q.shape[3]
    gradient = attention.relevance != "attention"
    banded = attention.causal or attention.window is not None
    return "/".join(
        (
            operation,
            "gradient" if gradient else "attention",
            "linear" if attention.fuses_linearly else "extremum",
            f"m{min(n for n in _VECTOR_BUCKETS if n >= min(vectors, 512))}",
            f"d{dim}",
            attention.q.dtype.name,
            "banded" if banded else "full",
            f"2^{round(math.log2(nk))}",
        )
    )


def best(wanted: str, device_kind: str, version: str) -> dict[str, int]:
    """The measured block sizes for the key `wanted`, or of its nearest length."""
    minor = ".".join(version.split(".")[:2])
    measured = _table().get(device_kind, {}).get(minor, {}).get("measured", {})
    prefix, _, length = wanted.rpartition("2^")
    lengths = [int(k.rpartition("2^")[2]) for k in measured if k.startswith(prefix)]
    if not lengths:
        return {}
    nearest = min(lengths, key=lambda n: abs(n - int(length)))
    return measured[f"{prefix}2^{nearest}"]["config"]


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())
