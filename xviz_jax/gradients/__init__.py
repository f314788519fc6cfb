"""Gradient-based visualization: one method, one file."""

from xviz_jax.gradients.input_x_gradient import input_x_gradient as input_x_gradient
from xviz_jax.gradients.integrated_gradients import (
    integrated_gradients as integrated_gradients,
)
from xviz_jax.gradients.saliency import saliency as saliency
