"""Flax NNX transformers to explain; they know nothing of attribution."""

from xviz_jax.models import embedded as embedded
