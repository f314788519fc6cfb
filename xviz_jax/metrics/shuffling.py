"""Models whose parameters were put out of order."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

# Permuted, drawn anew with the same mean and spread, or by a function of array and key.
Randomize = Literal["permute", "normal"] | Callable[[jax.Array, jax.Array], jax.Array]


def check(randomize: Any) -> None:
    """Raises ValueError unless `randomize` is known."""
    if not callable(randomize) and randomize not in ("permute", "normal"):
        raise ValueError(
            f"`randomize` is 'permute', 'normal' or a function, got {randomize!r}"
        )


def shuffled(parameters: Any, randomize: Randomize, key: jax.Array) -> Any:
    """All float parameters randomised, each array by itself; others as they are."""

    def shuffle(leaf: Any, own: jax.Array) -> Any:
        leaf = jnp.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        if callable(randomize):
            return randomize(leaf, own)
        if randomize == "permute":
            return jax.random.permutation(own, leaf.ravel()).reshape(leaf.shape)
        exact = leaf.astype(jnp.float32)
        noise = jax.random.normal(own, leaf.shape)
        return (jnp.mean(exact) + jnp.std(exact) * noise).astype(leaf.dtype)

    leaves, tree = jax.tree.flatten(parameters)
    keys = [jax.random.fold_in(key, number) for number in range(len(leaves))]
    return jax.tree.unflatten(tree, list(map(shuffle, leaves, keys)))


def layers_of(parameters: Any, layers: Sequence[str] | None) -> list[int]:
    """The layer's number of each array of parameters, from 0, in their order.

    Args:
      parameters: A pytree.
      layers: Where each layer's parameters lie, `blocks/0` for instance, from the
        input to the output; None for the entries of a list.

    Raises:
      ValueError: If a layer has no parameters, or an array not exactly one layer.
    """
    found = jax.tree_util.tree_flatten_with_path(parameters)[0]
    paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in found]
    if layers is None:
        if not isinstance(parameters, list | tuple):
            tops = sorted({path.split("/")[0] for path in paths})
            raise ValueError(
                "`layers` names the parameters of each layer, from the input to the "
                f"output (only for a list is it not needed); here are {tops}"
            )
        layers = [str(number) for number in range(len(parameters))]
    inside = lambda path, layer: path == layer or path.startswith(f"{layer}/")
    numbers = []
    for path in paths:
        own = [n for n, layer in enumerate(layers) if inside(path, layer)]
        if len(own) != 1:
            raise ValueError(
                f"the parameter {path!r} is in {len(own)} of the layers {list(layers)}"
            )
        numbers += own
    empty = sorted(set(range(len(layers))) - set(numbers))
    if empty:
        raise ValueError(f"{layers[empty[0]]!r} is no layer of the parameters {paths}")
    return numbers


def place_of(args: Sequence[Any], parameters_argnum: int) -> int:
    """The place of the parameters among the model's arguments.

    Raises:
      ValueError: If there is none.
    """
    if not -len(args) <= parameters_argnum < len(args):
        raise ValueError(
            f"`parameters_argnum` is {parameters_argnum}, but the model has "
            f"{len(args)} positional arguments"
        )
    return parameters_argnum % len(args)
