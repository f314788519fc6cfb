"""An encoded image as pixels, its size checked before it is decoded."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from xviz_jax.audit.extra import require
from xviz_jax.audit.sources.record import BadRecord, Limits

# Each is decoded by Pillow itself or by a library that it ships.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Samples of more than 8 bits, which a conversion to RGB would clip.
_DEEP = ("I", "F")
_RGB = (None, None, 3)


def encoded(value: Any) -> bool:
    """Whether a value is an encoded image: bytes, or a struct with bytes in it."""
    return isinstance(value, bytes) or (
        isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes)
    )


def decode(
    value: Any,
    limits: Limits,
    folder: Any,
    shape: tuple[int | None, ...] | None = None,
) -> np.ndarray:
    """Decodes one image, upright, in RGB or gray; of an animation the first frame.

    Args:
      value: Encoded bytes, a mapping with them under `bytes`, or a file's name in
        `folder`; pixels are left as they are.
      limits: The most bytes and pixels.
      folder: Opens a file by its name.
      shape: What is wanted: gray where it has no axis of channels, or one channel.

    Returns:
      uint8 [height, width, 3]; in gray [height, width] or [height, width, 1].

    Raises:
      BadRecord: If it is no such image, damaged, too deep or too large.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        if folder is None:
            raise BadRecord("UNSAFE_PATH", "this format names no files")
        value = folder.read(value, limits.bytes)
    if not isinstance(value, bytes):
        return value
    if len(value) > limits.bytes:
        raise BadRecord("TOO_LARGE", f"{len(value)} bytes, the most are {limits.bytes}")
    pillow = require("PIL.Image", "an image", "models")
    ops = require("PIL.ImageOps", "an image", "models")
    # Pillow warns of what is large, and raises at what is twice as large.
    bombs = (pillow.DecompressionBombError, pillow.DecompressionBombWarning)
    try:
        with pillow.open(io.BytesIO(value), formats=FORMATS) as image:
            width, height = image.size
            if width * height > limits.pixels:
                raise BadRecord(
                    "TOO_LARGE",
                    f"{height} x {width} pixels, the most are {limits.pixels}",
                )
            if image.mode.split(";")[0] in _DEEP:
                raise BadRecord(
                    "WRONG_DTYPE", f"mode {image.mode}, 8 bits a sample are wanted"
                )
            wanted = shape or _RGB
            gray = len(wanted) == 2 or wanted[2:] == (1,)
            upright = ops.exif_transpose(image)
            found = np.array(upright.convert("L" if gray else "RGB"))
            return found[..., None] if gray and len(wanted) == 3 else found
    except BadRecord:
        raise
    except bombs as error:
        raise BadRecord("TOO_LARGE", str(error)) from None
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's decoders raise many kinds of errors at damaged bytes.
        reason = "TRUNCATED" if "truncated" in str(error).lower() else "UNDECODABLE"
        raise BadRecord(reason, f"{type(error).__name__}: {error}") from None
