"""Photographs as a checkpoint wants them.

The steps are those of transformers 5.23 with Pillow: resize, crop, rescale, normalise.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xviz_jax.models import image_settings
from xviz_jax.models.extra import require
from xviz_jax.models.image_view import ImageView

if TYPE_CHECKING:
    from PIL import Image

# Pillow's own limit is higher, and up to twice that it only warns.
MAX_PIXELS = 64 * 2**20
# Each is decoded by Pillow itself or by a library that it ships.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Samples of more than 8 bits, which a conversion to RGB would clip.
_DEEP = ("I", "F")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """Prepares images for one checkpoint; `image` reads it from a folder.

    Attributes:
      resize: `{"height", "width"}`, `{"shortest_edge"}` or `{"shortest_edge",
        "longest_edge"}` in pixels; None leaves the size.
      resample: Pillow's number of the filter: 0 nearest, 1 Lanczos, 2 bilinear, 3
        bicubic, 4 box, 5 Hamming.
      crop: Height and width of the central crop, padded with black; None crops
        nothing.
      scale: What 8-bit values are multiplied by.
      mean: Subtracted from each channel, after scaling.
      std: Each channel is divided by it.
      patch: Height and width of the model's patches; None where not known.
      max_pixels: The largest image that is decoded, and the largest that is made.
    """

    resize: Mapping[str, int] | None
    resample: int
    crop: tuple[int, int] | None
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch: tuple[int, int] | None = None
    max_pixels: int = MAX_PIXELS

    def __call__(
        self, source: "str | os.PathLike[str] | Image.Image | np.ndarray"
    ) -> ImageView:
        """Prepares one image.

        An image is turned upright by its EXIF orientation, and converted to RGB;
        transparency is dropped, and of an animation the first frame is taken. Its
        size is checked before it is decoded.

        Args:
          source: A file (BMP, GIF, JPEG, PNG, PPM, TIFF or WebP), a Pillow image, or
            uint8 pixels [height, width, 3] or [height, width].

        Raises:
          ValueError: If it is no such image, is damaged, has more than 8 bits in a
            sample, or is too large.
        """
        upright = self._read(source)
        width, height = upright.size
        new_height, new_width = self._resized(height, width)
        self._check(new_height, new_width, "resized")
        resized = upright
        if self.resize is not None:
            resized = upright.resize((new_width, new_height), resample=self.resample)
        rows, columns = self.crop or (new_height, new_width)
        self._check(rows, columns, "cropped")
        top, left = (new_height - rows) // 2, (new_width - columns) // 2
        if self.crop is not None:
            resized = resized.crop((left, top, left + columns, top + rows))
        shown = np.array(resized)
        across, down = width / new_width, height / new_height
        return ImageView(
            pixels=self._normalise(shown),
            shown=shown,
            size=(height, width),
            box=(
                left * across,
                top * down,
                (left + columns) * across,
                (top + rows) * down,
            ),
            patch=self.patch,
        )

    def _read(self, source: Any) -> "Image.Image":
        pillow, ops = require("PIL.Image"), require("PIL.ImageOps")
        if isinstance(source, np.ndarray):
            known = source.ndim == 2 or (source.ndim == 3 and source.shape[-1] == 3)
            if source.dtype != np.uint8 or not known or 0 in source.shape:
                raise ValueError(
                    "an array of pixels is uint8 [height, width, 3] or [height, "
                    f"width], got {source.dtype}{list(source.shape)}"
                )
            source = pillow.fromarray(source)
        if isinstance(source, pillow.Image):
            return self._upright(source, "the image", ops)
        if not isinstance(source, str | os.PathLike):
            raise ValueError(
                "an image is a path, a Pillow image or an array, got "
                f"{type(source).__name__}"
            )
        name = os.fspath(source)
        if not Path(name).is_file():
            raise ValueError(f"there is no image {name}")
        bombs = (pillow.DecompressionBombError, pillow.DecompressionBombWarning)
        try:
            with pillow.open(name, formats=_FORMATS) as opened:
                return self._upright(opened, name, ops)
        except bombs as error:
            raise ValueError(f"{name} is too large: {error}") from error
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{name} cannot be read: {error}") from error

    def _upright(self, opened: "Image.Image", name: str, ops: Any) -> "Image.Image":
        width, height = opened.size
        self._check(height, width, name)
        if opened.mode.split(";")[0] in _DEEP:
            raise ValueError(
                f"{name} has samples of more than 8 bits (mode {opened.mode}): "
                "convert it to 8 bits first"
            )
        return ops.exif_transpose(opened).convert("RGB")

    def _check(self, height: int, width: int, name: str) -> None:
        if height < 1 or width < 1:
            raise ValueError(f"{name}: the image would be {height} x {width} pixels")
        if height * width > self.max_pixels:
            raise ValueError(
                f"{name}: {height} x {width} pixels are more than `max_pixels`, "
                f"{self.max_pixels}"
            )

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing; rounds as the published code does."""
        if self.resize is None:
            return height, width
        if "height" in self.resize:
            return self.resize["height"], self.resize["width"]
        short, long = sorted((height, width))
        edge = float(self.resize["shortest_edge"])
        longest = self.resize.get("longest_edge")
        if longest is not None and long / short * edge > longest:
            edge = longest * short / long
        new_short, new_long = round(edge), int(edge * long / short)
        if new_short == short:
            return height, width
        return (new_short, new_long) if height <= width else (new_long, new_short)

    def _normalise(self, shown: np.ndarray) -> np.ndarray:
        # In float64 up to here, as published, so that the last bit agrees.
        scaled = (shown.astype(np.float64) * self.scale).astype(np.float32)
        return (scaled - np.asarray(self.mean, np.float32)) / np.asarray(
            self.std, np.float32
        )


def image(
    folder: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS
) -> ImageProcessor:
    """Reads how a published checkpoint wants its images.

    Args:
      folder: With `preprocessor_config.json`, and `config.json` for the size of a
        patch. The processors of ViT, DeiT and DINOv2 (BiT's) are known.
      max_pixels: The largest image that is decoded, and the largest that is made.

    Returns:
      A function from an image to an `ImageView`.

    Raises:
      ValueError: If the file is missing or not understood.
    """
    settings = image_settings.read(Path(folder))
    return ImageProcessor(**settings, max_pixels=max_pixels)
