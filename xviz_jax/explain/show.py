"""An attribution in the terminal, and as a picture."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text

from xviz_jax.attribution import Attribution
from xviz_jax.escape import terminal
from xviz_jax.explain.subject import Subject
from xviz_jax.models.image_view import ImageView
from xviz_jax.models.text import Encoding
from xviz_jax.plotting.image_attribution import image_attribution
from xviz_jax.plotting.position_attribution import position_attribution
from xviz_jax.plotting.text_attribution import drawable, text_attribution

_RAISES, _LOWERS, _ALONE = (214, 39, 40), (31, 119, 180), (255, 127, 14)
# Below this share of the strongest score a word is left as it is.
_FAINT = 0.02
# Positions without a picture that are named.
_NAMED = 5
# Class, distillation and register tokens before the patches of an image.
_MOST_BEFORE = 8


def attribution(
    subject: Subject,
    found: Attribution,
    granularity: Literal["token", "word"],
    title: str,
    console: Console,
) -> Figure:
    """Prints scores and diagnostics, and draws the scores under a title.

    Raises:
      ValueError: If the scores are not laid out like the input.
    """
    if isinstance(found.scores, Mapping):
        axes = _sequences(found.scores, console)
    elif isinstance(subject.view, Encoding):
        scores = np.asarray(found.scores, np.float64)
        words, values = spelled(subject.view, scores, granularity)
        console.print(shaded(words, values))
        axes = text_attribution(words, values)
    else:
        axes = _maps(np.asarray(found.scores, np.float64), subject, console)
    # A title is data: a dollar sign in it must not start a formula.
    axes.set_title(drawable(title), loc="left", fontsize=8, parse_math=False)
    figure = axes.get_figure(root=True)
    assert figure is not None
    for name, value in found.diagnostics.items():
        if np.ndim(value) == 0:
            number = np.asarray(value).item()
            shown = f"{number:.4g}" if isinstance(number, float) else str(number)
            console.print(plain(f"{name}: {shown}"))
    if not np.all(found.diagnostics.get("converged", True)):
        console.print("The scores are not resolved: do not read them as they are.")
    return figure


def spelled(
    encoding: Encoding, scores: np.ndarray, granularity: Literal["token", "word"]
) -> tuple[list[str], np.ndarray]:
    """Words with the characters before them, and the score of each."""
    words: list[str] = []
    values: list[float] = []
    reached, current = [0] * len(encoding.texts), -1

    def finish() -> None:
        """What no token stands for, at the end of a text."""
        if current >= 0 and (rest := encoding.texts[current][reached[current] :]):
            words.append(rest)
            values.append(0.0)

    for piece in encoding.pieces(scores, granularity=granularity):
        if piece.part != current:
            finish()
            current = piece.part
        if piece.part < 0:
            words.append(f" {piece.text}" if words else piece.text)
        else:
            # Parts of one character, such as an emoji, are spelled once.
            begin = max(piece.begin, reached[piece.part])
            gap = encoding.texts[piece.part][reached[piece.part] : begin]
            after_name = words and not reached[piece.part] and not gap
            reached[piece.part] = max(piece.end, begin)
            text = encoding.texts[piece.part][begin : piece.end]
            words.append((" " if after_name else gap) + text)
        values.append(piece.score)
    finish()
    return words, np.array(values)


def shaded(words: list[str], scores: np.ndarray) -> Text:
    """Words on the colours of their scores: red raises, blue lowers the output.

    Scores without negative values are orange.
    """
    limit = float(np.nanmax(np.abs(scores), initial=0.0)) or 1.0
    signed = bool((scores < 0).any())
    line = Text()
    for word, score in zip(words, scores, strict=True):
        letters = word.lstrip()
        line.append(terminal(word[: len(word) - len(letters)]))
        share = abs(score) / limit
        if not share > _FAINT:
            line.append(terminal(letters))
            continue
        full = _ALONE if not signed else _RAISES if score > 0 else _LOWERS
        color = [round(255 + share * (part - 255)) for part in full]
        style = f"black on rgb({color[0]},{color[1]},{color[2]})"
        line.append(terminal(letters), style=style)
    return line


def plain(text: str) -> Text:
    """Text that is neither markup nor a command to the terminal."""
    return Text(terminal(text))


def strongest(scores: np.ndarray) -> str:
    """The strongest positions, in words."""
    first = np.argsort(-np.abs(scores), kind="stable")[:_NAMED]
    return ", ".join(f"{position}: {scores[position]:.4g}" for position in first)


def patches(shape: tuple[int, ...], tokens: int) -> tuple[int, int] | None:
    """Rows and columns of patches, where tokens are surely those of a square image.

    Args:
      shape: Of the input.
      tokens: How many there are, those before the patches included.

    Returns:
      None if no size of patches fits, several do, or tokens may be rows of the input.
    """
    is_image = len(shape) == 2 or (len(shape) == 3 and shape[2] <= 4)
    if not is_image or shape[0] != shape[1]:
        return None
    side = shape[0]
    fits = lambda count: 0 <= tokens - count <= _MOST_BEFORE
    found = [(n, n) for n in range(2, side + 1) if side % n == 0 and fits(n * n)]
    return found[0] if len(found) == 1 and not fits(side) else None


def _sequences(scores: Mapping[str, np.ndarray], console: Console) -> Axes:
    """Draws the positions of each sequence, one above the other."""
    figure = Figure(figsize=(6, 2 * len(scores)), layout="constrained")
    all_axes = figure.subplots(len(scores), squeeze=False)[:, 0]
    for axes, (name, each) in zip(all_axes, scores.items(), strict=True):
        each = np.asarray(each, np.float64)
        console.print(plain(f"strongest positions of {name}: {strongest(each)}"))
        position_attribution(each, ax=axes)
        axes.set_ylabel(drawable(name), parse_math=False)
    return all_axes[0]


def _maps(scores: np.ndarray, subject: Subject, console: Console) -> Axes:
    """Draws the image, and beside it the scores of its pixels or patches.

    Scores of positions that are no patches are drawn as bars.
    """
    image = None
    if isinstance(subject.view, ImageView):
        image = subject.view.shown / 255
        if scores.ndim == 1:
            scores = subject.view.as_grid(scores)
    else:
        given = np.asarray(subject.args[0])
        if scores.ndim == 1:
            console.print(plain(f"strongest positions: {strongest(scores)}"))
            grid = patches(given.shape, scores.size)
            if grid is None:
                return position_attribution(scores)
            before = scores.size - grid[0] * grid[1]
            said = (
                f"drawn as {grid[0]} x {grid[1]} patches, the first {before} left out"
            )
            console.print(plain(said))
            scores = scores[before:].reshape(grid)
        elif scores.ndim > 3:
            raise ValueError(
                f"scores of {list(scores.shape)} are no picture; a text or an image "
                "is drawn, positions, or an array [height, width] or [height, width, "
                "channels]"
            )
        if given.ndim == 2 or given.shape[2:] in ((1,), (3,)):
            image = np.asarray(given, np.float64)
            low, high = float(image.min()), float(image.max())
            image = (image - low) / ((high - low) or 1.0)
    height, width = scores.shape[:2] if image is None else image.shape[:2]
    figure = Figure(figsize=(6, 3 * height / width + 0.1), layout="compressed")
    left, right = figure.subplots(1, 2)
    if image is not None:
        left.imshow(image, cmap="gray", extent=(0, 1, 1, 0), aspect=height / width)
    left.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
    image_attribution(scores, image, ax=right)
    right.set_aspect(height / width)
    return left
