"""Axes in, Axes out; takes arrays and knows no method.

Signed scores are drawn on a diverging map centred at zero, others on a sequential
one. Figures are built without pyplot, so nothing is shown and nothing leaks.
"""

from xviz_jax.plotting.faithfulness import faithfulness as faithfulness
from xviz_jax.plotting.gallery import gallery as gallery
from xviz_jax.plotting.image_attribution import image_attribution as image_attribution
from xviz_jax.plotting.position_attribution import (
    position_attribution as position_attribution,
)
from xviz_jax.plotting.text_attribution import text_attribution as text_attribution
