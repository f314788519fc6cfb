"""Every benchmark still runs, on tiny shapes."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import SHARED

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAMES = [
    "integrated_gradients",
    "rollout",
    "tracing",
    "attention_methods",
    "attention_rows",
    "loading",
    "audit",
    "comparison",
    "gpu",
    "killed_audit",
    "tune_kernels",
]


@pytest.mark.parametrize("name", NAMES)
def test_small(name):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--small"]
    quick = {**os.environ, **SHARED, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=quick
    )
    assert "|" in done.stdout


def test_a_kernel_that_gives_nan_is_wrong(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    gpu = importlib.import_module("gpu")
    right, nan = np.ones(3), np.array([1.0, np.nan, 1.0])
    assert gpu.distance((right, np.array([np.inf])), (right, np.array([np.inf]))) == 0
    assert gpu.distance((right, right), (right, 2 * right)) == 0.5
    for leaves in ((nan, right), (right, nan)):
        assert not gpu.distance(leaves, (right, right)) <= 2e-5


def test_every_benchmark_is_tried():
    shared = {"timing", "twins"}
    assert {path.stem for path in BENCHMARKS.glob("*.py")} - shared == set(NAMES)
