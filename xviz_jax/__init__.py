"""High-performance attribution in JAX.

`jax.grad` turns a function into its gradient. `xviz_jax` turns a function into its
explanation: every method has the form

    method(model, *, options) -> explain(x, *rest, target=None, key=None) -> Attribution

for a `model` of one example, and composes with `jit`, `vmap` and `shard_map`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from xviz_jax import baselines as baselines
from xviz_jax import batch as batch
from xviz_jax import metrics as metrics
from xviz_jax import tracing as tracing
from xviz_jax._version import __version__ as __version__
from xviz_jax.attention import attcat as attcat
from xviz_jax.attention import attention_flow as attention_flow
from xviz_jax.attention import attention_grad_cam as attention_grad_cam
from xviz_jax.attention import attention_relevance as attention_relevance
from xviz_jax.attention import attention_rollout as attention_rollout
from xviz_jax.attention import attention_statistics as attention_statistics
from xviz_jax.attention import attn_lrp as attn_lrp
from xviz_jax.attention import cp_lrp as cp_lrp
from xviz_jax.attention import grad_sam as grad_sam
from xviz_jax.attention import gradient_rollout as gradient_rollout
from xviz_jax.attention import legrad as legrad
from xviz_jax.attention import raw_attention as raw_attention
from xviz_jax.attention import special_tokens as special_tokens
from xviz_jax.attention import value_zeroing as value_zeroing
from xviz_jax.attribution import Attribution as Attribution
from xviz_jax.attribution import single as single
from xviz_jax.comparison import Comparison as Comparison
from xviz_jax.comparison import compare as compare
from xviz_jax.gradients import blur_integrated_gradients as blur_integrated_gradients
from xviz_jax.gradients import conductance as conductance
from xviz_jax.gradients import expected_gradients as expected_gradients
from xviz_jax.gradients import grad_cam as grad_cam
from xviz_jax.gradients import (
    guided_integrated_gradients as guided_integrated_gradients,
)
from xviz_jax.gradients import hires_cam as hires_cam
from xviz_jax.gradients import input_x_gradient as input_x_gradient
from xviz_jax.gradients import integrated_gradients as integrated_gradients
from xviz_jax.gradients import internal_influence as internal_influence
from xviz_jax.gradients import many_targets as many_targets
from xviz_jax.gradients import neuron as neuron
from xviz_jax.gradients import saliency as saliency
from xviz_jax.gradients import smooth as smooth
from xviz_jax.gradients import together as together
from xviz_jax.perturbation import exact_shapley as exact_shapley
from xviz_jax.perturbation import feature_ablation as feature_ablation
from xviz_jax.perturbation import kernel_shap as kernel_shap
from xviz_jax.perturbation import learned_mask as learned_mask
from xviz_jax.perturbation import leave_one_out as leave_one_out
from xviz_jax.perturbation import occlusion as occlusion
from xviz_jax.perturbation import patches as patches
from xviz_jax.perturbation import rise as rise
from xviz_jax.perturbation import shapley_value_sampling as shapley_value_sampling

if TYPE_CHECKING:
    from xviz_jax import audit as audit
    from xviz_jax import models as models
    from xviz_jax import plotting as plotting

# These need flax, matplotlib or an extra, which take longer to import than JAX.
_LAZY = ("audit", "models", "plotting")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"xviz_jax.{name}")
    raise AttributeError(f"module 'xviz_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
