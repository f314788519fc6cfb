"""Where a DINOv2's parameters are in a published checkpoint."""

from collections.abc import Mapping as MappingType
from typing import Any

import numpy as np

from xviz_jax.models import settings
from xviz_jax.models.dinov2.modeling import Config
from xviz_jax.models.mapping import Mapping, Source, linear, norm
from xviz_jax.models.vit import params as vit

# `architectures` of config.json: whether there is a head.
_HEADS = {
    "Dinov2Model": False,
    "Dinov2ForImageClassification": True,
    "Dinov2WithRegistersModel": False,
    "Dinov2WithRegistersForImageClassification": True,
}


def configure(raw: MappingType[str, Any]) -> Config:
    """Reads `config.json`, with transformers' defaults for what it does not say.

    Raises:
      ValueError: If it asks for something that is not implemented.
    """
    classified = _HEADS[settings.architecture(raw, _HEADS)]
    registered = raw["model_type"] == "dinov2_with_registers"
    patch, grid = vit.patches(raw, patch=16 if registered else 14)
    width = settings.integer(raw, "hidden_size", 768)
    swiglu = settings.flag(raw, "use_swiglu_ffn", False)
    hidden = int(width * settings.number(raw, "mlp_ratio", 4))
    if swiglu:
        # Two thirds, since there are three maps, in multiples of eight.
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    return Config(
        width=width,
        depth=settings.integer(raw, "num_hidden_layers", 12),
        heads=vit.heads(raw, width),
        hidden=hidden,
        swiglu=swiglu,
        activation=settings.activation(raw, "hidden_act", "gelu"),
        epsilon=settings.number(raw, "layer_norm_eps", 1e-6),
        qkv_bias=settings.flag(raw, "qkv_bias", True),
        patch=patch,
        grid=grid,
        channels=settings.integer(raw, "num_channels", 3),
        registers=settings.integer(raw, "num_register_tokens", 4) if registered else 0,
        antialias=registered,
        classes=settings.classes(raw) if classified else None,
    )


def mapping(config: Config) -> Mapping:
    """The tensors of `save_pretrained`, which later versions write as the first did."""
    tensors = vit.embeddings()
    if config.registers:
        tensors["embeddings/registers"] = Source(
            "embeddings.register_tokens", vit.first
        )
    layer, name = "layers/{layer}", "encoder.layer.{layer}"
    tensors |= vit.attention(layer, name, bias=config.qkv_bias)
    tensors |= norm(f"{layer}/attention_norm", f"{name}.norm1")
    tensors |= norm(f"{layer}/mlp_norm", f"{name}.norm2")
    tensors[f"{layer}/attention_scale"] = f"{name}.layer_scale1.lambda1"
    tensors[f"{layer}/mlp_scale"] = f"{name}.layer_scale2.lambda1"
    if config.swiglu:
        tensors |= linear(f"{layer}/mlp/down", f"{name}.mlp.weights_out")
        for part, half in (("gate", _gate), ("up", _up)):
            path, joint = f"{layer}/mlp/{part}", f"{name}.mlp.weights_in"
            tensors[f"{path}/kernel"] = Source(f"{joint}.weight", half)
            tensors[f"{path}/bias"] = Source(f"{joint}.bias", half)
    else:
        tensors |= linear(f"{layer}/mlp/up", f"{name}.mlp.fc1")
        tensors |= linear(f"{layer}/mlp/down", f"{name}.mlp.fc2")
    tensors |= norm("norm", "layernorm")
    if config.classes is not None:
        tensors |= linear("head", "classifier")
    return Mapping(
        depths={"layers": config.depth},
        tensors=tensors,
        renames={r"^dinov2(_with_registers)?\.": ""},
        ignored={r"^embeddings\.mask_token$": "stands for hidden patches in training"},
    )


def _gate(joint: np.ndarray) -> np.ndarray:
    """The first half of a joint map's outputs, as a kernel or a bias."""
    return joint.reshape(2, -1, *joint.shape[1:])[0].T


def _up(joint: np.ndarray) -> np.ndarray:
    """The second half."""
    return joint.reshape(2, -1, *joint.shape[1:])[1].T
