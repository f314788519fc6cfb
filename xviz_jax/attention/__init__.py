"""Attention visualization: one method, one file."""

from xviz_jax.attention.attcat import attcat as attcat
from xviz_jax.attention.attention_flow import attention_flow as attention_flow
from xviz_jax.attention.attention_grad_cam import (
    attention_grad_cam as attention_grad_cam,
)
from xviz_jax.attention.attention_relevance import (
    attention_relevance as attention_relevance,
)
from xviz_jax.attention.attention_rollout import attention_rollout as attention_rollout
from xviz_jax.attention.attention_statistics import (
    attention_statistics as attention_statistics,
)
from xviz_jax.attention.attn_lrp import attn_lrp as attn_lrp
from xviz_jax.attention.cp_lrp import cp_lrp as cp_lrp
from xviz_jax.attention.grad_sam import grad_sam as grad_sam
from xviz_jax.attention.gradient_rollout import gradient_rollout as gradient_rollout
from xviz_jax.attention.legrad import legrad as legrad
from xviz_jax.attention.raw_attention import raw_attention as raw_attention
from xviz_jax.attention.special_tokens import special_tokens as special_tokens
from xviz_jax.attention.value_zeroing import value_zeroing as value_zeroing
