"""Is an attribution true, stable, and about this model? One metric, one file.

    metric(model, *, options) -> measure(x, attribution, *rest, target=None, key=None)

measures one attribution of one example and returns a `Measurement`; `jax.vmap` makes
the batch, and no statistic crosses it. The attribution, or its scores, stands right
after the explained argument. Metrics of scores alone have the same form and do not run
the model. The functions that compare two attributions take the two.
"""

from xviz_jax.metrics import imputers as imputers
from xviz_jax.metrics.abpc import abpc as abpc
from xviz_jax.metrics.comprehensiveness import comprehensiveness as comprehensiveness
from xviz_jax.metrics.deletion import deletion as deletion
from xviz_jax.metrics.insertion import insertion as insertion
from xviz_jax.metrics.measurement import NEEDS as NEEDS
from xviz_jax.metrics.measurement import REASONS as REASONS
from xviz_jax.metrics.measurement import Measurement as Measurement
from xviz_jax.metrics.measurement import Metric as Metric
from xviz_jax.metrics.measurement import Reason as Reason
from xviz_jax.metrics.sufficiency import sufficiency as sufficiency
