"""Gradient-based visualization: one method, one file."""

from xviz_jax.gradients.blur_integrated_gradients import (
    blur_integrated_gradients as blur_integrated_gradients,
)
from xviz_jax.gradients.conductance import conductance as conductance
from xviz_jax.gradients.expected_gradients import (
    expected_gradients as expected_gradients,
)
from xviz_jax.gradients.grad_cam import grad_cam as grad_cam
from xviz_jax.gradients.guided_integrated_gradients import (
    guided_integrated_gradients as guided_integrated_gradients,
)
from xviz_jax.gradients.hires_cam import hires_cam as hires_cam
from xviz_jax.gradients.input_x_gradient import input_x_gradient as input_x_gradient
from xviz_jax.gradients.integrated_gradients import (
    integrated_gradients as integrated_gradients,
)
from xviz_jax.gradients.internal_influence import (
    internal_influence as internal_influence,
)
from xviz_jax.gradients.many_targets import many_targets as many_targets
from xviz_jax.gradients.neuron import neuron as neuron
from xviz_jax.gradients.saliency import saliency as saliency
from xviz_jax.gradients.smooth import smooth as smooth
from xviz_jax.gradients.together import together as together
