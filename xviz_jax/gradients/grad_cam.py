"""Grad-CAM (Selvaraju et al., 2017, arXiv 1610.02391)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax.attribution import Attribution, Target
from xviz_jax.gradients.activation_map import activation_and_gradient
from xviz_jax.tracing import Site


def grad_cam(
    model: Callable,
    *,
    at: str | Site | None = None,
    channel_axis: int | None = None,
    turn: int = -1,
    rectify: bool = True,
) -> Callable[..., Attribution]:
    """Attributes an output to places of a feature map by its channels' mean gradient.

    Where in the picture is what speaks for this class, at the resolution of a late
    layer? Channels are weighted by their gradient, averaged over all places, so a
    channel that matters in one place is credited in all: `hires_cam` is exact where
    this is not. Never negative unless `rectify` is off. Conserves nothing. Costs one
    forward and one backward pass. Sums in float32.

    Args:
      model: Maps one example to logits; any JAX function.
      at: The activation: a site that tracing found, or its name; mark one with
        `jax.ad_checkpoint.checkpoint_name`. By default the last value so marked, or
        else the input of the last attention block, or else the output of the last
        convolution, its bias included, before whatever bends it.
      channel_axis: The axis of channels or features; by default a convolution's own,
        and the last of anything else. The others are places, but for axes of size 1
        before it, which are dropped.
      turn: Which turn, where the activation lies in a loop over layers.
      rectify: Set places that speak against the target to zero, as the paper does.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, with one score for each
      place of the activation: `[height, width]` of a convolution's, `[length]` of a
      transformer's tokens, the class token among them. No diagnostics.

    Raises:
      ValueError: If there is no such activation, or the target does not fit.

    >>> from jax.ad_checkpoint import checkpoint_name
    >>> def model(image):
    ...     maps = checkpoint_name(jnp.stack([image, -image], axis=-1), "maps")
    ...     return jnp.sum(maps, axis=(0, 1))
    >>> grad_cam(model)(jnp.array([[1.0, 2.0]]), target=0).scores.tolist()
    [1.0, 2.0]

    Source: equations 1 and 2 of the paper.
    """

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        output, maps, slopes = activation_and_gradient(
            model, args, target, at, channel_axis, turn
        )
        places = tuple(range(maps.ndim - 1))
        weights = jnp.mean(slopes, axis=places, keepdims=True)
        scores = jnp.sum(maps * jnp.broadcast_to(weights, maps.shape), axis=-1)
        return Attribution(
            scores=jax.nn.relu(scores) if rectify else scores, output=output
        )

    return explain
