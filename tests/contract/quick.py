"""Compilation without most optimizations, for tests whose programs run for an instant.

It takes half of the time; results differ by rounding. A module takes part by importing
the fixture. Tests of flops and of equality to the bit do not.
"""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
