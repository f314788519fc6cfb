"""Integrated gradients over its floor, on the embedded model.

The floor is the same number of forward and backward passes of the same batch, in
one compiled loop, with no attribution: gradients at the images themselves, summed
so that none can be left out.
"""

import jax
import jax.numpy as jnp
import numpy as np
from timing import arguments, paired, report

import xviz_jax as xv
from xviz_jax.models import embedded


def main() -> None:
    options = arguments(__doc__)
    batch, steps, rounds = (2, 4, 2) if options.small else (8, 24, options.rounds)
    forward, parameters = embedded.functional()
    images = jnp.asarray(embedded.images()[0][:batch])
    pairs = []
    for chunk in (1, 4):
        explain = xv.integrated_gradients(forward, steps=steps, chunk=chunk, argnums=1)
        program = jax.jit(jax.vmap(explain, in_axes=(None, 0)))
        loop = jax.jit(passes(forward, steps, chunk))
        exact = xv.integrated_gradients(forward, steps=8 * steps, chunk=1, argnums=1)
        wanted = jax.jit(jax.vmap(exact, in_axes=(None, 0)))(parameters, images).scores
        got = program(parameters, images).scores
        axes = (1, 2)
        errors = jnp.abs(got - wanted).sum(axes) / jnp.abs(wanted).sum(axes)
        pairs.append(
            paired(
                f"{batch} images, {steps} steps, chunk {chunk}",
                lambda program=program: program(parameters, images),
                lambda loop=loop: loop(parameters, images),
                rounds=rounds,
                error=f"{np.median(errors):.1e} to {8 * steps} steps",
            )
        )
    title = "Integrated gradients over forward and backward passes"
    command = "python benchmarks/integrated_gradients.py --save"
    report(title, command, pairs, save=options.save)


def passes(forward, steps: int, chunk: int):
    """The floor: `steps` forward and backward passes of each image."""

    def scalar(image, parameters):
        return jnp.max(forward(parameters, image))

    def one(parameters, image):
        def turn(total, shift):
            points = image + shift
            if chunk == 1:
                return total + jax.grad(scalar)(points[0], parameters), None
            gradients = jax.vmap(jax.grad(scalar), (0, None))(points, parameters)
            return total + gradients.sum(axis=0), None

        shifts = jnp.linspace(0, 1e-3, steps).reshape(-1, chunk, 1, 1)
        return jax.lax.scan(turn, jnp.zeros_like(image), shifts)[0]

    return jax.vmap(one, in_axes=(None, 0))


if __name__ == "__main__":
    main()
