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
_MARKERS = "osD^vPX*<>"

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

    A method has a marker, filled for the first imputer and hollow for others, and the
    colour of its verdict: green if it is supported, red if it is not, orange if that is
    open, gray if it answers another question. Faithfulness runs from 0, a random
    ranking, to 1, leave-one-out; what a control reaches is shaded.

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
        ax = Figure(figsize=(7.5, 3.8), layout="constrained").add_subplot()
    _shade(ax, controls)
    ax.axhline(1, color="black", lw=0.8, ls="--")
    spread = 1.12 ** (np.arange(len(imputers)) - (len(imputers) - 1) / 2)
    for order, (name, bounds) in enumerate(places.items()):
        style = {
            "fmt": _MARKERS[order % len(_MARKERS)],
            "color": _COLORS.get(words[name], "black"),
            "ms": 6,
            "capsize": 2,
        }
        for number, (estimate, low, high) in enumerate(bounds):
            ends = [[max(estimate - low, 0)], [max(high - estimate, 0)]]
            ax.errorbar(
                costs[name] * spread[number],
                estimate,
                # Of no interval there is nothing to draw but the name.
                yerr=ends if np.isfinite(estimate) else None,
                label=f"{name}: {words[name]}" if number == 0 else None,
                mfc=None if number == 0 else "white",
                **style,
            )
    ax.set_xscale("log")
    ax.margins(x=0.25, y=0.1)
    ax.set_xlabel("milliseconds per input")
    ax.set_ylabel(f"{metric}: random 0, leave-one-out 1", parse_math=False)
    ax.set_title(f"filled: {imputers[0]}; hollow: {', '.join(imputers[1:])}")
    ax.title.set(fontsize=8, parse_math=False)
    legend = ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for text in legend.get_texts():
        # A name is data: a dollar sign in it must not start a formula.
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
