"""An attribution of positions of no known shape, drawn as bars."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_RAISES, _LOWERS, _ALONE = "tab:red", "tab:blue", "tab:orange"


def position_attribution(scores: np.ndarray, *, ax: Axes | None = None) -> Axes:
    """Draws a bar for each position of a sequence, as long as its score.

    Red raises the explained output, blue lowers it; scores without negative values
    are orange.

    Args:
      scores: [length].
      ax: Where to draw; a new figure by default.

    Returns:
      The axes.

    Raises:
      ValueError: If there are none, or none is finite.

    >>> axes = position_attribution(np.array([0.25, 0.75]))
    >>> [float(bar.get_height()) for bar in axes.patches]
    [0.25, 0.75]
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or not scores.size:
        raise ValueError(f"`scores` are one for each position, got {scores.shape}")
    if not np.isfinite(scores).any():
        raise ValueError("`scores` holds no finite number")
    if ax is None:
        ax = Figure(figsize=(6, 2), layout="constrained").add_subplot()
    signed = bool((scores < 0).any())
    colors = np.where(scores > 0, _RAISES, _LOWERS) if signed else _ALONE
    ax.bar(np.arange(scores.size), scores, width=1.0, color=colors)
    ax.set(xlim=(-0.5, scores.size - 0.5), xlabel="position", ylabel="score")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if signed:
        ax.axhline(0, color="black", lw=0.5)
    return ax
