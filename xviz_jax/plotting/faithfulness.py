"""How faithful methods are and what they cost, with the controls shaded."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLORS = {
    "supported": "tab:green",
    "not supported": "tab:red",
    "not applicable": "tab:gray",
    "inconclusive": "tab:orange",
}
_MARKERS = "osD^v"

# An estimate, and the ends of its interval.
Bounds = tuple[float, float, float]


def faithfulness(
    places: Mapping[str, Sequence[Bounds]],
    costs: Mapping[str, float],
    words: Mapping[str, str],
    controls: Mapping[str, Sequence[Bounds]],
    *,
    imputers: Sequence[str],
    metric: str,
    ax: Axes | None = None,
) -> Axes:
    """Draws each method's interval over its cost, one for each imputer.

    Faithfulness runs from 0, a random ranking, to 1, leave-one-out; what a control
    reaches is shaded.

    Args:
      places: Of each method, an estimate with its interval for each imputer; those
        that are not numbers are left out.
      costs: Milliseconds per input, by method.
      words: The verdict's word, by method.
      controls: As `places`, of rankings that know nothing of the input.
      imputers: Their names.
      metric: What faithfulness is measured by.
      ax: Where to draw; a new figure by default.

    Returns:
      The axes.

    Raises:
      ValueError: If there is no method, or one lacks a cost or a word.

    >>> axes = faithfulness(
    ...     {"saliency": [(0.5, 0.4, 0.6)]},
    ...     {"saliency": 2.0},
    ...     {"saliency": "supported"},
    ...     {"random": [(0.0, -0.1, 0.1)]},
    ...     imputers=["mean"],
    ...     metric="abpc",
    ... )
    >>> axes.get_xscale()
    'log'
    """
    if not places or set(places) != set(costs) or set(places) != set(words):
        raise ValueError(
            f"each method needs a place, a cost and a word, got {list(places)}, "
            f"{list(costs)} and {list(words)}"
        )
    if ax is None:
        ax = Figure(figsize=(7, 4.2), layout="constrained").add_subplot()
    _shade(ax, controls)
    ax.axhline(1, color="black", lw=0.8, ls="--")
    spread = 1.12 ** (np.arange(len(imputers)) - (len(imputers) - 1) / 2)
    tops: list[tuple[str, float, float]] = []
    for name, bounds in places.items():
        drawn = []
        for number, (estimate, low, high) in enumerate(bounds):
            if not np.isfinite(estimate):
                continue
            ax.errorbar(
                costs[name] * spread[number],
                estimate,
                yerr=[[max(estimate - low, 0)], [max(high - estimate, 0)]],
                fmt=_MARKERS[number % len(_MARKERS)],
                color=_COLORS.get(words[name], "black"),
                ms=5,
                capsize=2,
            )
            drawn.append(high)
        tops.append((name, costs[name], max(drawn, default=0.0)))
    for name, cost, top in tops:
        ax.annotate(
            f"{name}\n{words[name]}",
            (cost, top),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=_COLORS.get(words[name], "black"),
            parse_math=False,
        )
    for number, name in enumerate(imputers):
        marker = _MARKERS[number % len(_MARKERS)]
        ax.plot([], [], marker, color="black", ms=5, label=name)
    ax.set_xscale("log")
    ax.margins(x=0.25, y=0.2)
    ax.set_xlabel("milliseconds per input")
    ax.set_ylabel(f"{metric}: random 0, leave-one-out 1", parse_math=False)
    legend = ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for text in legend.get_texts():
        text.set_parse_math(False)
    return ax


def _shade(ax: Axes, controls: Mapping[str, Sequence[Bounds]]) -> None:
    """A band for what each control reaches under any imputer."""
    shades = ("0.6", "tab:blue", "tab:purple")
    for number, (name, bounds) in enumerate(controls.items()):
        known = np.array([each for each in bounds if np.all(np.isfinite(each))])
        if known.size:
            ax.axhspan(
                known[:, 1].min(),
                known[:, 2].max(),
                color=shades[number % len(shades)],
                alpha=0.25,
                lw=0,
                label=name,
            )
