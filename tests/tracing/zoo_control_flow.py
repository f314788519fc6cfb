"""Attention inside calls, loops, branches, maps and custom derivatives."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tests.tracing.cases import (
    BATCH,
    DIM,
    HEADS,
    LENGTH,
    WIDTH,
    attend,
    causal,
    merge,
    normal,
    normalise,
    project,
    registry,
    tokens,
    weights,
)

CASES, case = registry()
SCALE = DIM**-0.5
LAYERS = 3


def attention(x, w):
    """The layer that all models below are made of."""
    q, k, v = project(x, w)
    a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
    return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)


def block(x, w):
    return x + attention(x, w)


def stacked(layers=LAYERS):
    """Weights with a leading layer axis."""
    each = [weights(seed=10 * (i + 1)) for i in range(layers)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def layer(w, *index):
    """The weights of one layer."""
    return jax.tree.map(lambda leaf: leaf[index], w)


def explicit_attention(tap, x, w, **options):
    return merge(attend(tap, *project(x, w), **options), w)


def explicit_layers(tap, x, w, order=range(LAYERS)):
    for i in order:
        x = x + explicit_attention(tap, x, layer(w, i), site=0, loop=(i,))
    return x


# Calls.


def _called(name, function, **options):
    """A model that computes one layer and nothing else."""
    case(name, **options)(lambda: (function, (tokens(), weights()), explicit_attention))


def _with_softmax(softmax):
    def model(x, w):
        q, k, v = project(x, w)
        a = softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)

    return model


def _probabilities(x, w):
    q, k, v = project(x, w)
    a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
    return a, v


def _jit_returns_probabilities(x, w):
    a, v = jax.jit(_probabilities)(x, w)
    return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)


_combine = jax.jit(lambda a, v: jnp.einsum("bhqk,bkhd->bqhd", a, v))
_scores = jax.jit(lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)


def _jit_everywhere(x, w):
    q, k, v = jax.jit(project)(x, w)
    return merge(_combine(jax.jit(jax.nn.softmax)(_scores(q, k)), v), w)


def _barrier(x, w):
    q, k, v = lax.optimization_barrier(project(x, w))
    s = lax.optimization_barrier(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
    a, v = lax.optimization_barrier((jax.nn.softmax(s), v))
    return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)


def _constrained(x, w):
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    spec = jax.sharding.PartitionSpec()
    put = lambda y: lax.with_sharding_constraint(y, jax.NamedSharding(mesh, spec))
    q, k, v = (put(y) for y in project(x, w))
    a = put(jax.nn.softmax(put(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)))
    return merge(put(jnp.einsum("bhqk,bkhd->bqhd", a, v)), w)


def _scoped(x, w):
    with jax.named_scope("decoder"), jax.named_scope("layer_0"):
        return jax.named_call(attention, name="attention")(x, w)


def _tagged(x, w):
    q, k, v = (checkpoint_name(y, n) for y, n in zip(project(x, w), "qkv", strict=True))
    s = checkpoint_name(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE, "scores")
    a = checkpoint_name(jax.nn.softmax(s), "probabilities")
    out = jnp.einsum("bhqk,bkhd->bqhd", a, v)
    return merge(checkpoint_name(out, "context"), w)


_called("jit", jax.jit(attention))
_called("jit_nested", jax.jit(lambda x, w: jax.jit(jax.jit(attention))(x, w)))
_called("jit_inlined", jax.jit(attention, inline=True))
_called("jit_returns_probabilities", _jit_returns_probabilities)
_called("jit_everywhere", _jit_everywhere)
_called("optimization_barrier", _barrier)
_called("sharding_constraint", _constrained)
_called("named_scopes", _scoped)
_called("checkpoint_names", _tagged)


@case(kinds=("attention",) * LAYERS)
def jit_shared_by_layers():
    shared = jax.jit(block)

    def model(x, w):
        for i in range(LAYERS):
            x = shared(x, layer(w, i))
        return x

    def explicit(tap, x, w):
        for i in range(LAYERS):
            x = x + explicit_attention(tap, x, layer(w, i))
        return x

    return model, (tokens(), stacked()), explicit


# Recomputation.

_POLICIES = {
    "everything_saveable": jax.checkpoint_policies.everything_saveable,
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": (
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "save_only_these_names": jax.checkpoint_policies.save_only_these_names(
        "context", "scores"
    ),
    "save_anything_except_these_names": (
        jax.checkpoint_policies.save_anything_except_these_names("probabilities")
    ),
}
for _name, _policy in _POLICIES.items():
    _called(f"remat_{_name}", jax.checkpoint(_tagged, policy=_policy))
_called("remat", jax.checkpoint(attention))
_called("remat_without_cse_prevention", jax.checkpoint(attention, prevent_cse=False))
_called("remat_of_the_softmax", _with_softmax(jax.checkpoint(jax.nn.softmax)))
_called("remat_nested", jax.checkpoint(jax.jit(jax.checkpoint(attention))))


# Custom derivatives.


@jax.custom_jvp
def _custom_softmax(s):
    return normalise(s)


@_custom_softmax.defjvp
def _(primals, tangents):
    a, t = _custom_softmax(*primals), tangents[0]
    return a, a * (t - jnp.sum(a * t, axis=-1, keepdims=True))


@jax.custom_vjp
def _custom_vjp_softmax(s):
    return normalise(s)


_custom_vjp_softmax.defvjp(
    lambda s: (a := normalise(s), a),
    lambda a, g: (a * (g - jnp.sum(a * g, axis=-1, keepdims=True)),),
)


@jax.custom_jvp
def _custom_attention(x, w):
    return attention(x, w)


@_custom_attention.defjvp
def _(primals, tangents):
    return jax.jvp(attention, primals, tangents)


@jax.custom_vjp
def _flash_like(x, w):
    return attention(x, w)


_flash_like.defvjp(
    lambda x, w: (attention(x, w), (x, w)),
    lambda residual, g: jax.vjp(attention, *residual)[1](g),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _doubled(x, w, factor):
    """Its rule is not its derivative; gradients through capture must keep the rule."""
    return attention(x, w)


_doubled.defvjp(
    lambda x, w, factor: (attention(x, w), (x, w)),
    lambda factor, residual, g: jax.vjp(attention, *residual)[1](factor * g),
)

_called("custom_jvp_softmax", _with_softmax(_custom_softmax))
_called("custom_vjp_softmax", _with_softmax(_custom_vjp_softmax))
_called("custom_jvp_attention", _custom_attention)
_called("custom_vjp_attention", _flash_like)
_called("custom_vjp_in_jit_in_remat", jax.checkpoint(jax.jit(_flash_like)))
_called(
    "custom_vjp_with_a_rule_of_its_own",
    lambda x, w: _doubled(x, w, 2.0),
    own_rule=True,
)


# Loops over layers.


def _looped(name, model, explicit=explicit_layers, **options):
    case(name, tolerance=5e-5, **options)(
        lambda: (model, (tokens(), stacked()), explicit)
    )


def _scan(step=block, **options):
    def model(x, w):
        return lax.scan(lambda x, w: (step(x, w), None), x, w, **options)[0]

    return model


_looped("scan", _scan())
_looped("scan_unrolled_twice", _scan(unroll=2))
_looped("scan_unrolled_entirely", _scan(unroll=True))
_looped(
    "scan_reversed",
    _scan(reverse=True),
    functools.partial(explicit_layers, order=range(LAYERS)[::-1]),
)
_looped("scan_of_remat", _scan(jax.checkpoint(block, prevent_cse=False)))
_looped(
    "scan_of_remat_with_policy",
    _scan(
        jax.checkpoint(
            lambda x, w: x + _tagged(x, w),
            prevent_cse=False,
            policy=jax.checkpoint_policies.save_only_these_names("context"),
        )
    ),
)
_looped("scan_of_jit_of_custom_vjp", _scan(jax.jit(lambda x, w: x + _flash_like(x, w))))
_looped("scan_in_remat", jax.checkpoint(_scan()))
_looped("scan_in_jit_in_remat", jax.checkpoint(jax.jit(_scan())))
_looped(
    "scan_in_vmap",
    lambda x, w: jax.vmap(
        lambda x: _scan()(x[None], w)[0],
    )(x),
)


@case(tolerance=5e-5)
def scan_with_a_key_in_the_carry():
    """An integer counter and a random key travel along; outputs are collected."""

    def model(x, w, key):
        def step(carry, w):
            x, i, key = carry
            key, now = jax.random.split(key)
            x = block(x, w) + 0.1 * jax.random.normal(now, x.shape)
            return (x, i + 1, key), (x.mean(), i)

        (x, i, _), ys = lax.scan(step, (x, jnp.int32(0), key), w)
        return x, i, ys

    def explicit(tap, x, w, key):
        means = []
        for i in range(LAYERS):
            key, now = jax.random.split(key)
            x = x + explicit_attention(tap, x, layer(w, i), site=0, loop=(i,))
            x += 0.1 * jax.random.normal(now, x.shape)
            means.append(x.mean())
        return x, jnp.int32(LAYERS), (jnp.stack(means), jnp.arange(LAYERS))

    return model, (tokens(), stacked(), jax.random.key(2)), explicit


@case(kinds=("attention", "attention"), tolerance=5e-5)
def scan_with_two_sites():
    def model(x, w, v):
        step = lambda x, w: (block(block(x, w[0]), w[1]), None)
        return lax.scan(step, x, (w, v))[0]

    def explicit(tap, x, w, v):
        for i in range(LAYERS):
            for site, u in enumerate((w, v)):
                place = dict(site=site, loop=(i,))
                x = x + explicit_attention(tap, x, layer(u, i), **place)
        return x

    other = jax.tree.map(lambda leaf: leaf[::-1], stacked())
    return model, (tokens(), stacked(), other), explicit


@case(tolerance=5e-5)
def scan_nested():
    """Two stages of three layers: two loop axes."""

    def model(x, w):
        return lax.scan(lambda x, w: (_scan()(x, w), None), x, w)[0]

    def explicit(tap, x, w):
        for i in range(2):
            for j in range(LAYERS):
                place = dict(site=0, loop=(i, j))
                x = x + explicit_attention(tap, x, layer(w, i, j), **place)
        return x

    w = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]) * 0.8, stacked())
    return model, (tokens(), w), explicit


@case(tolerance=5e-5)
def scan_with_shared_weights():
    """The same layer three times, its weights constants of the loop."""

    def model(x, w):
        return lax.scan(lambda x, _: (block(x, w), None), x, None, length=LAYERS)[0]

    def explicit(tap, x, w):
        for i in range(LAYERS):
            x = x + explicit_attention(tap, x, w, site=0, loop=(i,))
        return x

    return model, (tokens(), weights()), explicit


@case(tolerance=5e-5)
def scan_over_decoded_tokens():
    """One query per step against a cache that the carry fills."""

    def model(x, w):
        def step(cache, inputs):
            keys, values = cache
            i, token = inputs
            q, k, v = project(token[:, None], w)
            keys = lax.dynamic_update_slice_in_dim(keys, k, i, axis=1)
            values = lax.dynamic_update_slice_in_dim(values, v, i, axis=1)
            s = jnp.einsum("bqhd,bkhd->bhqk", q, keys) * SCALE
            s = jnp.where(jnp.broadcast_to(jnp.arange(LENGTH) <= i, s.shape), s, -1e30)
            out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), values)
            return (keys, values), merge(out, w)[:, 0]

        empty = jnp.zeros((BATCH, LENGTH, HEADS, DIM))
        inputs = (jnp.arange(LENGTH), x.swapaxes(0, 1))
        return lax.scan(step, (empty, empty), inputs)[1]

    def explicit(tap, x, w):
        q, k, v = project(x, w)
        rows = []
        for i in range(LENGTH):
            place = dict(site=0, loop=(i,))
            seen = jnp.arange(LENGTH) <= i
            # The rest of the cache is still empty, also for an epsilon that finds it.
            k_i, v_i = (jnp.where(seen[None, :, None, None], y, 0.0) for y in (k, v))
            mask = seen[None, None, None]
            out = attend(tap, q[:, i : i + 1], k_i, v_i, mask=mask, **place)
            rows.append(merge(out, w)[:, 0])
        return jnp.stack(rows)

    return model, (tokens(), weights()), explicit


def _fori(x, w):
    def body(i, x):
        return block(x, jax.tree.map(lambda leaf: leaf[i], w))

    return lax.fori_loop(0, LAYERS, body, x)


_looped("fori_loop", _fori)
_looped(
    "fori_loop_unrolled",
    lambda x, w: lax.fori_loop(
        0,
        LAYERS,
        lambda i, x: block(x, jax.tree.map(lambda leaf: leaf[i], w)),
        x,
        unroll=True,
    ),
)


@case(kinds=("inverted",), tolerance=5e-5)
def slot_attention_iterated():
    """The slots ask again, three times."""

    def model(slots, x, w):
        w = {n: w[n][:, 0] for n in "qkv"} | {"o": w["o"][0]}
        k, v = (jnp.einsum("bke,ed->bkd", x, w[n]) for n in "kv")

        def body(_, slots):
            q = jnp.einsum("bqe,ed->bqd", slots, w["q"])
            a = jax.nn.softmax(jnp.einsum("bkd,bqd->bkq", k, q) * SCALE) + 1e-8
            a = a / a.sum(axis=1, keepdims=True)
            update = jnp.einsum("bkq,bkd->bqd", a, v)
            return slots + jnp.einsum("bqd,de->bqe", update, w["o"])

        return lax.fori_loop(0, 3, body, slots)

    def explicit(tap, slots, x, w):
        w = {n: w[n][:, :1] for n in "qkv"} | {"o": w["o"][:1]}
        for i in range(3):
            q, k, v = project(slots, w, x)
            a = normalise(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE, axis=2)
            a = tap(a, site=0, loop=(i,)) + 1e-8
            a = a / a.sum(axis=3, keepdims=True)
            slots = slots + merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)
        return slots

    return model, (tokens(3, seed=2), tokens(), weights()), explicit


@case(tolerance=1e-4)
def language_model():
    """Token ids to logits: rotary grouped causal layers, scanned under remat."""

    def norm(x, gain):
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
        return x * (1 + gain[None, None])

    def rotate(x):
        angle = jnp.arange(1.0 * LENGTH)[:, None] * 0.1 ** jnp.arange(2.0)[None]
        sin, cos = jnp.sin(angle)[None, :, None], jnp.cos(angle)[None, :, None]
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate(
            [first * cos - second * sin, second * cos + first * sin], axis=-1
        )

    def model(params, ids):
        x = jnp.take(params["table"], ids, axis=0) * WIDTH**0.5

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def step(x, p):
            q, k, v = project(norm(x, p["attention_norm"]), p)
            q, k = rotate(q) * SCALE, rotate(k)
            q = q.reshape(BATCH, LENGTH, 2, 2, DIM)
            s = jnp.einsum("bqhgd,bkhd->bhgqk", q, k)
            s = jnp.where(jnp.broadcast_to(causal()[None], s.shape), s, -2.3e38)
            a = jax.nn.softmax(s).astype(x.dtype)
            out = jnp.einsum("bhgqk,bkhd->bqhgd", a, v)
            x = x + merge(out.reshape(BATCH, LENGTH, 4, DIM), p)
            y = norm(x, p["mlp_norm"])
            gate, up = jnp.split(jnp.einsum("bte,ef->btf", y, p["up"]), 2, axis=-1)
            down = jnp.einsum("btf,fe->bte", jax.nn.silu(gate) * up, p["down"])
            return x + down, None

        x, _ = lax.scan(step, x, params["layers"])
        logits = jnp.einsum("bte,ve->btv", norm(x, params["norm"]), params["table"])
        return jax.nn.log_softmax(logits)

    def explicit(tap, params, ids):
        x = params["table"][ids] * WIDTH**0.5
        for i in range(LAYERS):
            p = layer(params["layers"], i)
            q, k, v = project(norm(x, p["attention_norm"]), p)
            place = dict(site=0, loop=(i,))
            out = attend(tap, rotate(q), rotate(k), v, mask=causal(), **place)
            x = x + merge(out, p)
            y = jnp.einsum("bte,ef->btf", norm(x, p["mlp_norm"]), p["up"])
            gate, up = y[..., :8], y[..., 8:]
            x = x + jnp.einsum(
                "btf,fe->bte", gate / (1 + jnp.exp(-gate)) * up, p["down"]
            )
        x = norm(x, params["norm"])
        return jnp.log(normalise(jnp.einsum("bte,ve->btv", x, params["table"])))

    each = [weights(heads=4, kv_heads=2, seed=10 * i) for i in range(LAYERS)]
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    layers |= {
        "attention_norm": normal(3, LAYERS, WIDTH, scale=0.1),
        "mlp_norm": normal(4, LAYERS, WIDTH, scale=0.1),
        "up": normal(5, LAYERS, WIDTH, 16, scale=0.4),
        "down": normal(6, LAYERS, 8, WIDTH, scale=0.4),
    }
    params = {
        "layers": layers,
        "norm": normal(7, WIDTH, scale=0.1),
        "table": normal(8, 9, WIDTH),
    }
    ids = jnp.array([[3, 1, 4, 1, 5], [0, 2, 6, 8, 7]])
    return model, (params, ids), explicit


# Branches: a branch not taken has zeros for its values.


def _cond(taken):
    def model(predicate, x, w):
        return lax.cond(predicate, attention, lambda x, w: 2.0 * x, x, w)

    def explicit(tap, predicate, x, w):
        out = explicit_attention(tap, x, w, taken=predicate)
        return jnp.where(predicate, out, 2.0 * x)

    return model, (jnp.array(taken), tokens(), weights()), explicit


case("cond_taken")(lambda: _cond(True))


@case(kinds=("attention", "attention"))
def cond_both_branches():
    def plain(x, w):
        return attention(x, w)

    def capped(x, w):
        q, k, v = project(x, w)
        s = jnp.tanh(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
        s = jnp.where(jnp.broadcast_to(causal(), s.shape), s, -1e30)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v), w)

    def model(predicate, x, w):
        return lax.cond(predicate, plain, capped, x, w)

    def explicit(tap, predicate, x, w):
        options = dict(cap=1.0, mask=causal())
        # Branches are traced in the order of their index: false, then true.
        no = explicit_attention(tap, x, w, taken=~predicate, **options)
        yes = explicit_attention(tap, x, w, taken=predicate)
        return jnp.where(predicate, yes, no)

    return model, (jnp.array(False), tokens(), weights()), explicit


@case(kinds=("attention", "attention"))
def switch_among_three():
    def model(index, x, w):
        branches = (lambda x, w: x, block, lambda x, w: x - attention(x, w))
        return lax.switch(index, branches, x, w)

    def explicit(tap, index, x, w):
        add = explicit_attention(tap, x, w, taken=index == 1)
        subtract = explicit_attention(tap, x, w, taken=index == 2)
        return jnp.stack([x, x + add, x - subtract])[index]

    return model, (jnp.int32(2), tokens(), weights()), explicit


@case(kinds=("attention",), tolerance=5e-5)
def cond_in_scan():
    """Every other layer attends; the others leave zeros in the stack."""

    def model(x, w):
        def step(carry, w):
            x, i = carry
            x = lax.cond(i % 2 == 0, block, lambda x, w: jnp.sin(x), x, w)
            return (x, i + 1), None

        return lax.scan(step, (x, jnp.int32(0)), w)[0][0]

    def explicit(tap, x, w):
        for i in range(LAYERS):
            place = dict(site=0, loop=(i,), taken=i % 2 == 0)
            y = x + explicit_attention(tap, x, layer(w, i), **place)
            x = y if i % 2 == 0 else jnp.sin(x)
        return x

    return model, (tokens(), stacked()), explicit


@case(tolerance=5e-5)
def scan_in_cond():
    def model(predicate, x, w):
        return lax.cond(predicate, _scan(), lambda x, w: x, x, w)

    def explicit(tap, predicate, x, w):
        for i in range(LAYERS):
            place = dict(site=0, loop=(i,), taken=predicate)
            x = x + explicit_attention(tap, x, layer(w, i), **place)
        return x

    return model, (jnp.array(True), tokens(), stacked()), explicit


@case()
def cond_under_vmap():
    """A batched predicate turns the branch into a selection: both are computed."""

    def model(predicate, x, w):
        one = lambda p, x: lax.cond(
            p, lambda x: attention(x[None], w)[0], lambda x: 2.0 * x, x
        )
        return jax.vmap(one)(predicate, x)

    def explicit(tap, predicate, x, w):
        out = explicit_attention(tap, x, w)
        return jnp.where(predicate[:, None, None], out, 2.0 * x)

    return model, (jnp.array([True, False]), tokens(), weights()), explicit


# Maps.


@case()
def map_over_query_chunks():
    """Queries in chunks of two: the chunk is a loop axis."""

    def model(x, w):
        q, k, v = project(x, w)
        chunks = jnp.moveaxis(q.reshape(BATCH, 3, 2, HEADS, DIM), 1, 0)

        def chunk(q):
            a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
            return jnp.einsum("bhqk,bkhd->bqhd", a, v)

        out = jnp.moveaxis(lax.map(chunk, chunks), 0, 1)
        return merge(out.reshape(BATCH, 6, HEADS, DIM), w)

    def explicit(tap, x, w):
        q, k, v = project(x, w)
        rows = [
            attend(tap, q[:, 2 * i : 2 * i + 2], k, v, site=0, loop=(i,))
            for i in range(3)
        ]
        return merge(jnp.concatenate(rows, axis=1), w)

    return model, (tokens(6), weights()), explicit


@case()
def map_over_query_chunks_recomputed():
    """In the manner of memory-efficient attention: causal chunks under remat."""

    def model(x, w):
        q, k, v = project(x, w)

        @jax.checkpoint
        def chunk(start):
            part = lax.dynamic_slice_in_dim(q, start, 2, axis=1)
            s = jnp.einsum("bqhd,bkhd->bhqk", part, k) * SCALE
            rows = start + jnp.arange(2)
            seen = rows[:, None] >= jnp.arange(6)[None]
            s = jnp.where(jnp.broadcast_to(seen[None, None], s.shape), s, -1e30)
            return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v)

        out = jnp.moveaxis(lax.map(chunk, jnp.arange(0, 6, 2)), 0, 1)
        return merge(out.reshape(BATCH, 6, HEADS, DIM), w)

    def explicit(tap, x, w):
        q, k, v = project(x, w)
        rows = []
        for i in range(3):
            part = slice(2 * i, 2 * i + 2)
            place = dict(mask=causal(6)[:, :, part], site=0, loop=(i,))
            rows.append(attend(tap, q[:, part], k, v, **place))
        return merge(jnp.concatenate(rows, axis=1), w)

    return model, (tokens(6), weights()), explicit


@case(kinds=("attention",) * 3)
def python_loop_over_query_chunks():
    def model(x, w):
        q, k, v = project(x, w)
        rows = []
        for part in jnp.split(q, 3, axis=1):
            a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", part, k) * SCALE)
            rows.append(jnp.einsum("bhqk,bkhd->bqhd", a, v))
        return merge(jnp.concatenate(rows, axis=1), w)

    def explicit(tap, x, w):
        q, k, v = project(x, w)
        rows = [attend(tap, q[:, 2 * i : 2 * i + 2], k, v) for i in range(3)]
        return merge(jnp.concatenate(rows, axis=1), w)

    return model, (tokens(6), weights()), explicit


@case()
def map_over_heads():
    def model(x, w):
        def head(w):
            q, k, v = (jnp.einsum("bte,ed->btd", x, w[n]) for n in "qkv")
            return jax.nn.softmax(q @ k.mT * SCALE) @ v

        w_heads = {n: jnp.moveaxis(w[n], 1, 0) for n in "qkv"}
        return jnp.einsum("hbtd,hde->bte", lax.map(head, w_heads), w["o"])

    def explicit(tap, x, w):
        q, k, v = project(x, w)
        out = []
        for h in range(HEADS):
            part = slice(h, h + 1)
            y = (q[:, :, part], k[:, :, part], v[:, :, part])
            out.append(attend(tap, *y, site=0, loop=(h,)))
        return merge(jnp.concatenate(out, axis=2), w)

    return model, (tokens(), weights()), explicit


@case()
def map_in_batches():
    """`lax.map` with a batch size: a loop axis outside, a batch axis inside."""

    def model(x, w):
        return lax.map(lambda x: attention(x[None], w)[0], x, batch_size=2)

    def explicit(tap, x, w):
        out = [
            explicit_attention(tap, x[2 * i : 2 * i + 2], w, site=0, loop=(i,))
            for i in range(2)
        ]
        return jnp.concatenate(out)

    return model, (tokens(batch=4), weights()), explicit


def _one_head(x, wq, wk, wv):
    q, k, v = x @ wq, x @ wk, x @ wv
    return jax.nn.softmax(q @ k.T * SCALE) @ v


@case()
def vmap_over_heads():
    def model(x, w):
        heads = jax.vmap(_one_head, in_axes=(None, 1, 1, 1), out_axes=1)
        return jnp.einsum("thd,hde->te", heads(x, w["q"], w["k"], w["v"]), w["o"])

    def explicit(tap, x, w):
        return explicit_attention(tap, x[None], w)[0]

    return model, (normal(1, LENGTH, WIDTH), weights()), explicit


def _vmapped(order):
    def model(x, w):
        heads = functools.partial(jax.vmap, in_axes=(None, 1, 1, 1), out_axes=1)
        batch = functools.partial(jax.vmap, in_axes=(0, None, None, None))
        both = batch(heads(_one_head))
        if order == "heads_outside":
            both = jax.vmap(batch(_one_head), in_axes=(None, 1, 1, 1), out_axes=2)
        return merge(both(x, w["q"], w["k"], w["v"]), w)

    return model


_called("vmap_over_batch", lambda x, w: jax.vmap(lambda x: attention(x[None], w)[0])(x))
_called("vmap_over_heads_and_batch", _vmapped("heads_inside"))
_called("vmap_over_batch_and_heads", _vmapped("heads_outside"))


@case()
def vmap_over_the_last_axis():
    def model(x, w):
        one = lambda x: attention(x[None], w)[0]
        return jax.vmap(one, in_axes=2, out_axes=1)(x)

    def explicit(tap, x, w):
        return explicit_attention(tap, jnp.moveaxis(x, 2, 0), w).swapaxes(0, 1)

    return model, (normal(1, LENGTH, WIDTH, BATCH), weights()), explicit


@case()
def vmap_over_groups():
    """Each kv head with its group of queries, by two maps over raw arguments."""

    def model(x, w):
        q, k, v = project(x, w)
        q = q.reshape(BATCH, LENGTH, 2, 2, DIM)
        one = lambda q, k, v: jax.nn.softmax(q @ k.T * SCALE) @ v
        group = jax.vmap(one, in_axes=(1, None, None), out_axes=1)
        heads = jax.vmap(group, in_axes=(1, 1, 1), out_axes=1)
        return merge(jax.vmap(heads)(q, k, v).reshape(BATCH, LENGTH, 4, DIM), w)

    args = (tokens(), weights(heads=4, kv_heads=2))
    return model, args, explicit_attention


@case()
def vmap_over_an_ensemble():
    """An axis that comes from the weights is head-like, here outside the heads."""

    def model(x, w):
        return jax.vmap(attention, in_axes=(None, 0))(x, w).mean(0)

    def explicit(tap, x, w):
        each = [project(x, layer(w, i)) for i in range(LAYERS)]
        q, k, v = (jnp.concatenate(parts, axis=2) for parts in zip(*each, strict=True))
        out = jnp.split(attend(tap, q, k, v), LAYERS, axis=2)
        return sum(merge(y, layer(w, i)) for i, y in enumerate(out)) / LAYERS

    return model, (tokens(), stacked()), explicit
