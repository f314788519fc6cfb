"""Relevance over several sequences, against the paper's rules written out."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax import tracing

WIDTH, HEADS, CLASSES = 4, 2, 3
NAMES = ("query", "key", "value", "out")


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def weights(seed):
    return {n: draw(100 * seed + i, WIDTH, WIDTH) for i, n in enumerate(NAMES)}


HEAD = draw(9, WIDTH, CLASSES)


def attend(w, x, y, seen: Any = True, tap=lambda maps: maps):
    """What one sequence gets of another; `tap` sees, or moves, the maps."""
    split = lambda name, z: (z @ w[name]).reshape(len(z), HEADS, -1)
    scores = jnp.einsum("qhd,khd->hqk", split("query", x), split("key", y)) / 2
    maps = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    mixed = jnp.einsum("hqk,khd->qhd", tap(maps), split("value", y))
    return mixed.reshape(len(x), WIDTH) @ w["out"]


def norm(x):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def mlp(x):
    x = norm(x)
    return x + jnp.tanh(x)


def stacked(layers):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def cast(tree, like):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, like.dtype), tree)


class EncoderDecoder:
    """Two layers of an encoder, two of a causal decoder that attends to it."""

    encoder = ({"own": weights(1)}, {"own": weights(2)})
    decoder = (
        {"own": weights(3), "cross": weights(4)},
        {"own": weights(5), "cross": weights(6)},
    )

    def __init__(self, own=4, other=6, scan=False, pad=0):
        self.own, self.other, self.scan, self.pad = own, other, scan, pad

    def inputs(self):
        return draw(7, self.own, WIDTH), draw(8, self.other, WIDTH)

    def __call__(self, x, source, tap=lambda maps: maps, at=lambda stream: stream):
        """As trained; `tap` sees, or moves, maps, and `at` what enters layers."""
        seen = np.arange(self.other) < self.other - self.pad
        past = np.tril(np.ones((self.own, self.own), bool))

        def encode(y, w):
            y = at(y)
            return mlp(y + attend(w["own"], y, y, seen, tap)), None

        def decode(x, w):
            x = at(x)
            x = at(norm(x + attend(w["own"], x, x, past, tap)))
            return mlp(x + attend(w["cross"], x, memory, seen, tap)), None

        encoder, decoder = cast((self.encoder, self.decoder), x)
        memory = at(self.run(encode, source, encoder))
        return (self.run(decode, x, decoder)[-1]) @ jnp.asarray(HEAD, x.dtype)

    def run(self, layer, x, layers):
        if self.scan:
            return jax.lax.scan(layer, x, stacked(layers))[0]
        for w in layers:
            x, _ = layer(x, w)
        return x

    def shapes(self, own, other):
        """Queries and keys of each layer of attention, in order."""
        return [(other, other)] * 2 + [(own, own), (own, other)] * 2

    # Layers that run at once, by the sequences of their queries and of their keys.
    groups = (
        *[[("other", "other")]] * 2,
        *[[("own", "own")], [("own", "other")]] * 2,
    )

    def relevance(self, maps):
        """Equations 6, 7 and 10, in the order of the program."""
        own, other = np.eye(self.own), np.eye(self.other)
        both = np.zeros((self.own, self.other))
        for step in maps[:2]:
            other = other + step @ other
        for step, cross in zip(maps[2::2], maps[3::2], strict=True):
            own, both = own + step @ own, both + step @ both
            both = both + normalized(own).T @ cross @ normalized(other)
        return own[-1], both[-1]


class CoAttention:
    """A text and an image that read each other as both were before, twice."""

    layers = tuple(
        {name: weights(10 * n + i) for i, name in enumerate(("ti", "it", "tt", "ii"))}
        for n in (2, 3)
    )

    def __init__(self, own=4, other=6, scan=False):
        self.own, self.other, self.scan = own, other, scan

    inputs = EncoderDecoder.inputs
    run = EncoderDecoder.run

    def __call__(self, text, image, tap=lambda maps: maps, at=lambda stream: stream):
        def layer(both, w):
            text, image = map(at, both)
            text, image = map(
                at,
                (
                    mlp(text + attend(w["ti"], text, image, tap=tap)),
                    mlp(image + attend(w["it"], image, text, tap=tap)),
                ),
            )
            text = mlp(text + attend(w["tt"], text, text, tap=tap))
            return (text, mlp(image + attend(w["ii"], image, image, tap=tap))), None

        both = self.run(layer, (text, image), cast(self.layers, text))
        return both[0][0] @ jnp.asarray(HEAD, text.dtype)

    def shapes(self, own, other):
        return [(own, other), (other, own), (own, own), (other, other)] * 2

    groups = (
        [("own", "other"), ("other", "own")],
        [("own", "own")],
        [("other", "other")],
    ) * 2

    def relevance(self, maps):
        """Equations 6, 7, 10 and 11; both cross layers use what was before."""
        tt, ii = np.eye(self.own), np.eye(self.other)
        ti, it = np.zeros((self.own, self.other)), np.zeros((self.other, self.own))
        for layer in range(2):
            text_image, image_text, text, image = maps[4 * layer : 4 * layer + 4]
            new = (
                ti + normalized(tt).T @ text_image @ normalized(ii),
                it + normalized(ii).T @ image_text @ normalized(tt),
                tt + text_image @ it,
                ii + image_text @ ti,
            )
            ti, it, tt, ii = new
            ti, tt = ti + text @ ti, tt + text @ tt
            it, ii = it + image @ it, ii + image @ ii
        return tt[0], ti[0]


def normalized(relevance):
    """Equations 8 and 9."""
    rest = relevance - np.eye(len(relevance))
    total = rest.sum(axis=-1, keepdims=True)
    return rest / np.where(total == 0, 1, total) + np.eye(len(relevance))


def maps_and_slopes(model, target):
    """Maps that are written out, and gradients through them, in float64."""
    with jax.enable_x64(True):
        x, y = map(jnp.asarray, model.inputs())
        unrolled = type(model)(**{**vars(model), "scan": False})

        def moved(added):
            rest, found = iter(added), []

            def tap(maps):
                found.append(maps)
                return maps + next(rest)

            return unrolled(x, y, tap=tap)[target], found

        lengths = [len(each) for each in (x, y)]
        zeros = [jnp.zeros((HEADS, q, k)) for q, k in model.shapes(*lengths)]
        slopes, found = jax.jit(jax.grad(moved, has_aux=True))(zeros)
        return jax.tree.map(np.asarray, (found, slopes))


def fused_maps(model, target):
    """Equation 5."""
    return [
        np.maximum(maps * slope, 0).mean(axis=0)
        for maps, slope in zip(*maps_and_slopes(model, target), strict=True)
    ]


MODELS = {
    "encoder and decoder": EncoderDecoder(),
    "encoder and decoder, looped": EncoderDecoder(scan=True),
    "of one length": EncoderDecoder(own=5, other=5),
    "padded": EncoderDecoder(pad=2, scan=True),
    "co-attention": CoAttention(),
    "co-attention, looped": CoAttention(scan=True),
    "co-attention of one length": CoAttention(own=5, other=5, scan=True),
}


def of_both(model, scores):
    """Of the explained sequence, and of the other; the one that attends first leads."""
    first, second = scores.values()
    return (second, first) if isinstance(model, EncoderDecoder) else (first, second)


def query_of(model):
    return 0 if isinstance(model, CoAttention) else -1


@pytest.mark.parametrize("name", MODELS)
def test_the_papers_rules(name):
    model = MODELS[name]
    x, y = map(jnp.float32, model.inputs())
    explain = xv.attention_relevance(model, query=query_of(model))
    found = jax.jit(partial(explain, target=1))(x, y)
    own, other = model.relevance(fused_maps(model, 1))
    first, second = of_both(model, found.scores)
    np.testing.assert_allclose(first, own, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(second, other, rtol=2e-5, atol=1e-6)
    assert second.max() > 1e-3
    np.testing.assert_allclose(found.output, model(x, y)[1], rtol=1e-5)
    total = own.sum() + other.sum()
    np.testing.assert_allclose(found.diagnostics["mass"], total, rtol=2e-5)
    if name == "padded":
        assert not np.asarray(second)[-model.pad :].any()


SITES = ["attention", "attention#1", "attention#2", "attention#3"]


def encode_twice(x, y):
    """Both are encoded, and the second reads the first; nothing is looped."""
    x = mlp(x + attend(cast(weights(1), x), x, x))
    y = mlp(y + attend(cast(weights(2), x), y, y))
    return mlp(y + attend(cast(weights(3), x), y, x)), x


def last(x, y):
    return encode_twice(x, y)[0][-1] @ jnp.asarray(HEAD, x.dtype)


X, Y = (np.float32(draw(n, length, WIDTH)) for n, length in ((7, 4), (8, 6)))


def test_sequences_bear_names():
    traced = xv.attention_relevance(last, query=-1)(X, Y, target=0)
    assert {name: len(s) for name, s in traced.scores.items()} == {
        "attention": 4,
        "attention#1": 6,
    }
    streams = {
        "attention": ("source", "source"),
        "attention#1": ("text", "text"),
        "attention#2": ("text", "source"),
    }
    given = xv.attention_relevance(last, query=-1, streams=streams)(X, Y, target=0)
    assert list(given.scores) == ["source", "text"]
    rows = xv.attention_relevance(last, query={"attention#1": 5})(X, Y, target=0)
    for other in (given, rows):
        for one, two in zip(traced.scores.values(), other.scores.values(), strict=True):
            np.testing.assert_array_equal(one, two)
    keys_only = lambda x, y: attend(cast(weights(3), x), y, x)[0]
    assert list(xv.attention_relevance(keys_only)(X, Y).scores) == [
        "attention",
        "attention/key",
    ]


def test_weights_of_rows_are_sums_of_rows():
    """Of both sequences; and `mean` leaves padding out."""

    def rows(query):
        return xv.attention_relevance(last, query=query)(X, Y, target=0).scores

    each = [rows(position) for position in range(6)]
    share = np.linspace(0, 1, 6, dtype=np.float32)
    for query, weighed in ((share, share), ("mean", np.full(6, 1 / 6))):
        for name, scores in rows(query).items():
            expected = sum(w * own[name] for w, own in zip(weighed, each, strict=True))
            np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-7)


def test_start_layer_leaves_out_what_ran_before():
    late = xv.attention_relevance(last, query=-1, start_layer=2)(X, Y, target=0)
    first, second = late.scores.values()
    assert second.tolist() == [0, 0, 0, 0, 0, 1]
    _, found = tracing.attention_cotangents(
        last, lambda logits: logits[0], values=("value", "probabilities")
    )(X, Y)
    cross = found["attention#2"]
    slopes = np.einsum("qhd,khd->hqk", cross["output_cotangent"][0], cross["value"][0])
    kept = np.maximum(np.asarray(cross["probabilities"][0]) * slopes, 0).mean(axis=0)
    np.testing.assert_allclose(first, kept[-1], rtol=1e-5, atol=1e-7)


def test_sequences_that_cannot_be_followed_are_given():
    def turned(x, y):
        y, x = encode_twice(x, y)
        return attend(cast(weights(4), x), y[::-1], x)[0]

    def as_it_was(x, y):
        y, x = encode_twice(x, y)
        return attend(cast(weights(4), x), y, x)[-1]

    pairs = [("a", "a"), ("b", "b"), ("b", "a"), ("b", "a")]
    streams = dict(zip(SITES, pairs, strict=True))
    with pytest.raises(ValueError, match=r"'rev' puts positions .* name it"):
        jax.eval_shape(xv.attention_relevance(turned), X, Y)
    found = xv.attention_relevance(turned, streams=streams)(X, Y, target=0)
    other = xv.attention_relevance(as_it_was, query=-1)(X, Y, target=0)
    np.testing.assert_allclose(found.output, other.output, rtol=1e-5)
    assert all(np.isfinite(scores).all() for scores in found.scores.values())
    assert found.scores["a"].max() > 0


def both(x, y):
    y, x = encode_twice(x, y)
    return (x[0] + y[0]) @ jnp.asarray(HEAD, x.dtype)


def towers(x, y):
    x = mlp(x + attend(cast(weights(1), x), x, x))
    y = mlp(y + attend(cast(weights(2), x), y, y))
    return (x[0] * y[0])[:CLASSES]


def joined(x, y):
    y, x = encode_twice(x, y)
    z = jnp.concatenate([x, y])
    return attend(cast(weights(4), x), z, z)[0]


def summed(x, y):
    """Of one length, so that they can be added."""
    x = mlp(x + attend(cast(weights(1), x), x, x[:3]))
    y = mlp(y + attend(cast(weights(2), x), y, y))
    return attend(cast(weights(1), x), x + y, x + y)[0]


def branches(x, y):
    w = cast(weights(1), x)
    return (x + attend(w, x, y) + attend(w, x, 2 * y))[0]


def nested(x, y):
    w = cast(weights(1), x)
    inner = lambda x, _: (mlp(x + attend(w, x, y)), None)
    outer = lambda x, _: (jax.lax.scan(inner, x, None, length=2)[0], None)
    return jax.lax.scan(outer, x, None, length=2)[0][0]


def blank(x, y):
    return attend(cast(weights(1), x), jnp.zeros((3, WIDTH)) + x[:1], y)[0]


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (both, {}, r"read from the sequences \['attention', 'attention#1'\]: name one"),
        (last, {"query": {"text": 0}}, r"one of the sequences .* got \['text'\]"),
        (last, {"query": 6}, "from -6 to 5, got 6"),
        (last, {"query": jnp.ones(4)}, r"are float\[6\], got float32\[4\]"),
        (last, {"heads": "max"}, "fused by 'mean', got 'max'"),
        (last, {"start_layer": 3}, "from 0 to 2 for 3 layers, got 3"),
        (last, {"streams": {"attention": ("a", "a")}}, "for each of .* got names"),
        (last, {"streams": dict.fromkeys(SITES[:3], ("a", "b"))}, "has 4 positions"),
        (last, {"streams": dict.fromkeys(SITES[:3], "a")}, "'attention' are those of"),
        (towers, {"query": {"attention": 0}}, r"no attention leads .* \['attention#1'"),
        (joined, {}, "queries of 'attention#3' .* selected or joined from others"),
        (branches, {}, "'attention#1' runs beside 'attention'"),
        (nested, {}, "a loop inside a loop"),
        (blank, {}, "queries of 'attention' .* made of no input; name it"),
        (lambda x, y: summed(x, y[:4]), {}, "for several were added"),
    ],
)
def test_refusals(model, options, said):
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(xv.attention_relevance(model, **options), X, Y)


def test_methods_for_one_sequence_refuse_several_of_one_length():
    cross = lambda x, y: attend(cast(weights(1), x), x, y)[0]
    with pytest.raises(ValueError, match="'attention' attends from one sequence"):
        jax.eval_shape(xv.raw_attention(cross), X, X)
    plain = lambda x: attend(cast(weights(1), x), x, x)[0]
    with pytest.raises(ValueError, match="for a model of one"):
        jax.eval_shape(xv.attention_relevance(plain, query={"attention": 0}), X)
    one = xv.attention_relevance(plain, streams={"attention": ("a", "a")})(X)
    np.testing.assert_array_equal(one.scores, xv.attention_relevance(plain)(X).scores)


@pytest.mark.parametrize("small", [0, 8 * 2**20])
@pytest.mark.parametrize("scan", [False, True])
def test_raw_attention_of_a_layer_by_name(scan, small, monkeypatch):
    """From one sequence to another, the last of a loop's; as a map, or tile by tile."""
    monkeypatch.setattr(xv.attention.layers, "_SMALL_MAP", small)
    model, maps = EncoderDecoder(scan=scan, pad=2), []
    with jax.enable_x64(True):
        keep = lambda seen: maps.append(np.asarray(seen)) or seen
        EncoderDecoder(pad=2)(*map(jnp.asarray, model.inputs()), tap=keep)
    x = tuple(map(jnp.float32, model.inputs()))
    sites = [site for site in tracing.sites(model, *x) if site.kind == "attention"]
    (*_, cross) = (site for site in sites if site.shape[-2] != site.shape[-1])
    cases: list[tuple[dict[str, Any], np.ndarray]] = [
        ({"query": 1}, maps[-1].mean(axis=0)[1]),
        ({"query": -1, "head": 1}, maps[-1][1, -1]),
        ({"query": jnp.ones(4) / 4, "heads": "max"}, maps[-1].max(axis=0).mean(axis=0)),
    ]
    for options, expected in cases:
        explain = jax.jit(xv.raw_attention(model, layer=cross.name, **options))
        found = explain(*x)
        np.testing.assert_allclose(found.scores, expected, rtol=1e-4, atol=1e-6)
        assert not found.scores[-2:].any()
        np.testing.assert_allclose(found.diagnostics["mass"], found.scores.sum())


def test_raw_attention_of_a_layer_refuses():
    x = tuple(map(jnp.float32, EncoderDecoder().inputs()))
    model = EncoderDecoder()
    with pytest.raises(ValueError, match="no attention is named 'none'; there are"):
        xv.raw_attention(model, layer="none")(*x)
    with pytest.raises(ValueError, match="position or weights of rows, got 'mean'"):
        xv.raw_attention(model, layer="attention", query="mean")(*x)
