"""A feature map inside a model, and the gradient of the output there."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution, tracing
from xviz_jax.attribution import Target
from xviz_jax.tracing import Site


def activation_and_gradient(
    model: Callable,
    args: Sequence[Any],
    target: Target,
    at: str | Site | None,
    channel_axis: int | None,
    turn: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Reads an activation and its gradient in one forward and one backward pass.

    Args:
      model: Maps one example to logits.
      args: Its positional arguments.
      target: What is explained.
      at: The site; None for the last named value, or else the last block's input, or
        else the last convolution's output.
      channel_axis: The activation's axis of channels; None for a convolution's own,
        the last of any other.
      turn: Which turn of the loops around the site.

    Returns:
      The explained scalar, and activation and gradient, float32
      `[*places, channels]`.

    Raises:
      ValueError: If there is no such activation, or an option does not fit.
    """
    site = _find(model, args, at)
    if channel_axis is None:
        channel_axis = -1 if site.channel_axis is None else site.channel_axis

    def scalar(logits: jax.Array) -> jax.Array:
        return attribution.explained(attribution.hold(target, logits), logits)

    read = tracing.attention_cotangents(model, scalar, [site], ("activation",))
    logits, found = read(*args)

    def arrange(array: jax.Array) -> jax.Array:
        for length in site.loops:
            if not -length <= turn < length:
                raise ValueError(
                    f"`turn` is from {-length} to {length - 1} at {site.name!r}, "
                    f"got {turn}"
                )
            array = array[turn]
        if not -array.ndim <= channel_axis < array.ndim:
            raise ValueError(
                f"`channel_axis` is an axis of {site.name!r}, of shape {array.shape}, "
                f"got {channel_axis}"
            )
        array = jnp.moveaxis(array, channel_axis, -1)
        while array.ndim > 2 and array.shape[0] == 1:
            array = array[0]
        return array.astype(jnp.float32)

    maps = arrange(found[site.name]["activation"])
    return scalar(logits), maps, arrange(found[site.name]["output_cotangent"])


def _find(model: Callable, args: Sequence[Any], at: str | Site | None) -> Site:
    if at is not None:
        (site,) = attribution.sites_at(model, args, at)
        if "activation" not in site.values:
            raise ValueError(
                f"`at` names an activation; {site.name!r} is a site of {site.kind}"
            )
        return site
    sites = tracing.sites(model, *args)
    for kind in ("named", "block", "convolution"):
        found = [site for site in sites if site.kind == kind]
        if found:
            return found[-1]
    raise ValueError(
        "the model has no activation to map: no named value, attention block or "
        "convolution was found; mark one with `jax.ad_checkpoint.checkpoint_name` "
        "and pass `at=`"
    )
