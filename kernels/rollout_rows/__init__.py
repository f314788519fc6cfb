"""Rows of the attention rollout."""

from xviz_jax.kernels.rollout_rows.api import rollout_rows as rollout_rows
