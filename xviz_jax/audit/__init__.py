"""Millions of inputs explained: records in, shards of attributions out."""

from xviz_jax.audit.estimate import Estimate as Estimate
from xviz_jax.audit.estimate import estimate as estimate
from xviz_jax.audit.job import Job as Job
from xviz_jax.audit.lock import Busy as Busy
from xviz_jax.audit.model import Model as Model
from xviz_jax.audit.progress import Progress as Progress
from xviz_jax.audit.progress import Summary as Summary
from xviz_jax.audit.ray import Ray as Ray
from xviz_jax.audit.result import Audit as Audit
from xviz_jax.audit.result import open as open
from xviz_jax.audit.run import run as run
from xviz_jax.audit.runner import Changed as Changed
from xviz_jax.audit.sources import BadRecord as BadRecord
from xviz_jax.audit.sources import Buckets as Buckets
from xviz_jax.audit.sources import Column as Column
from xviz_jax.audit.sources import Limits as Limits
from xviz_jax.audit.sources import Record as Record
from xviz_jax.audit.sources import Source as Source
from xviz_jax.audit.sources import open_source as open_source
from xviz_jax.audit.stopping import Stop as Stop
