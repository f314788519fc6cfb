"""Attention visualization: one method, one file."""

from xviz_jax.attention.attention_relevance import (
    attention_relevance as attention_relevance,
)
from xviz_jax.attention.attention_rollout import attention_rollout as attention_rollout
