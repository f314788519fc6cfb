"""What is explained of a model's output, and how that is said."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax.explain.subject import Subject

_LISTED = 5


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is explained.

    Attributes:
      target: As methods take it.
      said: The same in words.
      ranked: The most probable classes, in words.
    """

    target: Any
    said: str
    ranked: tuple[str, ...] = ()


def choose(
    subject: Subject, target: str | None, versus: str | None, against: str | None
) -> Choice:
    """Makes a target of what a user asks for.

    Args:
      subject: The model and its input; it is run once.
      target: A class's number or name; None for the predicted class, or the length
        of features.
      versus: Another class, whose logit is subtracted.
      against: A text or image file, whose cosine with the features is explained.

    Raises:
      ValueError: If they do not fit the model or each other.
    """
    forward = jax.jit(subject.forward)
    output = np.asarray(forward(subject.parameters, *subject.args), np.float32)
    if output.ndim != 1:
        raise ValueError(
            f"the model returns an array of {list(output.shape)}, wanted one number "
            "for each class"
        )
    if against is not None:
        if subject.read is None or target is not None or versus is not None:
            raise ValueError("`--against` takes a text or image, and no `--target`")
        other = forward(subject.parameters, *subject.read(against))
        return Choice(cosine(other), f"cosine with {against!r}")
    if versus is not None and (target is None or subject.features):
        raise ValueError("`--versus` is a class, and needs another as `--target`")
    if subject.features and target is None:
        return Choice(_length(output), "length of the features as they point")
    best = np.argsort(output)[::-1]
    chosen = int(best[0]) if target is None else _find(subject, target, len(output))
    name = subject.name(chosen)
    if subject.features:
        return Choice(chosen, f"feature {name}")
    share = np.asarray(jax.nn.softmax(output))
    listed = [f"{subject.name(int(i))} {share[i]:.1%}" for i in best[:_LISTED]]
    if versus is None:
        return Choice(chosen, name, tuple(listed))
    less = _find(subject, versus, len(output))
    said = f"{name} and not {subject.name(less)}"
    return Choice((chosen, less), said, tuple(listed))


def _find(subject: Subject, said: str, classes: int) -> int:
    if said.isdecimal():
        index = int(said)
    elif subject.find is not None:
        index = subject.find(said)
    else:
        raise ValueError(f"a class is a number here, got {said!r}")
    if index >= classes:
        raise ValueError(f"a class is a number below {classes}, got {index}")
    return index


def cosine(other: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The cosine of features with other features, as a target."""
    unit = other / jnp.linalg.norm(other)
    return lambda output: jnp.vdot(output, unit) / jnp.linalg.norm(output)


def _length(output: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    unit = jnp.asarray(output / np.linalg.norm(output))
    return lambda output: jnp.vdot(output, unit)
