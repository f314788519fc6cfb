"""Sites that are not attention: embeddings, named values, block inputs."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tests.tracing.cases import compiled, loose, normal, tokens, weights
from xviz_jax import tracing

VOCABULARY, WIDTH, LENGTH, BATCH = 7, 6, 5, 2
IDS = jnp.array([[3, 1, 4, 1, 5], [0, 2, 6, 5, 3]], jnp.int32)
TABLE = normal(1, VOCABULARY, WIDTH)
POSITIONS = normal(2, LENGTH + 2, WIDTH)


def of_kind(kind):
    return lambda site: site.kind == kind


def sites_of(kind, model, *args):
    return [site for site in tracing.sites(model, *args) if site.kind == kind]


def head(x):
    """A readout in which every entry of `x` matters, none linearly."""
    return jnp.tanh(x).mean(1) @ normal(9, WIDTH, 3)


def take(table, ids, factor=1.0):
    return head(table[ids] * factor)


def by_one_hot(table, ids):
    return head(jax.nn.one_hot(ids, VOCABULARY) @ table)


def by_comparison(table, ids):
    hot = (ids[..., None] == jnp.arange(VOCABULARY)[None, None]).astype(table.dtype)
    return head(jnp.einsum("btv,ve->bte", hot, table))


def with_positions(table, ids, positions):
    return head(table[ids] + positions[None, :LENGTH])


def with_taken_positions(table, ids, positions):
    places = jnp.take(positions, jnp.arange(LENGTH), axis=0)
    return head(table[ids] + places[None])


def tied(table, ids):
    x = jnp.tanh(table[ids])
    return jnp.einsum("bte,ve->btv", x, table)


def padded(table, ids):
    """The same ids make a mask; that is no second embedding."""
    live = (ids > 0).astype(table.dtype)[..., None]
    return head(table[ids] * live)


# name: (model, rest, explicit), the latter with the looked-up rows as its argument.
MODELS = {
    "index": (take, (), head),
    "take": (lambda t, i: head(jnp.take(t, i, axis=0)), (), head),
    "take_clipped": (lambda t, i: head(jnp.take(t, i, axis=0, mode="clip")), (), head),
    "take_filled": (lambda t, i: head(jnp.take(t, i, axis=0, mode="fill")), (), head),
    "one_hot": (by_one_hot, (), head),
    "comparison": (by_comparison, (), head),
    "jit": (jax.jit(take), (), head),
    "remat": (jax.checkpoint(take), (), head),
    "vmap": (lambda t, i: head(jax.vmap(lambda i: t[i])(i)), (), head),
    "cast": (
        lambda t, i: head(t.astype(jnp.bfloat16)[i].astype(jnp.float32)),
        (),
        head,
    ),
    "positions_sliced": (
        with_positions,
        (POSITIONS,),
        lambda x, p: head(x + p[None, :LENGTH]),
    ),
    "positions_taken": (
        with_taken_positions,
        (POSITIONS,),
        lambda x, p: head(x + p[None, :LENGTH]),
    ),
    "tied": (tied, (), lambda x: jnp.einsum("bte,ve->btv", jnp.tanh(x), TABLE)),
    "padded": (padded, (), lambda x: head(x * (IDS > 0)[..., None])),
}


def check(model, args, explicit, rows, *, factor=1.0, index=0, count=1, tolerance=1e-5):
    """The embedding is found, read, perturbed and differentiated.

    A lookup that is scaled at once may be reported before or after the scaling.
    """
    np.testing.assert_allclose(explicit(rows), model(*args), atol=tolerance)
    sites = sites_of("embedding", model, *args)
    assert len(sites) == count, sites
    site = sites[index]
    assert site.shape == rows.shape
    assert site.loops == ()
    capture = tracing.capture(model, values=("activation",), sites=[site])
    # Bits are compared as XLA compiles by default: unoptimised, it rounds a fused
    # product otherwise once an operand is kept, also if that is written by hand.
    output, values = jax.jit(capture)(*args)
    np.testing.assert_array_equal(output, jax.jit(model)(*args))
    activation = np.asarray(values[site.name]["activation"], np.float32)
    near = functools.partial(np.allclose, activation, atol=tolerance, rtol=tolerance)
    assert near(rows) or near(rows * factor)
    factor = 1.0 if near(rows) else factor

    def loss(epsilon):
        perturbed = tracing.perturb(model, sites=[site])({site.name: epsilon}, *args)
        return jnp.sum(jnp.sin(perturbed))

    def wanted(epsilon):
        return jnp.sum(jnp.sin(explicit(rows + epsilon / factor)))

    epsilon = normal(5, *rows.shape, scale=0.1)
    for at in (jnp.zeros_like(epsilon), epsilon):
        got, want = (compiled(jax.value_and_grad(f))(at) for f in (loss, wanted))
        np.testing.assert_allclose(got[0], want[0], rtol=10 * tolerance)
        np.testing.assert_allclose(got[1], want[1], atol=10 * tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_embedding(name):
    model, rest, explicit = MODELS[name]
    with loose():
        check(
            model,
            (TABLE, IDS, *rest),
            lambda x: explicit(x, *rest),
            TABLE[IDS],
            tolerance=1e-2 if name == "cast" else 1e-5,
        )


def test_scaled_embedding():
    scale = WIDTH**0.5
    model = lambda table, ids: take(table, ids, scale)
    check(model, (TABLE, IDS), lambda x: head(x * scale), TABLE[IDS], factor=scale)


def test_embedding_before_a_layer_norm_and_attention():
    """The site is the lookup, and the attention after it is found as well."""

    def explicit(x):
        x = x - x.mean(-1, keepdims=True)
        a = jax.nn.softmax(jnp.einsum("bqe,bke->bqk", x, x))
        return head(x + jnp.einsum("bqk,bke->bqe", a, x))

    model = lambda table, ids: explicit(table[ids])
    check(model, (TABLE, IDS), explicit, TABLE[IDS])
    assert len(sites_of("attention", model, TABLE, IDS)) == 1


def test_table_closed_over():
    check(lambda ids: take(TABLE, ids), (IDS,), head, TABLE[IDS])


def test_one_example():
    model = lambda table, ids: head(table[ids][None])
    rows = TABLE[IDS[0]]
    check(model, (TABLE, IDS[0]), lambda x: head(x[None]), rows)


@pytest.mark.parametrize("index", [0, 1])
def test_segments_and_tokens_are_two_sites(index):
    """BERT: one table for tokens, one for segments, one for positions."""
    segments, table = jnp.array([[0, 0, 1, 1, 1]] * 2), normal(3, 2, WIDTH)

    def model(words, kinds, places, ids, segments):
        return head(words[ids] + kinds[segments] + places[None, :LENGTH])

    def explicit(x):
        rest = table[segments] if index == 0 else TABLE[IDS]
        return head(x + rest + POSITIONS[None, :LENGTH])

    args = (TABLE, table, POSITIONS, IDS, segments)
    rows = (TABLE[IDS], table[segments])[index]
    check(model, args, explicit, rows, index=index, count=2)


def test_position_ids_are_apart_from_tokens():
    """Positions that come as an input are looked up, too: a second site."""
    places = jnp.array([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])

    def model(table, positions, ids, places):
        return head(table[ids] + positions[places])

    def explicit(x):
        return head(x + POSITIONS[places])

    check(model, (TABLE, POSITIONS, IDS, places), explicit, TABLE[IDS], count=2)


def _linen():
    from flax import linen as nn

    module = nn.Embed(VOCABULARY, WIDTH)
    return lambda table, ids: head(module.apply({"params": {"embedding": table}}, ids))


def _nnx():
    from flax import nnx

    create = lambda: nnx.Embed(VOCABULARY, WIDTH, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.eval_shape(create))

    def model(table, ids):
        full = jax.tree.map(lambda _: table, state)
        return head(nnx.merge(graph, full)(ids))

    return model


def _equinox():
    import equinox as eqx

    def model(table, ids):
        module = eqx.nn.Embedding(weight=table)
        return head(jax.vmap(jax.vmap(module))(ids))

    return model


def _haiku(style):
    import haiku as hk

    function = lambda ids: hk.Embed(VOCABULARY, WIDTH, lookup_style=style)(ids)
    apply = hk.without_apply_rng(hk.transform(function)).apply
    return lambda table, ids: head(apply({"embed": {"embeddings": table}}, ids))


LIBRARIES = {
    "flax_linen": _linen,
    "flax_nnx": _nnx,
    "equinox": _equinox,
    "haiku_index": lambda: _haiku("ARRAY_INDEX"),
    "haiku_one_hot": lambda: _haiku("ONE_HOT"),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_embedding_of_a_library(name):
    if importlib.util.find_spec(name.split("_")[0]) is None:
        pytest.skip(f"{name} is not installed")
    with loose():
        check(LIBRARIES[name](), (TABLE, IDS), head, TABLE[IDS])


def _label_loss(x, labels):
    logits = jax.nn.log_softmax(x)
    return -jnp.take_along_axis(logits, labels[..., None], axis=-1).mean()


def _index_into_cache(x, index):
    return lax.dynamic_index_in_dim(x, index, axis=1)


def _length_mask(x, lengths):
    return x * (jnp.arange(LENGTH)[None] < lengths[:, None])[..., None].astype(x.dtype)


def _buckets(x, table):
    gap = jnp.abs(jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH)[None])
    return jnp.einsum("bte,ts->bse", x, table[gap])


@pytest.mark.parametrize(
    ("model", "rest"),
    [
        (_label_loss, (IDS % WIDTH,)),
        (_index_into_cache, (jnp.int32(2),)),
        (_length_mask, (jnp.array([5, 3]),)),
        (_buckets, (normal(3, LENGTH),)),
    ],
    ids=["labels", "cache_index", "lengths", "position_buckets"],
)
def test_integers_that_are_not_tokens(model, rest):
    assert not sites_of("embedding", model, tokens(), *rest)


# Named values.


def _named_layer(x, w):
    return jnp.tanh(checkpoint_name(x @ w, "hidden"))


def test_named():
    def model(x, w):
        return _named_layer(x, w).sum(1)

    x, w = normal(1, BATCH, WIDTH), normal(2, WIDTH, WIDTH)
    (site,) = sites_of("named", model, x, w)
    assert "hidden" in site.name
    assert site.shape == (BATCH, WIDTH)
    capture = tracing.capture(model, values=("activation",), sites=of_kind("named"))
    output, values = compiled(capture)(x, w)
    np.testing.assert_array_equal(output, compiled(model)(x, w))
    np.testing.assert_allclose(values[site.name]["activation"], x @ w, rtol=1e-6)
    perturbed = tracing.perturb(model, sites=[site.name])
    got = jax.grad(lambda e: perturbed({site.name: e}, x, w).sum())(jnp.zeros((2, 6)))
    want = jax.grad(lambda e: jnp.tanh(x @ w + e).sum())(jnp.zeros((2, 6)))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_convolution():
    """With the bias that is added to it, and only with that."""

    def conv(x, kernel):
        layouts = ("NCHW", "OIHW", "NCHW")
        return jax.lax.conv_general_dilated(
            x[None], kernel, (1, 1), "SAME", dimension_numbers=layouts
        )[0]

    def model(x, weights):
        x = jnp.tanh(conv(x, weights["first"]["kernel"]))
        x = conv(x, weights["last"]["kernel"]) + weights["last"]["bias"]
        return jnp.tanh(x).sum(axis=(1, 2))

    first, last = normal(1, 3, 2, 3, 3), normal(2, 4, 3, 3, 3)
    weights = {"kernel": last, "bias": normal(3, 4, 1, 1)}
    weights = {"first": {"kernel": first}, "last": weights}
    x = normal(4, 2, 5, 6)
    one, two = sites_of("convolution", model, x, weights)
    assert (one.name, two.name) == ("first", "last")
    assert (one.shape, two.shape) == ((1, 3, 5, 6), (4, 5, 6))
    assert one.channel_axis == two.channel_axis == -3
    capture = tracing.capture(model, ("activation",), of_kind("convolution"))
    output, values = compiled(capture)(x, weights)
    np.testing.assert_array_equal(output, compiled(model)(x, weights))
    np.testing.assert_allclose(
        values["first"]["activation"][0], conv(x, first), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        jnp.tanh(values["last"]["activation"]).sum((1, 2)), output, rtol=1e-5
    )
    flat = tracing.replace(model, lambda site, x: jnp.zeros_like(x), sites=["last"])
    np.testing.assert_array_equal(compiled(flat)(x, weights), 0)


def test_named_twice_are_two_sites():
    def model(x, w):
        return _named_layer(_named_layer(x, w), w)

    sites = sites_of("named", model, normal(1, BATCH, WIDTH), normal(2, WIDTH, WIDTH))
    assert len({site.name for site in sites}) == 2


@pytest.mark.parametrize("remat", [False, True])
def test_named_in_a_scan(remat):
    layer = jax.checkpoint(_named_layer, prevent_cse=False) if remat else _named_layer

    def model(x, w):
        return lax.scan(lambda x, w: (layer(x, w), None), x, w)[0]

    x, w = normal(1, BATCH, WIDTH), normal(2, 3, WIDTH, WIDTH)
    (site,) = sites_of("named", model, x, w)
    assert site.loops == (3,)
    assert site.shape == (3, BATCH, WIDTH)
    capture = tracing.capture(model, values=("activation",), sites=[site])
    _, values = compiled(capture)(x, w)
    got = compiled(
        jax.grad(lambda e: tracing.perturb(model, [site])({site.name: e}, x, w).sum())
    )(jnp.zeros(site.shape))

    def explicit(epsilon):
        y, seen = x, []
        for i in range(3):
            seen.append(y @ w[i])
            y = jnp.tanh(seen[-1] + epsilon[i])
        return y.sum(), jnp.stack(seen)

    want, seen = jax.grad(explicit, has_aux=True)(jnp.zeros(site.shape))
    np.testing.assert_allclose(values[site.name]["activation"], seen, atol=1e-5)
    np.testing.assert_allclose(got, want, atol=1e-5)


# Block inputs: the residual stream before each layer.


def _transformer_block(x, w, epsilon=0.0):
    x = x + epsilon
    norm = lambda x: (
        (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    )
    q, k, v = (jnp.einsum("bte,ehd->bthd", norm(x), w[name]) for name in "qkv")
    a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.5)
    x = x + jnp.einsum("bhqk,bkhd,hde->bqe", a, v, w["o"], optimize=False)
    return x + jax.nn.gelu(norm(x))


def _stack(layers=3):
    each = [weights(seed=10 * i) for i in range(layers)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def _streams(x, w):
    """The residual stream before every layer, [layer, batch, length, width]."""
    seen = []
    for i in range(3):
        seen.append(x)
        x = _transformer_block(x, jax.tree.map(lambda leaf, i=i: leaf[i], w))
    return jnp.stack(seen)


def test_blocks_of_a_scan():
    def model(x, w):
        return lax.scan(lambda x, w: (_transformer_block(x, w), None), x, w)[0]

    x, w = tokens(), _stack()
    (site,) = sites_of("block", model, x, w)
    assert site.loops == (3,)
    assert site.shape == (3, *x.shape)
    capture = tracing.capture(model, values=("activation",), sites=[site])
    output, values = compiled(capture)(x, w)
    np.testing.assert_array_equal(output, compiled(model)(x, w))
    got = values[site.name]["activation"]
    np.testing.assert_allclose(got, _streams(x, w), atol=1e-5)

    def loss(epsilon):
        return tracing.perturb(model, [site])({site.name: epsilon}, x, w).sum()

    def wanted(epsilon):
        y = x
        for i in range(3):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], w)
            y = _transformer_block(y, layer, epsilon[i])
        return y.sum()

    zeros = jnp.zeros(site.shape)
    got, want = (compiled(jax.grad(f))(zeros) for f in (loss, wanted))
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_blocks_of_a_python_loop():
    """Every layer's input is among the blocks, and nothing but the stream is."""

    def model(x, w):
        for i in range(3):
            x = _transformer_block(x, jax.tree.map(lambda leaf, i=i: leaf[i], w))
        return x

    x, w = tokens(), _stack()
    sites = sites_of("block", model, x, w)
    capture = tracing.capture(model, values=("activation",), sites=of_kind("block"))
    _, values = compiled(capture)(x, w)
    got = [values[site.name]["activation"] for site in sites]
    assert all(site.shape == x.shape for site in sites)
    for stream in _streams(x, w):
        assert any(np.allclose(stream, y, atol=1e-5) for y in got)
    assert 3 <= len(got) <= 7


def test_no_blocks_without_residuals():
    def model(x, w):
        return jax.nn.relu(x @ w) @ w

    assert not sites_of("block", model, normal(1, 4, 4), normal(2, 4, 4))
