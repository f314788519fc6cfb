"""Published checkpoints as Flax NNX models to explain; they know no attribution.

`load` reads a model's folder, `text` its tokenizer and `image` its preprocessing;
the three need the extra `xviz-jax[models]`. `embedded` needs nothing.
"""

from xviz_jax.models import embedded as embedded
from xviz_jax.models.image import image as image
from xviz_jax.models.loading import Pretrained as Pretrained
from xviz_jax.models.loading import load as load
from xviz_jax.models.text import TextProcessor as TextProcessor
from xviz_jax.models.text import text as text
