"""Every benchmark still runs, on tiny shapes."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAMES = ["integrated_gradients", "rollout", "tracing", "attention_rows", "loading"]


@pytest.mark.parametrize("name", NAMES)
def test_small(name):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--small"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "|" in done.stdout


def test_every_benchmark_is_tried():
    helpers = {"timing"}
    assert {path.stem for path in BENCHMARKS.glob("*.py")} - helpers == set(NAMES)
