"""What transformers and torch say, for tests/models/test_vision.py and test_image.py.

    pip install torch==2.13.0 transformers==5.23.0 pillow matplotlib safetensors
    python tests/models/goldens/make_vision.py

Writes a folder for each tiny random model (its checkpoint, and `golden.npz`), one of
resized position tables and one of prepared images. The checkpoints are written by
`save_pretrained` and read back by `from_pretrained` before they are run.
"""

# pyright: reportMissingImports=false
import json
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

OUT = Path(__file__).parent / "vision"
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
    "layer_norm_eps": 1e-3,
}
# Class, configuration, height and width of the image, options of the call.
MODELS = {
    "vit": (
        ViTForImageClassification,
        ViTConfig(**TINY, intermediate_size=24),
        (16, 16),
        {},
    ),
    "vit_bare": (
        ViTModel,
        ViTConfig(
            **TINY,
            intermediate_size=24,
            qkv_bias=False,
            hidden_act="gelu_new",
            pooler_output_size=6,
        ),
        (12, 22),
        {"interpolate_pos_encoding": True},
    ),
    "deit": (
        DeiTForImageClassification,
        DeiTConfig(**TINY, intermediate_size=24),
        (16, 16),
        {},
    ),
    "deit_teacher": (
        DeiTForImageClassificationWithTeacher,
        DeiTConfig(**TINY, intermediate_size=24),
        (24, 20),
        {"interpolate_pos_encoding": True},
    ),
    "dinov2": (
        Dinov2ForImageClassification,
        Dinov2Config(**TINY, mlp_ratio=2),
        (12, 20),
        {},
    ),
    "dinov2_bare": (
        Dinov2Model,
        Dinov2Config(**TINY, mlp_ratio=2, use_swiglu_ffn=True, use_mask_token=False),
        (16, 16),
        {},
    ),
    "dinov2_registers": (
        Dinov2WithRegistersForImageClassification,
        Dinov2WithRegistersConfig(
            **TINY, mlp_ratio=2, use_swiglu_ffn=True, num_register_tokens=3
        ),
        (12, 20),
        {},
    ),
}
# Side of the table; rows and columns wanted.
POSITIONS = ((4, 7, 4), (6, 3, 5), (37, 16, 16), (3, 3, 3))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROCESSORS = {
    "vit": (ViTImageProcessorPil, {"size": {"height": 12, "width": 18}}),
    "vit_number": (ViTImageProcessorPil, {"size": 16, "resample": 0}),
    "vit_raw": (
        ViTImageProcessorPil,
        {"size": {"height": 9, "width": 9}, "do_rescale": False},
    ),
    "deit": (
        DeiTImageProcessorPil,
        {
            "size": {"height": 20, "width": 20},
            "crop_size": {"height": 15, "width": 16},
            "image_mean": MEAN,
            "image_std": STD,
        },
    ),
    "bit": (
        BitImageProcessorPil,
        {"size": {"shortest_edge": 18}, "crop_size": {"height": 16, "width": 16}},
    ),
    "bit_letterbox": (
        BitImageProcessorPil,
        {
            "size": {"shortest_edge": 16, "longest_edge": 16},
            "crop_size": {"height": 16, "width": 16},
            "resample": 4,
        },
    ),
    "bit_whole": (
        BitImageProcessorPil,
        {"size": {"shortest_edge": 15}, "do_center_crop": False, "resample": 1},
    ),
    "bit_fits": (
        BitImageProcessorPil,
        {
            "size": {"shortest_edge": 26, "longest_edge": 26},
            "crop_size": {"height": 9, "width": 30},
        },
    ),
    "bit_unresized": (
        BitImageProcessorPil,
        {
            "do_resize": False,
            "do_normalize": False,
            "crop_size": {"height": 13, "width": 16},
        },
    ),
}


def make_model(name: str, random: torch.Generator) -> None:
    """Writes one random checkpoint and what the model makes of one image."""
    kind, config, size, options = MODELS[name]
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Nothing is 0 or 1: a weight that is left out or swapped shows.
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(0.3 * noise + (parameter == 1))
    folder = OUT / name
    model.save_pretrained(folder)
    model = kind.from_pretrained(folder, attn_implementation="eager").eval()
    pixels = torch.randn((1, 3, *size), generator=random, requires_grad=True)
    got = model(pixels, output_attentions=True, **options)
    if hasattr(got, "logits"):
        outputs = {"logits": got.logits[0]}
        scalar = got.logits[0, 2]
    else:
        outputs = {"hidden": got.last_hidden_state[0], "pooled": got.pooler_output[0]}
        scalar = got.pooler_output[0, 2]
    scalar.backward()
    assert pixels.grad is not None
    arrays = {
        **outputs,
        "pixels": pixels[0].permute(1, 2, 0),
        "gradient": pixels.grad[0].permute(1, 2, 0),
        "attentions": torch.stack(got.attentions)[:, 0],
    }
    np.savez_compressed(
        folder / "golden.npz", **{k: v.detach().numpy() for k, v in arrays.items()}
    )


def make_positions(random: torch.Generator) -> None:
    """Writes position tables as torch resizes them, with and without antialias."""
    arrays = {}
    for side, rows, columns in POSITIONS:
        table = torch.randn((1, 2, side, side), generator=random)
        name = f"{side}_{rows}_{columns}"
        arrays[f"{name}_table"] = table[0].permute(1, 2, 0)
        for antialias in (False, True):
            resized = torch.nn.functional.interpolate(
                table,
                size=(rows, columns),
                mode="bicubic",
                align_corners=False,
                antialias=antialias,
            )
            arrays[f"{name}_{antialias}"] = resized[0].permute(1, 2, 0)
    np.savez_compressed(
        OUT / "positions.npz", **{k: v.numpy() for k, v in arrays.items()}
    )


def make_images() -> None:
    """Writes a small synthetic image, and it and a photograph as each prepares them."""
    random = np.random.default_rng(0)
    synthetic = random.integers(0, 256, (11, 27, 3), dtype=np.uint8)
    photograph = Image.open(
        Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    ).convert("RGB")
    arrays, settings = {"synthetic": synthetic}, {}
    for name, (kind, options) in PROCESSORS.items():
        processor = kind(**options)
        # What was asked for, not what was filled in: the defaults are tested too.
        shown = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
        title = kind.__name__.removesuffix("Pil")
        settings[name] = {"image_processor_type": title, **shown}
        for image in ("synthetic", "photograph"):
            source = Image.fromarray(synthetic) if image == "synthetic" else photograph
            pixels = processor(source, return_tensors="np")["pixel_values"][0]
            arrays[f"{name}_{image}"] = pixels.transpose(1, 2, 0)
    np.savez_compressed(OUT / "images.npz", allow_pickle=False, **arrays)
    (OUT / "images.json").write_text(json.dumps(settings, indent=1) + "\n")


def main() -> None:
    """Writes everything anew."""
    OUT.mkdir(exist_ok=True)
    random = torch.Generator().manual_seed(0)
    for name in MODELS:
        make_model(name, random)
    make_positions(random)
    make_images()


if __name__ == "__main__":
    main()
