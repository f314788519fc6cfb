"""Read `preprocessor_config.json`, and refuse what is not implemented."""

import math
from pathlib import Path
from typing import Any

from xviz_jax.models.checkpoint import read_json

_HALF = (0.5, 0.5, 0.5)
_COMMON = {
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}
# What a processor does where its file is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": {
        **_COMMON,
        "size": {"height": 224, "width": 224},
        "resample": 2,
        "image_mean": _HALF,
        "image_std": _HALF,
    },
    "DeiT": {
        **_COMMON,
        "size": {"height": 256, "width": 256},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
        "image_mean": _HALF,
        "image_std": _HALF,
    },
    "Bit": {
        **_COMMON,
        "size": {"shortest_edge": 224},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
        "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711),
    },
}
_BY_MODEL = {
    "vit": "ViT",
    "deit": "DeiT",
    "dinov2": "Bit",
    "dinov2_with_registers": "Bit",
}
_SUFFIXES = ("FeatureExtractor", "ImageProcessorFast", "ImageProcessor")
_STEPS = {name for name in _COMMON if name.startswith("do_")} | {"do_convert_rgb"}


def read(folder: Path) -> dict[str, Any]:
    """The fields of an `ImageProcessor`, but for its limit.

    Raises:
      ValueError: If the file is missing or not understood.
    """
    path, config = folder / "preprocessor_config.json", folder / "config.json"
    found = read_json(path)
    model = read_json(config) if config.is_file() else {}
    try:
        return _fields(found, model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _fields(found: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    kind = _kind(found, model)
    steps = {name: on for name, on in found.items() if name.startswith("do_")}
    beyond = sorted(name for name in steps.keys() - _STEPS if steps[name])
    if beyond:
        raise ValueError(f"it switches on {beyond}, which is not implemented")
    odd = sorted(n for n, on in steps.items() if on not in (True, False, None))
    if odd:
        raise ValueError(f"{odd} are true or false, got {[steps[n] for n in odd]}")
    said = {name: value for name, value in found.items() if value is not None}
    settings = {**_DEFAULTS[kind], **said}
    resize = crop = patch = None
    if settings["do_resize"]:
        resize = _size(settings["size"], square=kind != "Bit")
    if settings["do_center_crop"]:
        crop = _pair(settings["crop_size"], "crop_size")
    if model.get("patch_size") is not None:
        patch = _pair(model["patch_size"], "patch_size")
    normalise = settings["do_normalize"]
    return {
        "resize": resize,
        "resample": _filter(settings["resample"]),
        "crop": crop,
        "scale": _number(settings["rescale_factor"], "rescale_factor")
        if settings["do_rescale"]
        else 1.0,
        "mean": _channels(settings, "image_mean") if normalise else (0.0,) * 3,
        "std": _channels(settings, "image_std") if normalise else (1.0,) * 3,
        "patch": patch,
    }


def _kind(found: dict[str, Any], model: dict[str, Any]) -> str:
    named = found.get("image_processor_type") or found.get("feature_extractor_type")
    if named is None:
        kind = _BY_MODEL.get(model.get("model_type", ""))
    else:
        kind = str(named)
        for suffix in _SUFFIXES:
            kind = kind.removesuffix(suffix)
    if kind not in _DEFAULTS:
        raise ValueError(
            f"the image processor {named!r} of a {model.get('model_type')!r} is not "
            f"known; those of {list(_DEFAULTS)} are"
        )
    return kind


def _size(value: Any, *, square: bool) -> dict[str, int]:
    """A size in pixels by name; older files give a number or a pair."""
    size = value
    if isinstance(value, int):
        size = {"height": value, "width": value}
        if not square:
            size = {"shortest_edge": value}
    elif isinstance(value, list | tuple) and len(value) == 2:
        size = {"height": value[0], "width": value[1]}
    forms = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"})
    if not isinstance(size, dict) or set(size) not in forms:
        raise ValueError(
            "a size has `height` and `width`, or `shortest_edge` with or without "
            f"`longest_edge`; got {value!r}"
        )
    for each in size.values():
        if isinstance(each, bool) or not isinstance(each, int) or each < 1:
            raise ValueError(f"a size is a positive number of pixels, got {value!r}")
    return size


def _pair(value: Any, name: str) -> tuple[int, int]:
    size = _size(value, square=True)
    if "height" not in size:
        raise ValueError(f"`{name}` has a height and a width, got {value!r}")
    return size["height"], size["width"]


def _filter(value: Any) -> int:
    if type(value) is not int or value not in range(6):
        raise ValueError(f"`resample` is Pillow's number from 0 to 5, got {value!r}")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"`{name}` is a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` is finite, got {value!r}")
    return float(value)


def _channels(settings: dict[str, Any], name: str) -> tuple[float, ...]:
    value = settings[name]
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ValueError(f"`{name}` has one number for each channel, got {value!r}")
    numbers = tuple(_number(each, name) for each in value)
    if name == "image_std" and 0 in numbers:
        raise ValueError(f"`image_std` is not zero, got {value!r}")
    return numbers
