"""Preparation equals transformers' own, and the way back to pixels is right."""

import dataclasses
import json
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from xviz_jax.models.image import ImageProcessor, image

GOLDENS = Path(__file__).parent / "goldens" / "vision"
SETTINGS = json.loads((GOLDENS / "images.json").read_text())
PHOTOGRAPH = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
PLAIN = ImageProcessor(
    resize=None, resample=2, crop=None, scale=1.0, mean=(0.0,) * 3, std=(1.0,) * 3
)


def folder(path: Path, settings: dict, config: dict | None = None) -> Path:
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("source", ["synthetic", "photograph"])
def test_pixels_are_those_of_transformers(name, source, tmp_path):
    with np.load(GOLDENS / "images.npz") as golden:
        wanted = golden[f"{name}_{source}"]
        given = golden["synthetic"] if source == "synthetic" else PHOTOGRAPH
    view = image(folder(tmp_path, SETTINGS[name]))(given)
    assert view.pixels.dtype == np.float32
    np.testing.assert_allclose(view.pixels, wanted, rtol=0, atol=1e-6)


def test_older_files_are_read_alike(tmp_path):
    modern = image(folder(tmp_path, SETTINGS["bit"]))
    old = {
        "feature_extractor_type": "BitFeatureExtractor",
        "size": 18,
        "crop_size": 16,
        "image_mean": None,
    }
    assert image(folder(tmp_path, old)) == modern
    nameless = {k: v for k, v in old.items() if k != "feature_extractor_type"}
    told = folder(tmp_path, nameless, {"model_type": "dinov2"})
    assert image(told) == modern
    square = {"image_processor_type": "ViTFeatureExtractor", "size": [12, 18]}
    assert image(folder(tmp_path, square)) == image(
        folder(tmp_path, SETTINGS["vit"], {"model_type": "vit"})
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
        ({"do_pad": True}, "do_pad"),
        ({"do_resize": "false"}, "true or false"),
        ({"size": {"longest_edge": 9}}, "shortest_edge"),
        ({"size": {"height": 0, "width": 4}}, "positive"),
        ({"size": {"height": 4.5, "width": 4}}, "positive"),
        ({"size": True}, "positive"),
        ({"crop_size": {"shortest_edge": 4}}, "crop_size"),
        ({"resample": 9}, "resample"),
        ({"resample": "bicubic"}, "resample"),
        ({"resample": 2.0}, "resample"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "finite"),
        ({"image_std": [0.5, 0, 0.5]}, "zero"),
        ({"rescale_factor": "a"}, "rescale_factor"),
    ],
)
def test_settings_that_are_not_understood_are_refused(change, message, tmp_path):
    settings = {"image_processor_type": "BitImageProcessor", **change}
    with pytest.raises(ValueError, match=message):
        image(folder(tmp_path, settings))


def test_a_folder_without_readable_settings_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        image(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="JSON"):
        image(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(ValueError, match="object"):
        image(tmp_path)


@pytest.mark.parametrize("side", [8_200, 10_000, 60_000])
def test_size_is_checked_before_decoding(side, tmp_path):
    bomb = tmp_path / "bomb.ppm"
    # All it holds is how large it would be.
    bomb.write_bytes(b"P6 %d %d 255\n" % (side, side))
    with pytest.raises(ValueError, match="pixels"):
        PLAIN(bomb)
    # As outside the tests, where Pillow's own warning is no error.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="pixels"):
            PLAIN(bomb)


def test_what_resizing_would_make_is_checked(tmp_path):
    settings = {"image_processor_type": "BitImageProcessor"}
    sliver = np.zeros((1, 4000, 3), np.uint8)
    with pytest.raises(ValueError, match="resized"):
        image(folder(tmp_path, settings))(sliver)
    wide = {**settings, "crop_size": {"height": 2**20, "width": 2**20}}
    with pytest.raises(ValueError, match="cropped"):
        image(folder(tmp_path, wide))(np.zeros((9, 9, 3), np.uint8))
    fitted = {**settings, "size": {"shortest_edge": 16, "longest_edge": 16}}
    with pytest.raises(ValueError, match="would be 0"):
        image(folder(tmp_path, fitted))(sliver)


def test_what_is_no_image_is_refused(tmp_path):
    for name, content in {
        "text.png": b"hello",
        "empty.jpg": b"",
        "cut.ppm": b"P6 4 4 255\n123",
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "cut.jpg": PHOTOGRAPH.read_bytes()[:5000],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            PLAIN(tmp_path / name)
    with pytest.raises(ValueError, match="there is no image"):
        PLAIN(tmp_path / "absent.png")
    for pixels in (np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            PLAIN(pixels)
    with pytest.raises(ValueError, match="int"):
        PLAIN(3)  # pyright: ignore[reportArgumentType]
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    with pytest.raises(ValueError, match="8 bits"):
        PLAIN(deep)


def test_images_are_turned_upright_and_made_rgb(tmp_path):
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(
        PLAIN(tmp_path / "turned.png").shown, np.rot90(pixels, -1)
    )
    clear = np.concatenate([pixels, np.zeros((2, 3, 1), np.uint8)], axis=-1)
    np.testing.assert_array_equal(PLAIN(Image.fromarray(clear)).shown, pixels)
    gray = PLAIN(pixels[..., 0]).shown
    np.testing.assert_array_equal(gray, np.repeat(pixels[..., :1], 3, axis=-1))


def test_scores_return_to_the_pixels_they_came_from(tmp_path):
    """A bright square is found again through resize and crop."""
    source = np.zeros((120, 200, 3), np.uint8)
    source[40:60, 90:130] = 255
    settings = {
        **SETTINGS["bit"],
        "size": {"shortest_edge": 60},
        "crop_size": {"height": 56, "width": 56},
        "resample": 0,
    }
    view = image(folder(tmp_path, settings, {"patch_size": 4}))(source)
    assert view.size == (120, 200)
    assert view.box == (44.0, 4.0, 156.0, 116.0)
    back = view.to_original(view.shown[..., 0] / 255)
    np.testing.assert_array_equal(np.isnan(back[3:5, 100]), [True, False])
    np.testing.assert_array_equal(np.isnan(back[60, 155:157]), [False, True])
    seen = ~np.isnan(back)
    np.testing.assert_array_equal(back[seen], source[seen][:, 0] / 255)

    assert view.grid == (14, 14)
    patches = np.random.default_rng(0).random((14, 14)).astype(np.float32)
    spread = view.to_original(patches)
    boxes = view.patch_boxes()
    assert boxes[0, 0].tolist() == [44.0, 4.0, 52.0, 12.0]
    for row, column in ((0, 0), (5, 9), (13, 13)):
        left, top, right, bottom = boxes[row, column].astype(int)
        assert (spread[top:bottom, left:right] == patches[row, column]).all()
    tokens = np.arange(3 * (196 + 2)).reshape(3, -1)
    laid = view.as_grid(tokens)
    assert laid.shape == (3, 14, 14)
    assert laid[1, 0, :2].tolist() == [200, 201]


def test_a_padded_crop_maps_back_too(tmp_path):
    settings = {
        **SETTINGS["bit_letterbox"],
        "size": {"shortest_edge": 28, "longest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
    }
    view = image(folder(tmp_path, settings, {"patch_size": [7, 14]}))(
        np.full((40, 80, 3), 255, np.uint8)
    )
    assert (view.shown[:7] == 0).all()
    assert (view.shown[7:21] == 255).all()
    assert view.grid == (4, 2)
    top = [np.float32(r).tolist() for r in view.patch_boxes()[:, 0, 1]]
    assert top == [-20.0, 0.0, 20.0, 40.0]
    rows = np.repeat(np.arange(4.0)[:, None], 2, axis=1)
    assert np.unique(view.to_original(rows)).tolist() == [1.0, 2.0]


def test_a_pixel_takes_the_score_at_its_centre():
    sized = dataclasses.replace(PLAIN, resize={"height": 3, "width": 2})
    view = sized(np.zeros((4, 5, 3), np.uint8))
    spread = view.to_original(np.arange(6.0).reshape(3, 2))
    assert spread[:, 0].tolist() == [0, 2, 2, 4]
    assert spread[0].tolist() == [0, 0, 1, 1, 1]


def test_pixels_of_an_incomplete_patch_have_no_score():
    view = dataclasses.replace(PLAIN, patch=(4, 4))(np.zeros((10, 9, 3), np.uint8))
    spread = view.to_original(np.ones((2, 2)))
    assert np.isnan(spread[8:]).all()
    assert np.isnan(spread[:, 8:]).all()
    assert (spread[:8, :8] == 1).all()


def test_scores_of_another_shape_are_refused():
    view = PLAIN(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="does not say"):
        view.as_grid(np.ones(4))
    with pytest.raises(ValueError, match="wanted"):
        view.to_original(np.ones((4, 4)))
    view = dataclasses.replace(PLAIN, patch=(4, 4))(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="2 x 2"):
        view.as_grid(np.ones(3))
    with pytest.raises(ValueError, match="wanted"):
        view.to_original(np.ones((3, 2)))
