"""What is installed, and what importing it costs."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import xviz_jax

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    # The test environment has the build's own requirements.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    return out


def test_the_only_top_level_is_xviz_jax(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"xviz_jax"}
    for wanted in (
        "xviz_jax/py.typed",
        "xviz_jax/models/embedded/weights.npz",
        "xviz_jax/models/embedded/images.npz",
        "xviz_jax/models/embedded/card.json",
        "xviz_jax/models/embedded/LICENSE-fashion-mnist.txt",
    ):
        assert wanted in names
    data = [
        info
        for info in zipfile.ZipFile(wheel).infolist()
        if "embedded" in info.filename
    ]
    assert sum(info.file_size for info in data) < 2_000_000


def test_kernels_are_in_the_wheel_and_the_sdist(built):
    operations = {path.parent.name for path in ROOT.glob("kernels/*/__init__.py")}
    (wheel,) = built.glob("*.whl")
    (sdist,) = built.glob("*.tar.gz")
    in_wheel = zipfile.ZipFile(wheel).namelist()
    in_sdist = tarfile.open(sdist).getnames()
    for operation in operations:
        assert f"xviz_jax/kernels/{operation}/__init__.py" in in_wheel
        assert any(
            name.endswith(f"kernels/{operation}/__init__.py") for name in in_sdist
        )


def test_repo_kernels_never_shadow_another_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_loads_neither_flax_nor_matplotlib():
    program = (
        "import sys, xviz_jax;"
        "heavy = {'flax', 'matplotlib', 'optax', 'rich'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "xviz_jax.plotting, xviz_jax.models"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_batch_is_there_by_itself():
    """And not for having been imported by another module, such as `comparison`."""
    program = (
        "import sys, types;"
        "other = types.ModuleType('xviz_jax.comparison');"
        "other.Comparison = other.compare = None;"
        "sys.modules[other.__name__] = other;"
        "import xviz_jax as xv;"
        "xv.batch.run"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_every_public_name_is_documented():
    # `kernels` is a namespace: it has no file that could hold a docstring.
    public = {name for name in dir(xviz_jax) if not name.startswith("_")} - {"kernels"}
    assert "integrated_gradients" in public
    for name in public:
        assert getattr(xviz_jax, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = xviz_jax.nonsense
