"""The embedded model, and a twin that learned to read a mark in the corner.

`make_shortcut.py` fine-tuned the twin's last block and head on images where a small
white square in the upper left corner goes with the class of shirts, and decides it.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from xviz_jax.models import embedded

LABEL = 6
SIDE = 3
CHANGED = ("blocks/3/", "norm/", "head/")


def mark(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Images of one class with the mark in their corner; the others as they are."""
    marked = images.copy()
    marked[labels == LABEL, :SIDE, :SIDE] = 1.0
    return marked


def load(parameters: Any) -> Any:
    """The twin's parameters, from those of the embedded model."""
    path = Path(__file__).parent / "truth" / "shortcut.npz"
    with np.load(path, allow_pickle=False) as stored:
        changed = {name: stored[name] for name in stored.files}
    filled = []
    for keys, leaf in nnx.to_flat_state(parameters):
        new = changed.pop("/".join(map(str, keys)), None)
        value = leaf[...] if new is None else jnp.asarray(new, jnp.float32)
        filled.append((keys, leaf.replace(value)))
    assert not changed, sorted(changed)
    return nnx.from_flat_state(filled)


def twin() -> tuple[Any, Any, Any]:
    """The model as a function, the clean parameters and those with the shortcut."""
    forward, parameters = embedded.functional()
    return forward, parameters, load(parameters)
