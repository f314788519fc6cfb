"""Shaded texts: what is drawn, not how it looks."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure

from xviz_jax.plotting.text_attribution import drawable, text_attribution


def drawn(axes):
    """The letters of each run, and its box: (text, column, line, width)."""
    boxes = [(*box.get_xy(), box.get_width()) for box in axes.patches]
    return [
        (text.get_text(), *map(int, box))
        for text, box in zip(axes.texts, boxes, strict=True)
    ]


def test_tokens_are_laid_out_in_lines():
    tokens = ["one", " two", " three", "\nfour", "!", " abcdefghijkl"]
    axes = text_attribution(tokens, np.arange(6.0), columns=9)
    assert drawn(axes) == [
        ("one", 0, 0, 3),
        ("two", 4, 0, 3),
        ("three", 0, 1, 5),
        ("four", 0, 2, 4),
        ("!", 4, 2, 1),
        ("abcdefghi", 0, 3, 9),
        ("jkl", 0, 4, 3),
    ]
    assert axes.get_xlim() == (0, 9)
    assert axes.get_ylim() == (5, 0)


def test_colours_follow_the_sign():
    signed = text_attribution(["a", "b", "c"], np.array([-1.0, 0.0, 1.0])).patches
    blue, white, red = (np.array(box.get_facecolor()) for box in signed)
    assert blue[2] > blue[0]
    assert red[0] > red[2]
    np.testing.assert_allclose(white[:3], 0.97, atol=0.01)
    positive = text_attribution(["a", "b"], np.array([1.0, 2.0])).patches
    light, dark = (np.sum(np.array(box.get_facecolor())) for box in positive)
    assert light > dark


def test_a_hostile_text_is_drawn_as_it_is():
    hostile = ["$x^$", " \\frac", " <script>", " \u65e5\U0001f600", "\x1b[31m", " \t%s"]
    figure = Figure(figsize=(4, 2))
    axes = text_attribution(hostile, np.ones(6), ax=figure.add_subplot())
    figure.savefig(io.BytesIO(), format="png")
    assert [text for text, *_ in drawn(axes)] == [
        *("$x^$", "\\frac", "<script>", "\u25a1\u25a1", "\u25a1[31m", "%s")
    ]
    assert not any(text.get_parse_math() for text in axes.texts)
    assert drawable("a\r\nb\u00a0c") == "a\nb c"


def test_scores_that_are_not_finite_are_left_white():
    axes = text_attribution(["a", "b"], np.array([np.nan, 1.0]))
    assert len(axes.texts) == 2
    assert len(axes.patches) == 1
    assert text_attribution(["a"], np.zeros(1)).patches


@pytest.mark.parametrize(
    ("tokens", "scores", "options", "said"),
    [
        (["a"], np.ones(2), {}, r"each of 1 tokens, got \(2,\)"),
        ([], np.ones(0), {}, "each of 0 tokens"),
        (["a"], np.array([np.nan]), {}, "no finite number"),
        (["a"], np.ones(1), {"columns": 0}, "positive number, got 0"),
    ],
)
def test_wrong_calls(tokens, scores, options, said):
    with pytest.raises(ValueError, match=said):
        text_attribution(tokens, scores, **options)
