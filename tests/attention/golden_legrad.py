# pyright: reportMissingImports=false
"""LeGrad of its authors' package, for tests/attention/test_goldens.py.

    pip install legrad-torch==1.1 open-clip-torch==2.23.0 torch==2.14.1
    python tests/attention/golden_legrad.py

Runs a tiny random CLIP whose patches are pixels, so that nothing is made larger. The
map is of the last two layers, as it comes: between 0 and 1. Writes the image tower's
weights, an image, what is looked for in it, and the map, as `goldens/legrad.npz`.
"""

from pathlib import Path

import numpy as np
import torch
from legrad import LeWrapper
from open_clip.model import CLIP

HERE = Path(__file__).parent
VISION = dict(layers=3, width=8, head_width=4, mlp_ratio=2, patch_size=1, image_size=4)
TEXT = dict(layers=1, width=8, heads=1, context_length=4, vocab_size=8)


def main() -> None:
    torch.manual_seed(0)
    model = CLIP(embed_dim=6, vision_cfg=VISION, text_cfg=TEXT).eval()
    for weight in model.visual.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    image, text = torch.randn(1, 3, 4, 4), torch.randn(1, 6)
    found = {
        name: weight.detach().numpy()
        for name, weight in model.visual.named_parameters()
    }
    wrapped = LeWrapper(model, layer_index=-2)
    maps = wrapped.compute_legrad(text_embedding=text, image=image)
    found |= {"image": image[0].numpy(), "text": text[0].numpy()}
    found["map"] = maps[0, 0].detach().numpy()
    np.savez(HERE / "goldens" / "legrad.npz", allow_pickle=False, **found)


if __name__ == "__main__":
    main()
