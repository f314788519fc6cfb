"""The fused attention matrix itself."""

from xviz_jax.kernels.attention_fused_matrix.api import (
    attention_fused_matrix as attention_fused_matrix,
)
