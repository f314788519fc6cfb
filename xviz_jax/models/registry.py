"""Which package of `xviz_jax.models` reads which published architecture.

A new architecture is one folder: `modeling.py`, ordinary Flax NNX for ONE example
that knows nothing of attribution; `params.py`, which declares where its parameters
come from; an `__init__.py` that offers what `Architecture` lists; and one line here
for each `model_type` of `config.json`.
"""

import importlib
from collections.abc import Callable
from collections.abc import Mapping as MappingType
from typing import Any, Protocol, cast

import jax
from flax import nnx

from xviz_jax.models.mapping import Mapping

# `model_type` of config.json: the folder that reads it.
ARCHITECTURES = {
    "bert": "bert",
    "roberta": "bert",
    "distilbert": "bert",
    "deit": "vit",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "vit": "vit",
}
# Known by name, and not read yet: each is to become a folder of its own.
PLANNED = ("clip", "siglip", "t5")


class Architecture(Protocol):
    """What the package of an architecture offers."""

    def configure(self, raw: MappingType[str, Any]) -> Any:
        """Reads `config.json` into the architecture's frozen `Config`.

        Raises:
          ValueError: If it asks for something that is not implemented.
        """
        ...

    def build(
        self, config: Any, *, dtype: Any, scan: bool, rngs: nnx.Rngs
    ) -> nnx.Module:
        """Makes the module, with random parameters.

        Args:
          config: As `configure` returns it.
          dtype: Of parameters and activations; norms and softmax are float32.
          scan: Run the layers as one loop, stacked along a leading axis.
          rngs: Draws the parameters.
        """
        ...

    def mapping(self, config: Any) -> Mapping:
        """Where each parameter comes from."""
        ...

    def output(self, config: Any, **options: Any) -> Callable[..., jax.Array]:
        """The function that is explained.

        Args:
          config: As `configure` returns it.
          **options: The architecture's own: which position is read, say.

        Returns:
          A function of `(module, x, *rest)` that returns logits `[classes]`.

        Raises:
          ValueError: If an option does not fit.
        """
        ...


def find(raw: MappingType[str, Any]) -> Architecture:
    """The package for a configuration.

    Raises:
      ValueError: If its `model_type` is not read.
    """
    kind = raw.get("model_type")
    if kind in PLANNED:
        raise ValueError(f"the architecture {kind!r} is planned and not read yet")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(
            f"the architecture {kind!r} (`model_type` in config.json) is not among "
            f"{sorted(ARCHITECTURES)}"
        )
    package = importlib.import_module(f"xviz_jax.models.{ARCHITECTURES[kind]}")
    return cast(Architecture, package)
