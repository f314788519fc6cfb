"""Makes `quantus.npz`: what Quantus 0.6.0 (with torch 2.13.0) says of a small network.

    python tests/metrics/golden_quantus.py sets       # with xviz_jax
    python tests/metrics/golden_quantus.py goldens    # with quantus

The first step stores the random sets of our faithfulness correlation. Only metrics
that Quantus has right, and one input at a time: it normalises over a batch, and its
ROAD reads the first batch alone.
"""

import sys
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "quantus.npz"
TARGET, SAMPLES, SIZE, BINS = 2, 40, 9, 12


def sets():
    import jax
    import jax.numpy as jnp

    from xviz_jax.metrics import subsets

    generator = np.random.default_rng(1)
    normal = lambda *shape: generator.normal(size=shape).astype(np.float32)
    first, _ = jax.random.split(jax.random.key(0))
    drawn = subsets.drawn(first, 36, jnp.full(SAMPLES, SIZE))
    np.savez_compressed(
        FILE,
        first=normal(10, 36) / 3,
        second=normal(4, 10),
        x=normal(6, 6),
        scores=normal(6, 6),
        mask=generator.random((6, 6)) < 0.3,
        known=generator.random((6, 6)) < 0.5,
        sets=np.asarray(drawn),
    )


def goldens():
    import quantus  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
    from quantus.functions import complexity_func, perturb_func  # pyright: ignore

    torch.set_default_dtype(torch.float64)
    given = dict(np.load(FILE))
    given = {name: given[name] for name in given if not name.startswith("quantus_")}
    matrix = {
        name: torch.tensor(given[name].astype(np.float64))
        for name in ("first", "second")
    }

    class Network(torch.nn.Module):
        def forward(self, x):
            x = x.to(torch.float64)
            return torch.tanh(x.flatten(1) @ matrix["first"].T) @ matrix["second"].T

    x = given["x"].astype(np.float64)[None, None]
    scores = given["scores"].astype(np.float64)[None, None]
    plain = dict(
        normalise=False, abs=False, disable_warnings=True, display_progressbar=False
    )
    batch = dict(
        model=Network().eval(), x_batch=x, y_batch=np.array([TARGET]), softmax=False,
        channel_first=True,
    )  # fmt: skip
    masked = dict(s_batch=given["mask"][None, None])
    drawn = iter([np.flatnonzero(each) for each in given["sets"]])
    choice, np.random.choice = np.random.choice, lambda *_, **__: next(drawn)
    try:
        correlation = quantus.FaithfulnessCorrelation(
            nr_runs=SAMPLES, subset_size=SIZE, perturb_baseline=0.0,
            return_aggregate=False, **plain,
        )(a_batch=scores, **batch)  # fmt: skip
    finally:
        np.random.choice = choice
    positive = {**plain, "abs": True}
    unknown = np.flatnonzero(~given["known"])
    found = {
        "faithfulness_correlation": correlation,
        "deletion": quantus.PixelFlipping(
            features_in_step=1, perturb_baseline=0.0, **plain
        )(a_batch=scores, **batch)[0],
        "sparseness": quantus.Sparseness(**positive)(a_batch=scores, **batch),
        "complexity": quantus.Complexity(**positive)(a_batch=scores, **batch),
        "entropy": complexity_func.discrete_entropy(scores, x, n_bins=BINS),
        "pointing_game": quantus.PointingGame(**plain)(
            a_batch=scores, **batch, **masked
        ),
        # Of positive scores alone, which Quantus takes as they are.
        "relevance_mass": quantus.RelevanceMassAccuracy(**plain)(
            a_batch=np.maximum(scores, 0), **batch, **masked
        ),
        "relevance_rank": quantus.RelevanceRankAccuracy(**plain)(
            a_batch=scores, **batch, **masked
        ),
        "noisy_linear": perturb_func.noisy_linear_imputation(x[0], unknown, noise=0.0),
    }
    found = {f"quantus_{name}": np.squeeze(each) for name, each in found.items()}
    np.savez_compressed(FILE, **given, **found)
    print({name: each for name, each in found.items() if each.size == 1})


if __name__ == "__main__":
    {"sets": sets, "goldens": goldens}[sys.argv[1]]()
