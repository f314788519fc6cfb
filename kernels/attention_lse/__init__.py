"""The logsumexp of attention scores."""

from xviz_jax.kernels.attention_lse.api import attention_lse as attention_lse
