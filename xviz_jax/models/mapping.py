"""Which tensor of a checkpoint fills which parameter of a model, declared.

Each architecture's `params.py` returns one `Mapping`:

    Mapping(
        depths={"layers": config.depth},
        tensors={
            "words/embedding": "embeddings.word_embeddings.weight",
            "layers/{layer}/up/kernel": Source(
                "encoder.layer.{layer}.intermediate.dense.weight", transpose
            ),
        },
        renames={r"^bert\\.": ""},
        ignored={r"position_ids$": "a buffer, not a weight"},
    )

A parameter's path is what `nnx.to_flat_state` gives, joined by slashes. `{layer}`
runs over a stack of layers that is unrolled (`layers/0/up/kernel`) or scanned
(`layers/up/kernel`, with a leading axis): the loader knows which.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping as MappingType

import numpy as np


def keep(array: np.ndarray) -> np.ndarray:
    """The tensor as it is."""
    return array


def transpose(array: np.ndarray) -> np.ndarray:
    """A linear map [out, in], as torch keeps it, to the kernel [in, out]."""
    return array.T


@dataclasses.dataclass(frozen=True)
class Source:
    """What fills one parameter.

    Attributes:
      name: The tensor's name, with `{layer}` for a layer's number; or several
        names, whose tensors are passed to `transform` together.
      transform: Maps numpy arrays to the parameter's value. It must not depend on
        the numbers in them: shapes are checked by a call on empty arrays.
    """

    name: str | tuple[str, ...]
    transform: Callable[..., np.ndarray] = keep

    @property
    def names(self) -> tuple[str, ...]:
        """The names, one or several."""
        return (self.name,) if isinstance(self.name, str) else self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mapping:
    """How a checkpoint fills a model.

    Attributes:
      tensors: For each parameter's path, the tensor's name, or a `Source`.
      depths: Length of each stack of layers, by the path before `/{layer}/`.
      renames: Regular expressions, and replacements, that bring names in files
        into the form that `tensors`, `ignored` and `copies` use. All are applied,
        in order.
      ignored: Regular expressions of tensors that the model does without, each with
        the reason.
      copies: Tensors that a file may hold a second time: a tied output table, say.
        Where it does, they must equal the tensor named.
    """

    tensors: MappingType[str, str | Source]
    depths: MappingType[str, int] = dataclasses.field(default_factory=dict)
    renames: MappingType[str, str] = dataclasses.field(default_factory=dict)
    ignored: MappingType[str, str] = dataclasses.field(default_factory=dict)
    copies: MappingType[str, str] = dataclasses.field(default_factory=dict)


def linear(path: str, name: str, *, bias: bool = True) -> dict[str, str | Source]:
    """A linear map, as torch keeps it."""
    kernel: dict[str, str | Source] = {
        f"{path}/kernel": Source(f"{name}.weight", transpose)
    }
    return kernel | ({f"{path}/bias": f"{name}.bias"} if bias else {})


def norm(path: str, name: str, *, bias: bool = True) -> dict[str, str | Source]:
    """A layer norm, or without bias a root mean square norm."""
    scale: dict[str, str | Source] = {f"{path}/scale": f"{name}.weight"}
    return scale | ({f"{path}/bias": f"{name}.bias"} if bias else {})
