"""Four CPU devices, strict promotion, quick compilation and a cache of its programs."""

import gc
import os
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most of a test's time is compilation. It takes half of it without the emitters of
# fused loops, where XLA can do without; `XLA_FLAGS= pytest` compiles as users do.
if jax.__version_info__ < (0, 11):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
# Most tests compile what another has.
CACHE = Path(__file__).parent.parent / ".jax_cache"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# The same for processes that a test starts.
SHARED = {
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

# Tracing makes many objects and little garbage: looking for it takes 5% of the time.
gc.set_threshold(200_000, 20, 100)
