"""High-performance attribution in JAX.

`jax.grad` turns a function into its gradient. `xviz_jax` turns a function into its
explanation: every method has the form

    method(model, *, options) -> explain(x, *rest, target=None, key=None) -> Attribution

for a `model` of one example, and composes with `jit`, `vmap` and `shard_map`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from xviz_jax import tracing as tracing
from xviz_jax._version import __version__ as __version__
from xviz_jax.attention import attention_relevance as attention_relevance
from xviz_jax.attention import attention_rollout as attention_rollout
from xviz_jax.attribution import Attribution as Attribution
from xviz_jax.attribution import single as single
from xviz_jax.gradients import input_x_gradient as input_x_gradient
from xviz_jax.gradients import integrated_gradients as integrated_gradients
from xviz_jax.gradients import saliency as saliency

if TYPE_CHECKING:
    from xviz_jax import models as models
    from xviz_jax import plotting as plotting

# These need flax and matplotlib, which take longer to import than JAX.
_LAZY = ("models", "plotting")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"xviz_jax.{name}")
    raise AttributeError(f"module 'xviz_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
