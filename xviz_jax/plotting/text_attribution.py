"""An attribution of a text, drawn as its tokens, shaded."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from xviz_jax.plotting.image_attribution import SIGNED_MAP

# Black letters stay readable on all of it.
POSITIVE_TEXT_MAP = "Oranges"
_DARKEST = 0.65
_POINTS = 11.0
_LINE = 1.7
# Of DejaVu Sans Mono, which comes with matplotlib.
_FAMILY = "DejaVu Sans Mono"
_ADVANCE = 0.602
_MISSING = "\u25a1"


def text_attribution(
    tokens: Sequence[str],
    scores: np.ndarray,
    *,
    columns: int = 72,
    ax: Axes | None = None,
) -> Axes:
    """Draws a text with each token on its score's colour.

    Red raises the explained output, blue lowers it; scores without negative values
    run from white to orange. The strongest score has the darkest colour. Tokens are
    drawn as they are, one after the other, in lines of fixed width: spaces that a
    token begins with are left white, and a line break in them is followed.

    Args:
      tokens: Tokens or words, each with the spaces before it.
      scores: [len(tokens)].
      columns: Characters in a line; a figure of its own is no wider than the text.
      ax: Where to draw; a new figure, as high as the text, by default.

    Returns:
      The axes.

    Raises:
      ValueError: If the numbers differ, there are none, or none is finite.

    >>> axes = text_attribution(["why", " not"], np.array([1.0, -2.0]))
    >>> [text.get_text() for text in axes.texts]
    ['why', 'not']
    """
    scores = np.asarray(scores, np.float64)
    if scores.shape != (len(tokens),) or not len(tokens):
        raise ValueError(
            f"`scores` are one for each of {len(tokens)} tokens, got {scores.shape}"
        )
    if columns < 1:
        raise ValueError(f"`columns` is a positive number, got {columns}")
    finite = scores[np.isfinite(scores)]
    if finite.size == 0:
        raise ValueError("`scores` holds no finite number")
    runs, lines = _lay_out([drawable(token) for token in tokens], columns)
    if ax is None:
        columns = max((column + len(text) for *_, column, text in runs), default=1)
        size = (columns * _ADVANCE * _POINTS / 72, lines * _LINE * _POINTS / 72)
        ax = Figure(figsize=size).add_axes((0.0, 0.0, 1.0, 1.0))
    limit = float(np.abs(finite).max()) or 1.0
    signed = bool((finite < 0).any())
    colors = matplotlib.colormaps[SIGNED_MAP if signed else POSITIVE_TEXT_MAP]
    for index, line, column, text in runs:
        share = scores[index] / limit * _DARKEST
        if np.isfinite(share):
            shade = colors(0.5 + share / 2 if signed else share)
            ax.add_patch(Rectangle((column, line), len(text), 1, color=shade, lw=0))
        # A token is data: a dollar sign in it must not start a formula.
        ax.text(
            column,
            line + 0.5,
            text,
            family=_FAMILY,
            fontsize=_points(ax, columns),
            va="center_baseline",
            parse_math=False,
        )
    ax.set(xlim=(0, columns), ylim=(lines, 0), xticks=[], yticks=[])
    ax.set_frame_on(False)
    return ax


def _lay_out(
    tokens: Sequence[str], columns: int
) -> tuple[list[tuple[int, int, int, str]], int]:
    """Where each token's letters go: (token, line, column, text); and the lines."""
    runs: list[tuple[int, int, int, str]] = []
    line = column = 0
    for index, token in enumerate(tokens):
        text = token.lstrip()
        before = token[: len(token) - len(text)]
        if "\n" in before:
            line, column = line + before.count("\n"), 0
        elif column:
            column += len(before)
        if column and column + len(text) > columns:
            line, column = line + 1, 0
        # Longer than a line, or broken itself.
        for number, piece in enumerate(text.split("\n")):
            if number:
                line, column = line + 1, 0
            while piece:
                if column >= columns:
                    line, column = line + 1, 0
                part, piece = piece[: columns - column], piece[columns - column :]
                runs.append((index, line, column, part))
                column += len(part)
    return runs, line + 1


def drawable(text: str) -> str:
    """A text with a box in place of each character that the font lacks."""
    glyphs = font_manager.get_font(font_manager.findfont(_FAMILY)).get_charmap()

    def drawn(character: str) -> str:
        if character == "\n":
            return character
        if character.isspace():
            return " "
        return character if ord(character) in glyphs else _MISSING

    return "".join(map(drawn, text.replace("\r\n", "\n")))


def _points(ax: Axes, columns: int) -> float:
    """The font size that makes a line as wide as the axes."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    width = ax.get_position().width * figure.get_size_inches()[0]
    return width * 72 / columns / _ADVANCE
