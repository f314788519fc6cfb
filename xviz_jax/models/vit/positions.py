"""A table of positions at another number of patches, as torch resizes it.

Cubic convolution (Keys, 1981, IEEE ASSP 29(6)), separable, over half-pixel centres.
`torch.nn.functional.interpolate(mode="bicubic", align_corners=False)` takes a = -0.75
and repeats the border; with `antialias=True` it takes a = -0.5, widens the kernel
when shrinking, and renormalises at the border. `jax.image.resize` is the second one.
"""

import jax
import jax.numpy as jnp
import numpy as np


def resize(
    table: jax.Array, size: tuple[int, int], *, antialias: bool = False
) -> jax.Array:
    """Resizes a table of positions.

    Args:
      table: [rows, columns, width].
      size: Rows and columns wanted.
      antialias: Which of torch's two.

    Returns:
      [*size, width], in the table's dtype; computed in float32.
    """
    if table.shape[:2] == size:
        return table
    down = jnp.asarray(weights(table.shape[0], size[0], antialias=antialias))
    across = jnp.asarray(weights(table.shape[1], size[1], antialias=antialias))
    resized = jnp.einsum(
        "rh,hwd,cw->rcd",
        down,
        table.astype(jnp.float32),
        across,
        precision=jax.lax.Precision.HIGHEST,
    )
    return resized.astype(table.dtype)


def weights(old: int, new: int, *, antialias: bool) -> np.ndarray:
    """What each of `old` samples gives to each of `new`: float32 [new, old].

    >>> weights(2, 1, antialias=False).tolist()
    [[0.5, 0.5]]
    """
    centres = (np.arange(new) + 0.5) * old / new
    if antialias:
        stretch = max(old / new, 1.0)
        distance = np.arange(old) + 0.5 - centres[:, None]
        found = _cubic(distance / stretch, -0.5)
        return (found / found.sum(axis=1, keepdims=True)).astype(np.float32)
    found = np.zeros((new, old))
    below = np.floor(centres - 0.5).astype(int)
    for tap in range(-1, 3):
        share = _cubic(centres - 0.5 - (below + tap), -0.75)
        np.add.at(found, (np.arange(new), np.clip(below + tap, 0, old - 1)), share)
    return found.astype(np.float32)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
