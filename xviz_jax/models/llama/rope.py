"""Rotary positions (Su et al., 2021, arXiv 2104.09864), and how they are stretched."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """How fast each pair of features turns with the position.

    Attributes:
      theta: The base of the frequencies.
      kind: `default`; `linear`, all frequencies divided by `factor`; `llama3`, low
        ones divided, high ones kept, and a ramp between (Llama 3.1's report, arXiv
        2407.21783, and its published configuration).
      factor: How much longer sequences may become.
      low: Wavelengths above `original / low` are divided.
      high: Wavelengths below `original / high` are kept.
      original: The length the model was trained for at first.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def turns(self, length: int, width: int) -> jax.Array:
        """Cosines and sines for each position, float32 [2, length, width / 2]."""
        exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / width
        frequencies = 1.0 / self.theta**exponents
        if self.kind == "linear":
            frequencies = frequencies / self.factor
        elif self.kind == "llama3":
            waves = self.original * frequencies / (2 * math.pi)
            kept = jnp.clip((waves - self.low) / (self.high - self.low), 0, 1)
            frequencies = frequencies * (kept + (1 - kept) / self.factor)
        positions = jnp.arange(length, dtype=jnp.float32)
        angles = jnp.outer(positions, frequencies)
        return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x: jax.Array, turns: jax.Array) -> jax.Array:
    """Turns queries or keys by their positions.

    Args:
      x: [length, heads, width]; feature i is paired with feature i + width / 2.
      turns: As `Rope.turns` makes them, in the dtype of `x`.
    """
    cosine, sine = turns[0][:, None, :], turns[1][:, None, :]
    first, second = jnp.split(x, 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1)
