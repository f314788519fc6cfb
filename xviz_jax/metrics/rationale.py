"""What the output keeps, or loses, with the highest scores: ERASER's two averages."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from xviz_jax import chunks
from xviz_jax.attribution import Target
from xviz_jax.metrics import curves, imputers
from xviz_jax.metrics.features import Output, check_output, prepare
from xviz_jax.metrics.measurement import Measurement, Metric, conclude

# The paper's, of the tokens.
FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)


def average_drop(
    name: str,
    model: Callable,
    kept: bool,
    fractions: Sequence[float],
    imputer: imputers.Imputer | None,
    groups: Any,
    output: Output,
    chunk: int,
    argnums: int,
) -> Metric:
    """The mean drop of the output with the top fractions alone, or without them."""
    chunks.positive(chunk, "chunk")
    check_output(output)
    taken = imputers.check(imputer)
    shares = np.asarray(fractions, np.float64)
    if shares.ndim != 1 or not len(shares) or not ((shares > 0) & (shares <= 1)).all():
        raise ValueError(f"`fractions` are from above 0 to 1, got {fractions}")

    def measure(*args: Any, target: Target = None, key: Any = None) -> Measurement:
        seen = prepare(name, model, args, argnums, target, groups, taken, output)
        sizes = np.maximum(np.floor(shares * seen.count + 0.5).astype(int), 1)
        # With nothing present too, a model that nothing changes is told from scores
        # that miss what does.
        absent = np.array([seen.count, *(() if kept else sizes)])
        found = curves.values(seen, key, chunk, absent, sizes if kept else None)
        drop = seen.output - found[1:]
        return conclude(
            jnp.mean(drop),
            [*seen.checks(found), seen.equal],
            fraction=jnp.asarray(sizes / seen.count, jnp.float32),
            drop=drop,
        )

    better = "lower" if kept else "higher"
    return Metric(name, better, frozenset({"key"} if taken.random else ()), measure)
