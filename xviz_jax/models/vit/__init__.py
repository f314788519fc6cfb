"""ViT and DeiT. Published classes: `ViTModel`, `ViTForImageClassification`,
`DeiTModel`, `DeiTForImageClassification`, `DeiTForImageClassificationWithTeacher`.
A bare model without pooler weights says `"add_pooling_layer": false` in config.json.

The explained function maps pixels [height, width, channels], normalised, to logits;
for a model without a head, to the pooled features, of which a callable target takes
what is asked about.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from xviz_jax.models.vit.modeling import Config as Config
from xviz_jax.models.vit.modeling import VisionTransformer as VisionTransformer
from xviz_jax.models.vit.params import configure as configure
from xviz_jax.models.vit.params import mapping as mapping


def build(
    config: Config, *, dtype: Any, scan: bool, rngs: nnx.Rngs
) -> VisionTransformer:
    """Makes the module, with random parameters."""
    return VisionTransformer(config, dtype=dtype, scan=scan, rngs=rngs)


def output(config: Config) -> Callable[..., jax.Array]:
    """The function that is explained; it has no options."""
    del config
    return lambda module, image: module(image)
