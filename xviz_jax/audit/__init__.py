"""Millions of inputs explained: records in, shards of attributions out."""

from xviz_jax.audit.sources import BadRecord as BadRecord
from xviz_jax.audit.sources import Buckets as Buckets
from xviz_jax.audit.sources import Column as Column
from xviz_jax.audit.sources import Limits as Limits
from xviz_jax.audit.sources import Record as Record
from xviz_jax.audit.sources import Source as Source
from xviz_jax.audit.sources import open_source as open_source
