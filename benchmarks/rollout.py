"""Attention rollout over its floor, one forward pass, on the embedded model."""

import jax
import jax.numpy as jnp
import numpy as np
from timing import arguments, paired, report

import xviz_jax as xv
from xviz_jax import tracing
from xviz_jax.models import embedded


def main() -> None:
    options = arguments(__doc__)
    sizes, rounds = ((2,), 2) if options.small else ((1, 4, 32), options.rounds)
    forward, parameters = embedded.functional()
    pairs = []
    for batch in sizes:
        images = jnp.asarray(embedded.images()[0][:batch])
        floor = jax.jit(jax.vmap(forward, in_axes=(None, 0)))
        explain = xv.attention_rollout(forward)
        program = jax.jit(jax.vmap(explain, in_axes=(None, 0)))
        wanted = reference(forward, parameters, images[0])
        error = np.abs(program(parameters, images).scores[0] - wanted).sum()
        pairs.append(
            paired(
                f"{batch} images, 197 tokens, 4 layers x 4 heads",
                lambda program=program, images=images: program(parameters, images),
                lambda floor=floor, images=images: floor(parameters, images),
                rounds=rounds,
                error=f"{error:.1e} to float64",
            )
        )
    title = "Attention rollout over a forward pass"
    report(title, "python benchmarks/rollout.py --save", pairs, save=options.save)


def reference(forward, parameters, image) -> np.ndarray:
    """The full product in float64, from the captured maps."""
    _, captured = tracing.capture(forward)(parameters, image)
    product = np.eye(197)
    for values in captured.values():
        fused = np.asarray(values["probabilities"][0], np.float64).mean(axis=0)
        product = (np.eye(197) + fused) / 2 @ product
    return product[0]


if __name__ == "__main__":
    main()
