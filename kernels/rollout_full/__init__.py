"""The whole attention rollout."""

from xviz_jax.kernels.rollout_full.api import rollout_full as rollout_full
