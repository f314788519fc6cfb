"""Rows of weights times the fused attention matrix."""

from xviz_jax.kernels.attention_row_product.api import (
    attention_row_product as attention_row_product,
)
