"""A unit inside a model as a model of its own: the neuron variant of any method."""

from collections.abc import Callable
from typing import Any

import jax

from xviz_jax import attribution, tracing
from xviz_jax.tracing import Site


def neuron(
    model: Callable, *, at: str | Site, index: tuple[int, ...]
) -> Callable[..., jax.Array]:
    """The activation of one unit, as a function of the model's input.

    What makes this unit fire? Any method explains it as it explains an output:
    `xv.saliency(xv.neuron(model, at="conv", index=(3, 4, 0)))`. Costs the model up
    to the unit once compiled; what comes after it is dropped.

    Args:
      model: Any JAX function.
      at: A traced activation or its name.
      index: The unit's place in the activation, after the turns of loops around it.

    Returns:
      A function of the model's arguments that returns a scalar.

    Raises:
      ValueError: When it is called, if there is no such activation, or the index
        lies outside it.

    >>> import jax.numpy as jnp
    >>> from jax.ad_checkpoint import checkpoint_name
    >>> model = lambda x: jnp.sum(checkpoint_name(x**2, "hidden"), keepdims=True)
    >>> float(neuron(model, at="hidden", index=(1,))(jnp.array([2.0, 3.0])))
    9.0
    """

    def unit(*args: Any) -> jax.Array:
        (site,) = attribution.sites_at(model, args, at)
        if "activation" not in site.values:
            raise ValueError(
                f"`at` names an activation; {site.name!r} is a site of {site.kind}"
            )
        _, found = tracing.capture(model, ("activation",), [site])(*args)
        activation = found[site.name]["activation"]
        inside = len(index) == activation.ndim and all(
            -size <= place < size
            for place, size in zip(index, activation.shape, strict=True)
        )
        if not inside:
            raise ValueError(
                f"`index` is a place in {site.name!r}, of shape {activation.shape}, "
                f"got {index}"
            )
        return activation[index]

    return unit
