"""Pictures: what is drawn, not how it looks."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from xviz_jax import plotting


def test_signed_scores_are_centred_at_zero():
    scores = np.linspace(-1, 3, 16).reshape(4, 4)
    (drawn,) = plotting.image_attribution(scores).get_images()
    assert drawn.get_cmap().name == "RdBu_r"
    low, high = drawn.get_clim()
    assert low == -high
    np.testing.assert_array_equal(drawn.get_array(), scores)


def test_positive_scores_start_at_zero():
    ax = Figure().add_subplot()
    scores = np.linspace(1, 3, 16).reshape(4, 4)
    assert plotting.image_attribution(scores, np.eye(8), ax=ax) is ax
    (drawn,) = ax.get_images()
    assert drawn.get_cmap().name == "magma"
    assert drawn.get_clim()[0] == 0
    assert len(ax.collections) == 1


def test_channels_are_summed_and_zeros_drawn():
    scores = np.zeros((3, 3, 2))
    scores[0, 0] = [1, -3]
    (drawn,) = plotting.image_attribution(scores).get_images()
    assert np.asarray(drawn.get_array())[0, 0] == -2
    (blank,) = plotting.image_attribution(np.zeros((3, 3))).get_images()
    assert blank.get_clim() == (0, 1)


def test_a_flat_image_has_no_outline():
    assert not plotting.image_attribution(np.eye(3), np.ones((6, 6))).collections


@pytest.mark.parametrize(
    ("scores", "image", "said"),
    [
        (np.ones(4), None, r"got shape \(4,\)"),
        (np.full((2, 2), np.nan), None, "no finite number"),
        (np.eye(2), np.ones(4), r"got \(4,\)"),
    ],
)
def test_wrong_arrays(scores, image, said):
    with pytest.raises(ValueError, match=said):
        plotting.image_attribution(scores, image)


def test_gallery_draws_hostile_titles_as_text():
    images = np.random.default_rng(0).random((2, 6, 6))
    figure = plotting.gallery(
        images,
        {"attention_rollout": images, "$x^$": images - 0.5},
        titles=["$x^$", "<script>"],
        marked=[1],
    )
    figure.savefig(io.BytesIO(), format="png")
    assert len(figure.axes) == 6
    assert figure.axes[0].get_title() == "$x^$"
    assert figure.axes[1].title.get_color() == "tab:red"


def test_gallery_counts():
    images = np.ones((2, 6, 6))
    with pytest.raises(ValueError, match="2 images have 1 titles"):
        plotting.gallery(images, {}, titles=["one"])
    with pytest.raises(ValueError, match="2 images have 3 scores of 'a'"):
        plotting.gallery(images, {"a": np.ones((3, 6, 6))})


def test_positions_are_bars():
    ax = Figure().add_subplot()
    scores = np.array([0.5, -1.0, 0.0])
    assert plotting.position_attribution(scores, ax=ax) is ax
    bars = [bar for bar in ax.patches if isinstance(bar, Rectangle)]
    assert [bar.get_height() for bar in bars] == scores.tolist()
    assert bars[0].get_facecolor() != bars[1].get_facecolor()
    alone = plotting.position_attribution(np.abs(scores)).patches
    assert alone[0].get_facecolor() == alone[1].get_facecolor()
    for wrong in (np.eye(2), np.zeros(0), np.full(3, np.nan)):
        with pytest.raises(ValueError, match="`scores`"):
            plotting.position_attribution(wrong)
