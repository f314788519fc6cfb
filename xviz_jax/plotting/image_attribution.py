"""An attribution of one image, drawn as a map."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SIGNED_MAP = "RdBu_r"
POSITIVE_MAP = "magma"
# Single extreme pixels would leave the rest of a map blank.
_CLIP = 99.5


def image_attribution(
    scores: np.ndarray, image: np.ndarray | None = None, *, ax: Axes | None = None
) -> Axes:
    """Draws scores of pixels or patches as a map, over the image's outline.

    Red raises the explained output, blue lowers it; scores without negative values
    run from dark to bright. The strongest half percent is clipped.

    Args:
      scores: [height, width], one per pixel or per patch, or [height, width,
        channels], which are summed.
      image: The image itself, [height, width] or [height, width, 3], in [0, 1]: its
        edges are traced on the map.
      ax: Where to draw; a new figure by default.

    Returns:
      The axes.

    Raises:
      ValueError: If an array has the wrong shape, or no score is finite.

    >>> image_attribution(np.eye(4)).get_images()[0].get_cmap().name
    'magma'
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim == 3:
        scores = scores.sum(axis=-1)
    if scores.ndim != 2:
        raise ValueError(f"`scores` are [height, width], got shape {scores.shape}")
    finite = scores[np.isfinite(scores)]
    if finite.size == 0:
        raise ValueError("`scores` holds no finite number")
    axes = Figure(figsize=(3, 3)).add_subplot() if ax is None else ax
    limit = float(np.percentile(np.abs(finite), _CLIP)) or 1.0
    signed = bool((finite < 0).any())
    axes.imshow(
        scores,
        cmap=SIGNED_MAP if signed else POSITIVE_MAP,
        vmin=-limit if signed else 0.0,
        vmax=limit,
        extent=(0, 1, 1, 0),
        interpolation="nearest",
    )
    if image is not None:
        _outline(axes, _gray(image), "black" if signed else "white")
    axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
    return axes


def _gray(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image, np.float64)
    if image.ndim == 3 and image.shape[-1] in (1, 3):
        image = image.mean(axis=-1)
    if image.ndim != 2:
        raise ValueError(
            f"`image` is [height, width] or [height, width, 3], got {image.shape}"
        )
    return image


def _outline(axes: Axes, gray: np.ndarray, color: str) -> None:
    low, high = float(gray.min()), float(gray.max())
    if high <= low:
        return
    height, width = gray.shape
    axes.contour(
        (np.arange(width) + 0.5) / width,
        (np.arange(height) + 0.5) / height,
        gray,
        levels=[low + 0.25 * (high - low)],
        colors=color,
        linewidths=0.7,
        alpha=0.6,
    )
