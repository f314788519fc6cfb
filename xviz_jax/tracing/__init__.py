"""See inside any JAX function: find, read, perturb and replace its sites."""

from xviz_jax.tracing.site import Site as Site
from xviz_jax.tracing.transforms import attention_cotangents as attention_cotangents
from xviz_jax.tracing.transforms import capture as capture
from xviz_jax.tracing.transforms import perturb as perturb
from xviz_jax.tracing.transforms import replace as replace
from xviz_jax.tracing.transforms import sites as sites
