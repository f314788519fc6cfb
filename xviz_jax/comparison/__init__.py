"""Which explanation may be believed for this model and these data: the verdict."""

from xviz_jax.comparison.compare import compare as compare
from xviz_jax.comparison.result import CEILING as CEILING
from xviz_jax.comparison.result import CONTROLS as CONTROLS
from xviz_jax.comparison.result import Comparison as Comparison
from xviz_jax.comparison.result import Interval as Interval
from xviz_jax.comparison.result import Method as Method
from xviz_jax.comparison.result import Similarity as Similarity
from xviz_jax.comparison.result import Summary as Summary
from xviz_jax.comparison.result import Test as Test
from xviz_jax.comparison.result import in_words as in_words
