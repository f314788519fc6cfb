"""Every benchmark still runs, on tiny shapes."""

import os
import subprocess
import sys
from pathlib import Path

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


def test_every_benchmark_is_tried():
    shared = {"timing", "twins"}
    assert {path.stem for path in BENCHMARKS.glob("*.py")} - shared == set(NAMES)
