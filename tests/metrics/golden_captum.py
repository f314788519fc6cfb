"""Makes `captum.npz`: what captum 0.9.0 (with torch 2.13.0) says of a small network.

    python tests/metrics/golden_captum.py    # with captum

Infidelity and sensitivity-max of signed gradients, in float64, with the moves of the
input that are stored beside them.
"""

from pathlib import Path

import captum.attr as ca  # pyright: ignore[reportMissingImports]
import captum.metrics as cm  # pyright: ignore[reportMissingImports]
import numpy as np
import torch  # pyright: ignore[reportMissingImports]

FILE = Path(__file__).parent / "captum.npz"
TARGET, SAMPLES = 2, 12


def main():
    torch.set_default_dtype(torch.float64)
    generator = np.random.default_rng(0)
    normal = lambda *shape: generator.normal(size=shape).astype(np.float32)
    given = {
        "first": normal(10, 36) / 3,
        "second": normal(4, 10),
        "x": normal(6, 6),
        "moves": normal(SAMPLES, 6, 6) / 4,
    }
    tensor = {
        name: torch.tensor(each.astype(np.float64)) for name, each in given.items()
    }
    network = lambda x: (
        torch.tanh(x.flatten(1) @ tensor["first"].T) @ tensor["second"].T
    )
    explain = lambda inputs, target: ca.Saliency(network).attribute(
        inputs, target=target, abs=False
    )
    x = tensor["x"][None].requires_grad_()
    gradient = explain(x, TARGET)
    found = {"scores": gradient[0].detach().numpy()}
    for normalize in (False, True):
        value = cm.infidelity(
            network,
            lambda inputs: (tensor["moves"], inputs - tensor["moves"]),
            x,
            gradient,
            target=TARGET,
            n_perturb_samples=SAMPLES,
            normalize=normalize,
        )
        name = "infidelity_normalized" if normalize else "infidelity"
        found[name] = value.detach().numpy()
    value = cm.sensitivity_max(
        explain,
        x,
        perturb_func=lambda inputs, _: inputs + tensor["moves"],
        n_perturb_samples=SAMPLES,
        target=TARGET,
    )
    found["sensitivity_max"] = value.detach().numpy()
    np.savez_compressed(FILE, **given, **found)
    print({name: each for name, each in found.items() if each.size == 1})


if __name__ == "__main__":
    main()
