"""Several images and what several methods say of them, in one figure."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from xviz_jax.plotting.image_attribution import image_attribution
from xviz_jax.plotting.text_attribution import drawable


def gallery(
    images: np.ndarray,
    attributions: Mapping[str, np.ndarray],
    *,
    titles: Sequence[str] | None = None,
    marked: Sequence[int] = (),
) -> Figure:
    """Draws a grid: a column for each image, a row for each method.

    Args:
      images: [count, height, width] or [count, height, width, 3], in [0, 1].
      attributions: Scores [count, height, width] by name; a row each, in order.
      titles: A line above each image.
      marked: Columns whose title is red: mistakes of the model, say.

    Returns:
      The figure.

    Raises:
      ValueError: If the numbers of images, titles and scores differ.
    """
    count = len(images)
    if titles is not None and len(titles) != count:
        raise ValueError(f"{count} images have {len(titles)} titles")
    for name, scores in attributions.items():
        if len(scores) != count:
            raise ValueError(f"{count} images have {len(scores)} scores of {name!r}")
    rows = 1 + len(attributions)
    figure = Figure(figsize=(1.5 * count + 0.4, 1.5 * rows + 0.35), layout="compressed")
    grid = figure.subplots(rows, count, squeeze=False)
    for column in range(count):
        top = grid[0, column]
        top.imshow(images[column], cmap="gray", vmin=0, vmax=1)
        top.set(xticks=[], yticks=[])
        if titles is not None:
            color = "tab:red" if column in marked else "black"
            # A label is data: a dollar sign in it must not start a formula.
            title = drawable(titles[column])
            top.set_title(title, fontsize=8, color=color, parse_math=False)
        for row, scores in enumerate(attributions.values(), start=1):
            ax = grid[row, column]
            image_attribution(scores[column], images[column], ax=ax)
    for row, name in enumerate(["image", *attributions]):
        label = name.replace("_", "\n")
        grid[row, 0].set_ylabel(label, fontsize=8, parse_math=False)
    return figure
