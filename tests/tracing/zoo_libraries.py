"""Attention as the libraries write it: Flax, Equinox, Haiku and `jax.nn`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.tracing.cases import (
    BATCH,
    DIM,
    HEADS,
    LENGTH,
    SOURCE,
    WIDTH,
    attend,
    causal,
    normal,
    registry,
    tokens,
)

CASES, case = registry()
FEATURES = HEADS * DIM
LAYERS = 2

linen = functools.partial(case, library="flax")
nnx = functools.partial(case, library="flax")
equinox = functools.partial(case, library="equinox")
haiku = functools.partial(case, library="haiku")


def filled(shapes, scale=0.5):
    """Random parameters of the given shapes, which no initializer had to compile."""
    leaves, structure = jax.tree.flatten(shapes)
    drawn = [
        normal(100 + i, *leaf.shape, scale=scale, dtype=leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else jnp.zeros(leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, drawn)


def layer_norm(x, p, epsilon=1e-6):
    """Layer normalisation with the parameters that are there."""
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)
    return x * p["scale"] + p.get("bias", 0.0)


def flax_layer(tap, p, x, source=None, *, norm=False, after=None, **options):
    """Flax's multi-head attention, linen or NNX, from its parameters."""
    source = x if source is None else source

    def dense(name, y):
        kernel, bias = p[name]["kernel"], p[name]["bias"]
        return jnp.einsum("bte,ehd->bthd", y, kernel) + bias

    q, k, v = dense("query", x), dense("key", source), dense("value", source)
    if norm:
        q, k = layer_norm(q, p["query_ln"]), layer_norm(k, p["key_ln"])
    if after is not None:
        tap = functools.partial(_then, tap, after)
    out = attend(tap, q, k, v, **options)
    return jnp.einsum("bthd,hde->bte", out, p["out"]["kernel"]) + p["out"]["bias"]


def _then(tap, after, a, *args, **kwargs):
    return after(tap(a, *args, **kwargs))


def keep(key, rate, shape):
    """The factor that dropout multiplies by."""
    return jax.random.bernoulli(key, 1 - rate, shape) / (1 - rate)


# Flax linen.


def _linen_module(**options):
    from flax import linen as nn

    return nn.MultiHeadDotProductAttention(HEADS, qkv_features=FEATURES, **options)


def _linen_layer(call=None, explicit=flax_layer, rest=(), **options):
    call = call or (lambda module, params, *args: module.apply(params, *args))

    def build():
        module = _linen_module(**options)
        init = _linen_module(**{**options, "dropout_rate": 0.0}).init
        params = filled(jax.eval_shape(init, jax.random.key(0), tokens()))

        def wanted(tap, params, *args):
            return explicit(tap, params["params"], *args)

        model = functools.partial(call, module)
        return model, (params, tokens(), *rest), wanted

    return build


linen("linen_self_attention")(_linen_layer())


@linen()
def linen_cross_attention():
    def call(module, params, x, source):
        return module.apply(params, x, source)

    return _linen_layer(call, rest=(tokens(SOURCE, seed=2),))()


@linen()
def linen_mask():
    def call(module, params, x, mask):
        return module.apply(params, x, mask=mask)

    def explicit(tap, p, x, mask):
        return flax_layer(tap, p, x, mask=mask)

    return _linen_layer(call, explicit, (causal(),))()


@linen()
def linen_made_masks():
    def call(module, params, x, ids):
        from flax import linen as nn

        mask = nn.combine_masks(nn.make_attention_mask(ids > 0, ids > 0))
        mask = nn.combine_masks(mask, nn.make_causal_mask(ids))
        return module.apply(params, x, mask=mask) * (ids > 0)[..., None]

    def explicit(tap, p, x, ids):
        mask = causal() & (ids > 0)[:, None, None] & (ids > 0)[:, None, :, None]
        return flax_layer(tap, p, x, mask=mask) * (ids > 0)[..., None]

    ids = jnp.array([[3, 1, 4, 1, 5], [2, 7, 1, 0, 0]])
    return _linen_layer(call, explicit, (ids,))()


linen("linen_query_key_norm")(
    _linen_layer(explicit=functools.partial(flax_layer, norm=True), normalize_qk=True)
)


def _linen_dropout(broadcast):
    def call(module, params, x, key):
        return module.apply(params, x, deterministic=False, dropout_rng=key)

    def explicit(tap, p, x, key):
        shape = (1, 1) if broadcast else (BATCH, HEADS)
        drop = keep(key, 0.3, (*shape, LENGTH, LENGTH))
        return flax_layer(tap, p, x, after=lambda a: a * drop)

    return _linen_layer(
        call,
        explicit,
        (jax.random.key(3),),
        dropout_rate=0.3,
        broadcast_dropout=broadcast,
    )()


linen("linen_dropout", cotangents=False)(lambda: _linen_dropout(False))
linen("linen_dropout_broadcast", cotangents=False)(lambda: _linen_dropout(True))


@linen()
def linen_dropout_switched_off():
    return _linen_layer(
        lambda module, params, x: module.apply(params, x, deterministic=True),
        dropout_rate=0.3,
    )()


_BF16 = dict(tolerance=3e-2, bitwise=False)
linen("linen_bf16", **_BF16)(_linen_layer(dtype=jnp.bfloat16))
linen("linen_bf16_float32_softmax", **_BF16)(
    _linen_layer(dtype=jnp.bfloat16, force_fp32_for_softmax=True)
)


@linen(cotangents=False)
def linen_sown_weights():
    """The library returns its own probabilities, to compare with."""

    def call(module, params, x):
        return module.apply(params, x, sow_weights=True, mutable="intermediates")

    def explicit(tap, p, x):
        # The sown probabilities are those that perturbation changes.
        seen = []
        out = flax_layer(tap, p, x, after=lambda a: seen.append(a) or a)
        return out, {"intermediates": {"attention_weights": (seen[0],)}}

    return _linen_layer(call, explicit)()


@linen()
def linen_decode():
    """One token against the cache, which the module fills and returns."""
    module = _linen_module(decode=True)
    variables = jax.eval_shape(module.init, jax.random.key(0), tokens(SOURCE))
    variables = filled(variables)
    cache = variables["cache"] | {"cache_index": jnp.int32(3)}

    def model(params, cache, x):
        return module.apply({"params": params, "cache": cache}, x, mutable=["cache"])

    def explicit(tap, p, cache, x):
        def dense(name):
            kernel, bias = p[name]["kernel"], p[name]["bias"]
            return jnp.einsum("bte,ehd->bthd", x, kernel) + bias

        index = cache["cache_index"]
        here = (jnp.arange(SOURCE) == index)[None, :, None, None]
        k = jnp.where(here, dense("key"), cache["cached_key"])
        v = jnp.where(here, dense("value"), cache["cached_value"])
        seen = (jnp.arange(SOURCE) <= index)[None, None, None]
        out = attend(tap, dense("query"), k, v, mask=seen)
        out = jnp.einsum("bthd,hde->bte", out, p["out"]["kernel"]) + p["out"]["bias"]
        cache = dict(cached_key=k, cached_value=v, cache_index=index + 1)
        return out, {"cache": cache}

    return model, (variables["params"], cache, tokens(1)), explicit


@linen()
def linen_function():
    from flax import linen as nn

    def model(q, k, v, bias):
        return nn.dot_product_attention(q, k, v, bias=bias)

    def explicit(tap, q, k, v, bias):
        return attend(tap, q, k, v, bias=bias)

    args = (
        normal(1, BATCH, LENGTH, HEADS, DIM),
        normal(2, BATCH, SOURCE, HEADS, DIM),
        normal(3, BATCH, SOURCE, HEADS, DIM),
        normal(4, 1, HEADS, LENGTH, SOURCE),
    )
    return model, args, explicit


def _linen_network(kind):
    """Pre-norm blocks, in a loop or scanned, as they are or recomputed."""
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            y = nn.LayerNorm(name="norm")(x)
            x = x + _linen_module(name="attention")(y)
            y = nn.gelu(nn.Dense(8, name="up")(nn.LayerNorm(name="mlp_norm")(x)))
            return x + nn.Dense(WIDTH, name="down")(y), None

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = nn.remat(Block, prevent_cse=False) if "remat" in kind else Block
            if "scan" in kind:
                x, _ = nn.scan(
                    block,
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    length=LAYERS,
                )(name="layers")(x, None)
            else:
                for i in range(LAYERS):
                    x, _ = block(name=f"layer_{i}")(x)
            return nn.Dense(3, name="head")(x[:, 0])

    module = Network()
    params = filled(jax.eval_shape(module.init, jax.random.key(0), tokens()))

    def explicit(tap, params, x):
        p = params["params"]
        for i in range(LAYERS):
            if "scan" in kind:
                block = jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"])
                place: dict[str, Any] = dict(site=0, loop=(i,))
            else:
                block, place = p[f"layer_{i}"], dict(site=i)
            y = layer_norm(x, block["norm"])
            x = x + flax_layer(tap, block["attention"], y, **place)
            y = layer_norm(x, block["mlp_norm"]) @ block["up"]["kernel"]
            y = jax.nn.gelu(y + block["up"]["bias"])
            x = x + y @ block["down"]["kernel"] + block["down"]["bias"]
        return x[:, 0] @ p["head"]["kernel"] + p["head"]["bias"]

    return module.apply, (params, tokens()), explicit


for _kind in ("loop", "remat", "scan", "scan_remat"):
    linen(
        f"linen_network_{_kind}",
        kinds=("attention",) * (1 if "scan" in _kind else LAYERS),
        tolerance=5e-5,
    )(functools.partial(_linen_network, _kind))


# Flax NNX.


def _nnx_layer(call=None, explicit=flax_layer, rest=(), **options):
    def build():
        from flax import nnx

        call_ = call or (lambda module, *args: module(*args))

        def create():
            return nnx.MultiHeadAttention(
                HEADS, WIDTH, FEATURES, decode=False, rngs=nnx.Rngs(0), **options
            )

        module = nnx.eval_shape(create)
        graph, params, other = nnx.split(module, nnx.Param, ...)
        params = filled(params)
        other = jax.tree.map(
            lambda leaf: (
                jax.random.key(0)
                if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
                else jnp.zeros(leaf.shape, leaf.dtype)
            ),
            other,
        )

        def model(params, x, *rest):
            return call_(nnx.merge(graph, params, other), x, *rest)

        def wanted(tap, params, *args):
            return explicit(tap, nnx.to_pure_dict(params), *args)

        return model, (params, tokens(), *rest), wanted

    return build


nnx("nnx_self_attention")(_nnx_layer())
nnx("nnx_cross_attention")(_nnx_layer(rest=(tokens(SOURCE, seed=2),)))
nnx("nnx_query_key_norm")(
    _nnx_layer(explicit=functools.partial(flax_layer, norm=True), normalize_qk=True)
)


@nnx()
def nnx_mask():
    return _nnx_layer(
        lambda module, x, mask: module(x, mask=mask),
        lambda tap, p, x, mask: flax_layer(tap, p, x, mask=mask),
        (jnp.broadcast_to(causal(), (BATCH, HEADS, LENGTH, LENGTH)),),
    )()


@nnx()
def nnx_causal():
    return _nnx_layer(
        lambda module, x: module(x, is_causal=True),
        functools.partial(flax_layer, mask=causal()),
    )()


@nnx(cotangents=False)
def nnx_dropout():
    from flax import nnx

    def call(module, x, key):
        return module(x, deterministic=False, rngs=nnx.Rngs(dropout=key))

    def explicit(tap, p, x, key):
        key = nnx.Rngs(dropout=key).dropout()
        drop = keep(key, 0.3, (BATCH, HEADS, LENGTH, LENGTH))
        return flax_layer(tap, p, x, after=lambda a: a * drop)

    options = dict(dropout_rate=0.3, broadcast_dropout=False)
    return _nnx_layer(call, explicit, (jax.random.key(3),), **options)()


@nnx()
def nnx_sown_weights():
    """Sowing takes the slow path, which forms the probabilities."""
    return _nnx_layer(lambda module, x: module(x, sow_weights=True))()


nnx("nnx_bf16", **_BF16)(_nnx_layer(dtype=jnp.bfloat16))


def _nnx_network(kind):
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(
                HEADS, WIDTH, FEATURES, decode=False, rngs=rngs
            )

        def __call__(self, x):
            return x + self.attention(self.norm(x))

    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return Block(rngs)

    def forward(block, x):
        return block(x)

    if "remat" in kind:
        forward = nnx.remat(forward)
    scanned = nnx.scan(
        lambda x, block: forward(block, x),
        in_axes=(nnx.Carry, 0),
        out_axes=nnx.Carry,
    )

    module = nnx.eval_shape(lambda: create(nnx.Rngs(0)))
    graph, state = nnx.split(module)
    state = filled(state)

    def model(state, x):
        return scanned(x, nnx.merge(graph, state))

    def explicit(tap, state, x):
        stacked = nnx.to_pure_dict(state)
        for i in range(LAYERS):
            p = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
            y = layer_norm(x, p["norm"])
            x = x + flax_layer(tap, p["attention"], y, site=0, loop=(i,))
        return x

    return model, (state, tokens()), explicit


nnx("nnx_scan", tolerance=5e-5)(functools.partial(_nnx_network, "scan"))
nnx("nnx_scan_remat", tolerance=5e-5)(functools.partial(_nnx_network, "scan_remat"))


@nnx(kinds=("attention",) * LAYERS)
def nnx_embedded_vision_transformer():
    """The library's own model, one image, with few and small layers."""
    from flax import nnx

    from xviz_jax.models.embedded import modeling

    config = modeling.Config(image_size=4, width=8, depth=LAYERS, heads=2, classes=3)
    create = lambda: modeling.VisionTransformer(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.eval_shape(create))
    state = filled(state)

    def model(state, image):
        return nnx.merge(graph, state)(image)

    def explicit(tap, state, image):
        p = nnx.to_pure_dict(state)
        x = nnx.merge(graph, state).embed(image)
        for i in range(LAYERS):
            block = p["blocks"][i]
            y = layer_norm(x, block["attention_norm"])
            y = y @ block["attention"]["qkv"]["kernel"]
            y = (y + block["attention"]["qkv"]["bias"]).reshape(1, -1, 3, 2, 4)
            y = attend(tap, *(y[:, :, j] for j in range(3))).reshape(-1, 8)
            y = y @ block["attention"]["out"]["kernel"]
            x = x + y + block["attention"]["out"]["bias"]
            y = layer_norm(x, block["mlp_norm"])
            y = jax.nn.gelu(y @ block["up"]["kernel"] + block["up"]["bias"])
            x = x + y @ block["down"]["kernel"] + block["down"]["bias"]
        x = layer_norm(x[0], p["norm"])
        return x @ p["head"]["kernel"] + p["head"]["bias"]

    return model, (state, normal(1, 4, 4)), explicit


# Equinox: heads by vmap inside, the batch by vmap outside.


def _equinox_layer(call, explicit, rest=(), **options):
    def build():
        import equinox as eqx

        create = lambda: eqx.nn.MultiheadAttention(
            HEADS, WIDTH, qk_size=DIM, vo_size=DIM, key=jax.random.key(0), **options
        )
        params, static = eqx.partition(
            eqx.filter_eval_shape(create),
            lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct),
        )
        params = filled(params)

        def model(params, x, *rest):
            return call(eqx.combine(params, static), x, *rest)

        return model, (params, tokens(), *rest), explicit

    return build


def _equinox_explicit(tap, p, x, source=None, after=lambda a: a, **options):
    source = x if source is None else source

    def heads(projection, y):
        return (y @ projection.weight.T).reshape(*y.shape[:2], HEADS, DIM)

    q, k = heads(p.query_proj, x), heads(p.key_proj, source)
    v = heads(p.value_proj, source)
    out = attend(functools.partial(_then, tap, after), q, k, v, **options)
    return out.reshape(*x.shape[:2], -1) @ p.output_proj.weight.T


equinox("equinox_vmap_over_the_batch")(
    _equinox_layer(lambda m, x: jax.vmap(m)(x, x, x), _equinox_explicit)
)
equinox("equinox_one_example")(
    _equinox_layer(
        lambda m, x: m(x[0], x[0], x[0]),
        lambda tap, p, x: _equinox_explicit(tap, p, x[:1])[0],
    )
)
equinox("equinox_mask")(
    _equinox_layer(
        lambda m, x, mask: jax.vmap(m, in_axes=(0, 0, 0, None))(x, x, x, mask[0, 0]),
        lambda tap, p, x, mask: _equinox_explicit(tap, p, x, mask=mask),
        (causal(),),
    )
)
equinox("equinox_cross_attention_mask_per_head")(
    _equinox_layer(
        lambda m, x, source, mask: jax.vmap(m)(x, source, source, mask),
        lambda tap, p, x, source, mask: _equinox_explicit(tap, p, x, source, mask=mask),
        (
            tokens(SOURCE, seed=2),
            jnp.asarray(
                np.random.default_rng(5).random((BATCH, HEADS, LENGTH, SOURCE)) < 0.8
            ),
        ),
    )
)


@equinox(cotangents=False)
def equinox_dropout():
    def call(module, x, keys):
        return jax.vmap(lambda y, key: module(y, y, y, key=key))(x, keys)

    def explicit(tap, p, x, keys):
        keys = jax.vmap(lambda key: jax.random.split(key, HEADS))(keys)
        draw = lambda key: keep(key, 0.3, (LENGTH, LENGTH))
        drop = jax.vmap(jax.vmap(draw))(keys)
        return _equinox_explicit(tap, p, x, after=lambda a: a * drop)

    keys = jax.random.split(jax.random.key(3), BATCH)
    return _equinox_layer(call, explicit, (keys,), dropout_p=0.3)()


@equinox()
def equinox_scan_over_layers():
    import equinox as eqx

    create = lambda key: eqx.nn.MultiheadAttention(
        HEADS, WIDTH, qk_size=DIM, vo_size=DIM, key=key
    )
    layers = eqx.filter_eval_shape(
        lambda: eqx.filter_vmap(create)(jax.random.split(jax.random.key(0), LAYERS))
    )
    params, static = eqx.partition(
        layers, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    )

    def model(params, x):
        def step(x, params):
            layer = eqx.combine(params, static)
            return x + jax.vmap(layer)(x, x, x), None

        return jax.lax.scan(step, x, params)[0]

    def explicit(tap, params, x):
        for i in range(LAYERS):
            p = jax.tree.map(lambda leaf, i=i: leaf[i], params)
            x = x + _equinox_explicit(tap, p, x, site=0, loop=(i,))
        return x

    return model, (filled(params), tokens()), explicit


# Haiku.


def _haiku(function, explicit, rest=()):
    import haiku as hk

    transformed = hk.without_apply_rng(hk.transform(function))
    init = functools.partial(transformed.init, jax.random.key(0))
    params = filled(jax.eval_shape(init, tokens(), *rest))
    return transformed.apply, (params, tokens(), *rest), explicit


def _haiku_explicit(tap, p, prefix, x, **options):
    def dense(name, y):
        linear = p[f"{prefix}/{name}"]
        return y @ linear["w"] + linear["b"]

    q, k, v = (
        dense(name, x).reshape(BATCH, LENGTH, HEADS, DIM)
        for name in ("query", "key", "value")
    )
    return dense("linear", attend(tap, q, k, v, **options).reshape(BATCH, LENGTH, -1))


def _haiku_attention():
    import haiku as hk

    return hk.MultiHeadAttention(
        HEADS, DIM, w_init=hk.initializers.Constant(0), model_size=WIDTH
    )


@haiku()
def haiku_self_attention():
    def explicit(tap, p, x):
        return _haiku_explicit(tap, p, "multi_head_attention", x)

    return _haiku(lambda x: _haiku_attention()(x, x, x), explicit)


@haiku()
def haiku_mask():
    def explicit(tap, p, x, mask):
        return _haiku_explicit(tap, p, "multi_head_attention", x, mask=mask)

    function = lambda x, mask: _haiku_attention()(x, x, x, mask)
    return _haiku(function, explicit, (causal(),))


@haiku(kinds=("attention",) * LAYERS)
def haiku_remat():
    import haiku as hk

    def function(x):
        for _ in range(LAYERS):
            attention = _haiku_attention()
            x = x + hk.remat(lambda y, attention=attention: attention(y, y, y))(x)
        return x

    def explicit(tap, p, x):
        for i in range(LAYERS):
            suffix = f"_{i}" if i else ""
            x = x + _haiku_explicit(tap, p, f"multi_head_attention{suffix}", x)
        return x

    return _haiku(function, explicit)


@haiku()
def haiku_layer_stack():
    from haiku import experimental

    def function(x):
        @experimental.layer_stack(LAYERS)
        def layer(x):
            return x + _haiku_attention()(x, x, x)

        return layer(x)

    def explicit(tap, p, x):
        (prefix,) = {name.rsplit("/", 1)[0] for name in p}
        for i in range(LAYERS):
            here = jax.tree.map(lambda leaf, i=i: leaf[i], p)
            x = x + _haiku_explicit(tap, here, prefix, x, site=0, loop=(i,))
        return x

    return _haiku(function, explicit)


# jax.nn.dot_product_attention, by XLA.


def _jax_nn(heads=HEADS, kv_heads=None, rest=(), dtype=jnp.float32, **options):
    """`options` of the call; `rest` and the explicit `bias`, `mask` by name."""
    kv_heads = heads if kv_heads is None else kv_heads
    explicit_options = {
        name.removeprefix("explicit_"): options.pop(name)
        for name in tuple(options)
        if name.startswith("explicit_")
    }
    names = tuple(name for name, _ in rest)

    def build():
        def model(q, k, v, *rest):
            named = dict(zip(names, rest, strict=True))
            return jax.nn.dot_product_attention(q, k, v, **named, **options)

        def explicit(tap, q, k, v, *rest):
            named = dict(zip(names, rest, strict=True)) | explicit_options
            named = {n: f(**named) if callable(f) else f for n, f in named.items()}
            named = {n: named[n] for n in ("bias", "mask", "scale") if n in named}
            return attend(tap, q, k, v, **named)

        draw = functools.partial(normal, dtype=dtype)
        args = (
            draw(1, BATCH, LENGTH, heads, DIM),
            draw(2, BATCH, LENGTH, kv_heads, DIM),
            draw(3, BATCH, LENGTH, kv_heads, DIM),
        )
        return model, (*args, *(array for _, array in rest)), explicit

    return build


_gap = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None]
case("jax_nn_plain")(_jax_nn())
case("jax_nn_xla")(_jax_nn(implementation="xla", scale=0.7, explicit_scale=0.7))
case("jax_nn_causal")(_jax_nn(is_causal=True, explicit_mask=causal()))
case("jax_nn_bias_and_mask")(
    _jax_nn(
        rest=(
            ("bias", normal(4, 1, HEADS, LENGTH, LENGTH)),
            ("mask", jnp.asarray(_gap[None, None] > -2)),
        )
    )
)
case("jax_nn_grouped_bias_and_mask")(
    _jax_nn(
        heads=4,
        kv_heads=2,
        rest=(
            ("bias", normal(4, BATCH, 4, LENGTH, LENGTH)),
            ("mask", jnp.asarray(_gap[None, None] > -2)),
        ),
    )
)
case("jax_nn_multi_query_window")(
    _jax_nn(
        heads=4,
        kv_heads=1,
        local_window_size=(2, 1),
        explicit_mask=jnp.asarray((_gap <= 2) & (_gap >= -1))[None, None],
    )
)
case("jax_nn_symmetric_window_causal")(
    _jax_nn(
        local_window_size=1,
        is_causal=True,
        explicit_mask=jnp.asarray((_gap <= 1) & (_gap >= 0))[None, None],
    )
)
case("jax_nn_bf16", library="jax", **_BF16)(_jax_nn(dtype=jnp.bfloat16))
case("jax_nn_bf16_grouped", library="jax", **_BF16)(
    _jax_nn(heads=4, kv_heads=2, dtype=jnp.bfloat16)
)


@case()
def jax_nn_key_lengths():
    def model(q, k, v, lengths):
        return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)

    def explicit(tap, q, k, v, lengths):
        mask = jnp.arange(SOURCE)[None] < lengths[:, None]
        return attend(tap, q, k, v, mask=mask[:, None, None])

    args = (
        normal(1, BATCH, LENGTH, HEADS, DIM),
        normal(2, BATCH, SOURCE, HEADS, DIM),
        normal(3, BATCH, SOURCE, HEADS, DIM),
        jnp.array([SOURCE, 4]),
    )
    return model, args, explicit


@case()
def jax_nn_query_lengths():
    """Rows beyond the length are zeroed after the product."""

    def model(q, k, v, lengths):
        return jax.nn.dot_product_attention(q, k, v, query_seq_lengths=lengths)

    def explicit(tap, q, k, v, lengths):
        mask = (jnp.arange(LENGTH)[None] < lengths[:, None])[:, None, :, None]
        out = attend(tap, q, k, v, mask=mask)
        return out * mask.swapaxes(1, 2).astype(out.dtype)

    args = (
        normal(1, BATCH, LENGTH, HEADS, DIM),
        normal(2, BATCH, SOURCE, HEADS, DIM),
        normal(3, BATCH, SOURCE, HEADS, DIM),
        jnp.array([LENGTH, 4]),
    )
    return model, args, explicit


@case()
def jax_nn_one_example():
    def model(x, w):
        q, k, v = (jnp.einsum("te,ehd->thd", x, w[name]) for name in "qkv")
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    def explicit(tap, x, w):
        q, k, v = (jnp.einsum("te,ehd->thd", x, w[name])[None] for name in "qkv")
        return attend(tap, q, k, v, mask=causal())[0]

    w = {name: normal(i, WIDTH, HEADS, DIM) for i, name in enumerate("qkv")}
    return model, (normal(4, LENGTH, WIDTH), w), explicit


@case()
def jax_nn_with_residual():
    def model(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, return_residual=True)

    def explicit(tap, q, k, v):
        logits = jnp.einsum("bqhd,bkhd->bqhk", q, k) * DIM**-0.5
        total = jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
        return attend(tap, q, k, v), jax.lax.stop_gradient(total)

    return model, _jax_nn()()[1], explicit
