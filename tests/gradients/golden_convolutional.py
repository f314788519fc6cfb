"""Integrated gradients of the convolutional network, by Captum in float64.

    pip install torch==2.13.0 captum==0.9.0 numpy
    python tests/gradients/golden_convolutional.py

in an environment of its own, which needs nothing else, from the repository's root.
Writes `goldens/convolutional_captum.npz`: Gauss-Legendre with 50 steps, Captum's
default, of the logit that is largest at the image.
"""

from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).parent / "goldens"
IMAGES = Path("xviz_jax/models/embedded/images.npz")
COUNT, STEPS = 3, 50


def main():
    import captum  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    functional = torch.nn.functional
    weights = {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in np.load(GOLDENS / "convolutional.npz").items()
    }

    def forward(images):
        x = images[:, None]
        # "SAME" of an even length pads after, of an odd one on both sides.
        for layer, pad in ((1, (0, 1, 0, 1)), (2, (0, 1, 0, 1)), (3, (1, 1, 1, 1))):
            kernel = weights[f"kernel{layer}"].permute(3, 2, 0, 1)
            x = functional.pad(x, pad)
            x = functional.conv2d(x, kernel, weights[f"bias{layer}"], stride=2)
            x = torch.relu(x)
        flat = x.permute(0, 2, 3, 1).flatten(1)
        return flat @ weights["head"] + weights["offset"]

    pixels = np.load(IMAGES)["images"][:COUNT]
    images = torch.tensor(pixels, dtype=torch.float64) / 255
    targets = forward(images).argmax(dim=1)
    method = captum.attr.IntegratedGradients(forward)
    found = {"steps": np.int32(STEPS)}
    for name, baseline in (("zeros", 0.0), ("gray", 0.5)):
        scores = method.attribute(images, baseline, targets, n_steps=STEPS)
        found[name] = scores.numpy().astype(np.float32)
    path = GOLDENS / "convolutional_captum.npz"
    np.savez_compressed(path, allow_pickle=False, **found)


if __name__ == "__main__":
    main()
