"""What each attention head does, query by query."""

from xviz_jax.kernels.attention_statistics.api import (
    attention_statistics as attention_statistics,
)
from xviz_jax.kernels.attention_statistics.statistics import (
    AttentionStatistics as AttentionStatistics,
)
