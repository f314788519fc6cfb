"""Rows are made in memory that grows with the length, not with its square."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from xviz_jax.kernels.attention_statistics import attention_statistics
from xviz_jax.kernels.rollout_rows import rollout_rows

HEADS, DIM = 4, 32
ROOT = Path(__file__).parent.parent.parent


def rollout(q, k):
    return rollout_rows(q, k, [0])


def causal_window(q, k):
    return rollout_rows(q, k, [-1], causal=True, window=(512, 0))


def relevance(q, k):
    return rollout_rows(
        q,
        k,
        [-1],
        causal=True,
        residual="add",
        relevance="relu_gradient_x_attention",
        vs=k,
        douts=q,
    )


def statistics(q, k):
    return attention_statistics(q[0], k[0], causal=True)


@functools.cache
def scratch(function, length):
    """Bytes that the compiled program takes beside arguments and results."""
    shape = jax.ShapeDtypeStruct((2, length, HEADS, DIM), jnp.float32)
    analysis = jax.jit(function).lower(shape, shape).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("function", [rollout, causal_window, relevance, statistics])
def test_scratch_grows_with_the_length(function):
    sizes = [scratch(function, length) for length in (4096, 16384)]
    assert sizes[1] <= 4.2 * sizes[0]
    one_map = 16384**2 * 4
    assert sizes[1] < one_map / 4


def test_peak_of_a_run():
    """Two layers of 4,096 tokens: 12 maps of 67 MB each in every layer."""
    script = ROOT / "benchmarks" / "attention_rows.py"
    command = [sys.executable, str(script), "--rounds", "1", "--worker"]
    done = subprocess.run(
        [*command, "rollout_rows", "4096", "2"],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert json.loads(done.stdout.splitlines()[-1])["bytes"] < 160e6
