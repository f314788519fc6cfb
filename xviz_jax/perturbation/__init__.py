"""Attribution by taking parts of the input away: one method, one file."""

from xviz_jax.perturbation.exact_shapley import exact_shapley as exact_shapley
from xviz_jax.perturbation.feature_ablation import feature_ablation as feature_ablation
from xviz_jax.perturbation.features import patches as patches
from xviz_jax.perturbation.kernel_shap import kernel_shap as kernel_shap
from xviz_jax.perturbation.learned_mask import learned_mask as learned_mask
from xviz_jax.perturbation.leave_one_out import leave_one_out as leave_one_out
from xviz_jax.perturbation.occlusion import occlusion as occlusion
from xviz_jax.perturbation.rise import rise as rise
from xviz_jax.perturbation.shapley_value_sampling import (
    shapley_value_sampling as shapley_value_sampling,
)
