"""The fused attention matrix times columns of values."""

from xviz_jax.kernels.attention_col_product.api import (
    attention_col_product as attention_col_product,
)
