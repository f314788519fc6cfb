"""Is an attribution true, stable, and about this model? One metric, one file.

    metric(model, *, options) -> measure(x, attribution, *rest, target=None, key=None)

measures one attribution of one example and returns a `Measurement`; `jax.vmap` makes
the batch, and no statistic crosses it. The attribution, or its scores, stands right
after the explained argument. Metrics of scores alone have the same form and do not run
the model. The functions that compare two attributions take the two.
"""

from xviz_jax.metrics import imputers as imputers
from xviz_jax.metrics.abpc import abpc as abpc
from xviz_jax.metrics.completeness import completeness as completeness
from xviz_jax.metrics.complexity import complexity as complexity
from xviz_jax.metrics.comprehensiveness import comprehensiveness as comprehensiveness
from xviz_jax.metrics.deletion import deletion as deletion
from xviz_jax.metrics.efficient_mprt import efficient_mprt as efficient_mprt
from xviz_jax.metrics.faithfulness_correlation import (
    faithfulness_correlation as faithfulness_correlation,
)
from xviz_jax.metrics.infidelity import infidelity as infidelity
from xviz_jax.metrics.insertion import insertion as insertion
from xviz_jax.metrics.kendall_tau import kendall_tau as kendall_tau
from xviz_jax.metrics.measurement import NEEDS as NEEDS
from xviz_jax.metrics.measurement import REASONS as REASONS
from xviz_jax.metrics.measurement import Measurement as Measurement
from xviz_jax.metrics.measurement import Metric as Metric
from xviz_jax.metrics.measurement import Reason as Reason
from xviz_jax.metrics.mprt import mprt as mprt
from xviz_jax.metrics.pointing_game import pointing_game as pointing_game
from xviz_jax.metrics.random_logit import random_logit as random_logit
from xviz_jax.metrics.rank_agreement import rank_agreement as rank_agreement
from xviz_jax.metrics.relevance_mass import relevance_mass as relevance_mass
from xviz_jax.metrics.relevance_rank import relevance_rank as relevance_rank
from xviz_jax.metrics.road import road as road
from xviz_jax.metrics.sensitivity_max import sensitivity_max as sensitivity_max
from xviz_jax.metrics.sensitivity_n import sensitivity_n as sensitivity_n
from xviz_jax.metrics.sign_agreement import sign_agreement as sign_agreement
from xviz_jax.metrics.sparseness import sparseness as sparseness
from xviz_jax.metrics.spearman import spearman as spearman
from xviz_jax.metrics.sufficiency import sufficiency as sufficiency
from xviz_jax.metrics.top_k_overlap import top_k_overlap as top_k_overlap
