"""What a case of the zoo is, and the tools its explicit implementations use.

A case pairs an ordinary model, which knows nothing of tracing, with an explicit
implementation of the same function that hands every attention map to a `Tap`. The
tap writes the map down in canonical order and adds an epsilon to it, so that the
explicit implementation says what capturing, perturbing and differentiating with
respect to the probabilities of the model must give.
"""

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ATTENTION_LIKE = ("attention", "inverted", "pooling")
BATCH, LENGTH, SOURCE, HEADS, DIM, WIDTH = 2, 5, 7, 3, 4, 6

_GROUPS = ("bcw", "hg", "q", "k")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of the zoo and what is expected of it."""

    name: str
    build: Callable[[], tuple[Callable, tuple, Callable]]
    kinds: tuple[str, ...] = ("attention",)
    """Kinds of its attention-like sites in program order; "a|b" admits both."""
    tolerance: float = 2e-5
    """Largest difference, as a part of the largest entry."""
    cotangents: bool = True
    """Whether the product with the values directly follows the probabilities."""
    bitwise: bool = True
    """Whether XLA rounds alike where it must keep the captured values."""
    own_rule: bool = False
    """Whether the model's gradient is a rule of its own, not its formula's."""
    library: str | None = None
    """The package to import, which may also need loose promotion."""

    def context(self) -> contextlib.AbstractContextManager:
        """Loose promotion and no warnings for libraries; the strict rules else."""
        return loose() if self.library else contextlib.nullcontext()

    @functools.cached_property
    def built(self) -> tuple[Callable, tuple, Callable]:
        """`(model, args, explicit)`, with `explicit` as its body was written."""
        with self.context():
            return self.build()

    @property
    def model(self) -> Callable:
        """The model under test."""
        return self.built[0]

    @property
    def args(self) -> tuple:
        """Its positional arguments."""
        return self.built[1]

    def explicit(self, epsilons, *args):
        """Output and canonical probabilities, each map plus its epsilon."""
        tap = Tap(epsilons)
        output = self.built[2](tap, *args)
        return output, tap.probabilities()


@contextlib.contextmanager
def loose():
    """The promotion rules and warnings that most libraries take for granted."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


class Tap:
    """Writes attention maps down in canonical order and adds epsilons to them."""

    def __init__(self, epsilons=None):
        self._epsilons = epsilons
        self._maps: dict[int, dict[tuple[int, ...], jax.Array]] = {}

    def __call__(self, a, axes="bhqk", *, site=None, loop=(), taken=True):
        """Returns `a` plus the epsilon of its site.

        Args:
          a: an attention map.
          axes: one letter per axis: b, c, w are batch-like (merged in this order),
            h and g heads (kv head, then group), q the query and k the key.
          site: number of the site; the next new one if not given.
          loop: iteration of the loops around the site.
          taken: whether the branch around the site is; a site not reached is zero.
        """
        site = len(self._maps) if site is None else site
        order = [[axes.index(x) for x in group if x in axes] for group in _GROUPS]
        flat = [axis for group in order for axis in group]
        shape = [math.prod(a.shape[axis] for axis in group) for group in order]
        seen = jnp.where(taken, a, jnp.zeros_like(a)).transpose(flat).reshape(shape)
        self._maps.setdefault(site, {})[loop] = seen
        if self._epsilons is None:
            return a
        epsilon = self._epsilons[site][loop].astype(a.dtype)
        epsilon = epsilon.reshape([a.shape[axis] for axis in flat])
        return a + epsilon.transpose(np.argsort(flat))

    def probabilities(self):
        """The maps of all sites, with the loops as leading axes."""
        return [_stack(self._maps[site]) for site in sorted(self._maps)]


def _stack(maps):
    if set(maps) == {()}:
        return maps[()]
    heads = sorted({loop[0] for loop in maps})
    assert heads == list(range(len(heads)))
    rest = [{k[1:]: v for k, v in maps.items() if k[0] == i} for i in heads]
    return jnp.stack([_stack(part) for part in rest])


def _accepted(options):
    """Those of the compiler options that this XLA knows."""
    known = {}
    for name, value in options.items():
        try:
            jax.jit(lambda x: x, compiler_options={name: value})(0.0)
        except jax.errors.JaxRuntimeError:
            continue
        known[name] = value
    return known


# The tests compile much and compute little: these options make XLA some eight times
# as fast at it.
_OPTIONS = _accepted(
    {
        "xla_backend_optimization_level": 0,
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_parallel_codegen_split_count": 1,
    }
)


def compiled(function) -> Callable:
    """`jax.jit` that compiles quickly and runs slowly."""
    return jax.jit(function, compiler_options=_OPTIONS)


def registry():
    """A list of cases and the decorator that appends to it."""
    cases: list[Case] = []

    def case(name=None, **expected):
        def register(build):
            cases.append(Case(name or build.__name__, build, **expected))
            return build

        return register

    return cases, case


def normal(seed, *shape, scale=1.0, dtype=jnp.float32) -> jax.Array:
    """A fixed array of random numbers."""
    values = np.random.default_rng(seed).normal(size=shape) * scale
    return jnp.asarray(values, dtype)


def weights(
    *,
    heads=HEADS,
    kv_heads=None,
    dim=DIM,
    width=WIDTH,
    seed=10,
    dtype=jnp.float32,
) -> dict[str, Any]:
    """Projections of one attention layer."""
    kv_heads = heads if kv_heads is None else kv_heads
    draw = functools.partial(normal, scale=width**-0.5, dtype=dtype)
    return {
        "q": draw(seed, width, heads, dim, scale=2 * width**-0.5),
        "k": draw(seed + 1, width, kv_heads, dim),
        "v": draw(seed + 2, width, kv_heads, dim),
        "o": draw(seed + 3, heads, dim, width),
    }


def tokens(length=LENGTH, *, batch=BATCH, width=WIDTH, seed=1, dtype=jnp.float32):
    """Activations [batch, length, width]."""
    return normal(seed, batch, length, width, dtype=dtype)


def project(x, w, source=None):
    """Query, key and value [batch, length, head, dim]."""
    source = x if source is None else source
    return (
        jnp.einsum("bte,ehd->bthd", x, w["q"]),
        jnp.einsum("bte,ehd->bthd", source, w["k"]),
        jnp.einsum("bte,ehd->bthd", source, w["v"]),
    )


def merge(mixed, w):
    """Output projection of [batch, length, head, dim]."""
    return jnp.einsum("bthd,hde->bte", mixed, w["o"])


def normalise(logits, axis=-1):
    """The softmax, by its definition."""
    shifted = jnp.exp(logits - jnp.max(logits, axis=axis, keepdims=True))
    return shifted / jnp.sum(shifted, axis=axis, keepdims=True)


def attend(tap, q, k, v, *, scale=None, bias=None, mask=None, cap=None, **place):
    """Attention by its definition, on [batch, length, head, dim]; keys are repeated.

    `bias` and `mask` (true: may attend) broadcast to [batch, head, query, key];
    `place` says which site this is, as `Tap` takes it.
    """
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    if bias is not None:
        logits = logits + jnp.broadcast_to(bias, logits.shape)
    if mask is not None:
        logits = jnp.where(jnp.broadcast_to(mask, logits.shape), logits, -1e30)
    a = tap(normalise(logits), **place)
    return jnp.einsum("bhqk,bkhd->bqhd", a, v)


def causal(length=LENGTH, source=None) -> jax.Array:
    """Boolean [1, 1, query, key]: keys not after the query."""
    source = length if source is None else source
    return jnp.tril(jnp.ones((1, 1, length, source), bool), source - length)
