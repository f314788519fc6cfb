"""Record sources: what an audit reads, one format in one file.

A source has a length and gives records by number. It is pickled by its description,
so another process opens its own handles; its memory does not grow with the records.
"""

from xviz_jax.audit.sources.buckets import Buckets as Buckets
from xviz_jax.audit.sources.opening import open_source as open_source
from xviz_jax.audit.sources.record import BadRecord as BadRecord
from xviz_jax.audit.sources.record import Limits as Limits
from xviz_jax.audit.sources.record import Record as Record
from xviz_jax.audit.sources.schema import Column as Column
from xviz_jax.audit.sources.source import Source as Source
