"""An exact quantile of the fused attention matrix."""

from xviz_jax.kernels.attention_fused_quantile.api import (
    attention_fused_quantile as attention_fused_quantile,
)
