"""Where a ViT's or DeiT's parameters are in a published checkpoint."""

from collections.abc import Mapping as MappingType
from typing import Any

import numpy as np

from xviz_jax.models import settings
from xviz_jax.models.mapping import Mapping, Source, linear, norm
from xviz_jax.models.vit.modeling import Config

# `architectures` of config.json: whether there is a head, and a second one.
_HEADS = {
    "ViTModel": (False, False),
    "ViTForImageClassification": (True, False),
    "DeiTModel": (False, False),
    "DeiTForImageClassification": (True, False),
    "DeiTForImageClassificationWithTeacher": (True, True),
}


def configure(raw: MappingType[str, Any]) -> Config:
    """Reads `config.json`, with transformers' defaults for what it does not say.

    Raises:
      ValueError: If it asks for something that is not implemented.
    """
    classified, teacher = _HEADS[settings.architecture(raw, _HEADS)]
    patch, grid = patches(raw, patch=16)
    width = settings.integer(raw, "hidden_size", 768)
    pooler = None
    # Not a setting of the published code, which makes a pooler up where a file has
    # none: DINO's checkpoints, say.
    if not classified and settings.flag(raw, "add_pooling_layer", True):
        size = settings.integer(raw, "pooler_output_size", width)
        pooler = size, settings.activation(raw, "pooler_act", "tanh")
    return Config(
        width=width,
        depth=settings.integer(raw, "num_hidden_layers", 12),
        heads=heads(raw, width),
        hidden=settings.integer(raw, "intermediate_size", 3072),
        activation=settings.activation(raw, "hidden_act", "gelu"),
        epsilon=settings.number(raw, "layer_norm_eps", 1e-12),
        qkv_bias=settings.flag(raw, "qkv_bias", True),
        patch=patch,
        grid=grid,
        channels=settings.integer(raw, "num_channels", 3),
        distilled=raw["model_type"] == "deit",
        classes=settings.classes(raw) if classified else None,
        teacher=teacher,
        pooler=pooler,
    )


def mapping(config: Config) -> Mapping:
    """The tensors of `save_pretrained`, which later versions write as the first did."""
    tensors = embeddings()
    if config.distilled:
        tensors["embeddings/distillation_token"] = Source(
            "embeddings.distillation_token", first
        )
    layer, name = "layers/{layer}", "encoder.layer.{layer}"
    tensors |= attention(layer, name, bias=config.qkv_bias)
    tensors |= norm(f"{layer}/attention_norm", f"{name}.layernorm_before")
    tensors |= norm(f"{layer}/mlp_norm", f"{name}.layernorm_after")
    tensors |= linear(f"{layer}/up", f"{name}.intermediate.dense")
    tensors |= linear(f"{layer}/down", f"{name}.output.dense")
    tensors |= norm("norm", "layernorm")
    ignored = {r"^embeddings\.mask_token$": "stands for hidden patches in training"}
    if config.pooler is not None:
        tensors |= linear("pooler", "pooler.dense")
    else:
        ignored[r"^pooler\."] = "what is asked of the model does without"
    if config.teacher:
        tensors |= linear("head", "cls_classifier")
        tensors |= linear("distillation_head", "distillation_classifier")
    elif config.classes is not None:
        tensors |= linear("head", "classifier")
    return Mapping(
        depths={"layers": config.depth},
        tensors=tensors,
        renames={r"^(vit|deit)\.": ""},
        ignored=ignored,
    )


def first(array: np.ndarray) -> np.ndarray:
    """A tensor without its batch axis of length 1."""
    return array.reshape(array.shape[-2:])


def convolution(array: np.ndarray) -> np.ndarray:
    """A kernel [out, in, height, width] as [height, width, in, out]."""
    return array.transpose(2, 3, 1, 0)


def embeddings() -> dict[str, str | Source]:
    """Patches, class token and positions."""
    projection = "embeddings.patch_embeddings.projection"
    return {
        "embeddings/patches/projection/kernel": Source(
            f"{projection}.weight", convolution
        ),
        "embeddings/patches/projection/bias": f"{projection}.bias",
        "embeddings/class_token": Source("embeddings.cls_token", first),
        "embeddings/position": Source("embeddings.position_embeddings", first),
    }


def attention(path: str, name: str, *, bias: bool) -> dict[str, str | Source]:
    """The four projections of a layer's attention."""
    tensors = linear(f"{path}/attention/out", f"{name}.attention.output.dense")
    for each in ("query", "key", "value"):
        tensors |= linear(
            f"{path}/attention/{each}", f"{name}.attention.attention.{each}", bias=bias
        )
    return tensors


def patches(
    raw: MappingType[str, Any], *, patch: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of a patch, and rows and columns of the table of positions.

    Raises:
      ValueError: If these are no sizes, or no patch fits in the image.
    """
    size, image = _pair(raw, "patch_size", patch), _pair(raw, "image_size", 224)
    grid = image[0] // size[0], image[1] // size[1]
    if 0 in grid:
        raise ValueError(f"no patch of {size} fits in an image of {image}")
    return size, grid


def _pair(raw: MappingType[str, Any], key: str, default: int) -> tuple[int, int]:
    """A height and a width, given as one number or as two."""
    value = raw.get(key)
    if not isinstance(value, list | tuple):
        side = settings.integer(raw, key, default)
        return side, side
    if len(value) != 2:
        raise ValueError(f"`{key}` in config.json has {len(value)} numbers, not two")
    height, width = (settings.integer({key: each}, key) for each in value)
    return height, width


def heads(raw: MappingType[str, Any], width: int) -> int:
    """How many heads share the width.

    Raises:
      ValueError: If they do not share it evenly.
    """
    count = settings.heads(raw, "num_attention_heads", 12, width)
    settings.refuse(raw, {"head_dim": width // count})
    return count
