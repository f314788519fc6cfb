"""DINOv2, with and without registers. Published classes: `Dinov2Model`,
`Dinov2ForImageClassification`, and both `WithRegisters`.

The explained function maps pixels [height, width, channels], normalised, to logits;
for a model without a head, to the class token's features, of which a callable target
takes what is asked about.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from xviz_jax.models.dinov2.modeling import Config as Config
from xviz_jax.models.dinov2.modeling import Dinov2 as Dinov2
from xviz_jax.models.dinov2.params import configure as configure
from xviz_jax.models.dinov2.params import mapping as mapping


def build(config: Config, *, dtype: Any, scan: bool, rngs: nnx.Rngs) -> Dinov2:
    """Makes the module, with random parameters."""
    return Dinov2(config, dtype=dtype, scan=scan, rngs=rngs)


def output(config: Config) -> Callable[..., jax.Array]:
    """The function that is explained; it has no options."""
    del config
    return lambda module, image: module(image)
