"""Whatever loops and masks a model uses, its layers give the same rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
from tests.tracing.cases import compiled
from xviz_jax import tracing
from xviz_jax.attention import layers, rows
from xviz_jax.attention.fusion import Fusion

LENGTH, WIDTH, HEADS, DEPTH, CHUNK = 6, 8, 2, 3, 2

_KEYS = jax.random.split(jax.random.key(0), 5)
WEIGHTS = {
    name: jax.random.normal(key, (DEPTH, WIDTH, WIDTH)) * WIDTH**-0.5
    for name, key in zip(("query", "key", "value", "out"), _KEYS, strict=False)
}
HEAD = jax.random.normal(_KEYS[4], (WIDTH, 3))
X = jax.random.normal(jax.random.key(9), (LENGTH, WIDTH))
SEEN = jnp.arange(LENGTH) < 5
POSITIONS = jnp.arange(LENGTH)


def project(x, weights):
    split = lambda name: (x @ weights[name]).reshape(LENGTH, HEADS, -1)
    return split("query"), split("key"), split("value")


def weigh(query, key, value, mask):
    scores = jnp.einsum("qhd,khd->hqk", query, key) * 0.5
    scores = jnp.where(mask[None], scores, -1e30)
    return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), value)


def whole(query, key, value, mask):
    return weigh(query, key, value, mask(POSITIONS))


def chunked_arrays(query, key, value, mask):
    """Chunks of the queries and of their positions are scanned."""
    cut = lambda array: array.reshape(-1, CHUNK, *array.shape[1:])
    out = lax.map(
        lambda part: weigh(part[0], key, value, mask(part[1])),
        (cut(query), cut(POSITIONS)),
    )
    return out.reshape(query.shape)


def chunked_slices(query, key, value, mask):
    """Chunks are sliced out by their number, and computed again for gradients."""

    @jax.checkpoint
    def chunk(number):
        start = number * CHUNK
        part = lax.dynamic_slice_in_dim(query, start, CHUNK)
        return weigh(part, key, value, mask(start + jnp.arange(CHUNK)))

    return lax.map(chunk, jnp.arange(LENGTH // CHUNK)).reshape(query.shape)


def counted_slices(query, key, value, mask):
    """A counted loop writes chunk after chunk."""

    def turn(number, out):
        start = number * CHUNK
        part = lax.dynamic_slice_in_dim(query, start, CHUNK)
        seen = mask(start + jnp.arange(CHUNK))
        return lax.dynamic_update_slice_in_dim(
            out, weigh(part, key, value, seen), start, axis=0
        )

    return lax.fori_loop(0, LENGTH // CHUNK, turn, jnp.zeros_like(query))


def everything(rows):
    return jnp.ones((rows.shape[0], LENGTH), bool)


def causal(rows):
    return rows[:, None] >= POSITIONS[None]


def window(rows):
    gap = rows[:, None] - POSITIONS[None]
    return (gap >= 0) & (gap < 3)


def padded(rows):
    return causal(rows) & SEEN[None]


MASKS = {f.__name__: f for f in (everything, causal, window, padded)}
WAYS = {f.__name__: f for f in (whole, chunked_arrays, chunked_slices, counted_slices)}


def transformer(way, mask, looped):
    def layer(x, weights):
        mixed = way(*project(x, weights), mask)
        return jnp.tanh(x + mixed.reshape(x.shape) @ weights["out"]), None

    def model(x):
        if looped == "scan":
            x, _ = lax.scan(layer, x, WEIGHTS)
        elif looped == "reverse":
            flipped = jax.tree.map(lambda leaf: leaf[::-1], WEIGHTS)
            x, _ = lax.scan(layer, x, flipped, reverse=True)
        else:
            for number in range(DEPTH):
                x, _ = layer(x, {name: w[number] for name, w in WEIGHTS.items()})
        return x[-1] @ HEAD

    return model


def explain(model):
    relevance = xv.attention_relevance(model, query=-1)
    rollout = xv.attention_rollout(model, query=-1)
    return compiled(lambda x: (rollout(x).scores, relevance(x, target=0).scores))(X)


@pytest.fixture(scope="module")
def expected():
    """Maps as they are, of the plainest program with each mask."""
    return {
        name: explain(transformer(whole, mask, "unrolled"))
        for name, mask in MASKS.items()
    }


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("looped", "way"),
    [("unrolled", "whole"), ("reverse", "whole"), *(("scan", way) for way in WAYS)],
)
def test_rows_made_of_queries_and_keys(looped, way, mask, expected, monkeypatch):
    for limit in ("_SMALL_MAP", "_FUSED_MAP"):
        monkeypatch.setattr(layers, limit, 0)
    model = transformer(WAYS[way], MASKS[mask], looped)
    for got, want in zip(explain(model), expected[mask], strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("way", WAYS)
def test_masks_of_positions_are_never_kept(way):
    """What positions say is proved; only padding is left to be carried along."""
    for name, mask in MASKS.items():
        sites = xv.tracing.sites(transformer(WAYS[way], mask, "scan"), X)
        (site,) = (site for site in sites if site.kind == "attention")
        assert ("remaining_mask" in site.values) == (name == "padded")
        assert site.causal is (False if name == "everything" else True)
        assert site.window == ((2, 0) if name == "window" else None)
        assert site.turns == ("layers", "queries")[: len(site.loops)]


def test_chunks_in_another_order_are_refused():
    def strided(query, key, value, mask):
        part = jnp.swapaxes(query.reshape(CHUNK, -1, HEADS, WIDTH // HEADS), 0, 1)
        out = lax.map(lambda part: weigh(part, key, value, everything(part)), part)
        return jnp.swapaxes(out, 0, 1).reshape(query.shape)

    model = transformer(strided, everything, "unrolled")
    with pytest.raises(ValueError, match="a loop over something else than layers"):
        xv.attention_rollout(model)(X)


def test_a_loop_over_heads_is_no_stack_of_layers():
    def by_head(query, key, value, mask):
        def one(each):
            query, key, value = (array[:, None] for array in each)
            return weigh(query, key, value, everything(X))[:, 0]

        return lax.map(one, [jnp.swapaxes(a, 0, 1) for a in (query, key, value)])

    model = transformer(by_head, everything, "unrolled")
    with pytest.raises(ValueError, match="a loop over something else than layers"):
        xv.attention_rollout(model)(X)


def test_kept_values_of_a_loop_take_no_room_for_each_chunk():
    def sizes(way):
        monkey = pytest.MonkeyPatch()
        with monkey.context() as patch:
            for limit in ("_SMALL_MAP", "_FUSED_MAP"):
                patch.setattr(layers, limit, 0)
            _, found = layers.capture(transformer(way, causal, "scan"), (X,))
        return {name: array.shape for name, array in found[0].values.items()}

    assert sizes(chunked_slices) == sizes(whole)


def test_maps_of_the_same_values_are_heads_of_one_layer():
    """Differential attention, written with two softmaxes and with one."""

    def maps(x, names, mask):
        split = lambda name: (x @ WEIGHTS[name][0]).reshape(LENGTH, HEADS, -1)
        scores = jnp.einsum("qhd,khd->hqk", split(names[0]), split(names[1]))
        return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))

    def apart(x):
        first = maps(x, ("query", "key"), causal(POSITIONS))
        second = maps(x, ("out", "value"), causal(POSITIONS))
        value = x.reshape(LENGTH, HEADS, -1)
        out = jnp.einsum("hqk,khd->qhd", first - 0.3 * second, value)
        return out.reshape(LENGTH, WIDTH)[-1] @ HEAD

    _, captured = xv.tracing.capture(apart)(X)
    both = np.concatenate([own["probabilities"][0] for own in captured.values()])
    want = 0.5 * np.eye(LENGTH)[-1] + 0.5 * both.mean(axis=0)[-1]
    got = xv.attention_rollout(apart, query=-1)(X)
    np.testing.assert_allclose(got.scores, want, atol=1e-6)
    relevance = xv.attention_relevance(apart, query=-1)(X, target=0)
    assert np.isfinite(relevance.scores).all() and relevance.diagnostics["mass"] > 1


def test_branches_side_by_side_are_refused():
    def branches(x):
        attend = lambda name: jax.nn.softmax(x @ WEIGHTS[name][0] @ x.T) @ x
        return (attend("query") + attend("key"))[-1] @ HEAD

    with pytest.raises(ValueError, match="runs beside 'attention' and not after it"):
        xv.attention_rollout(branches)(X)


@pytest.mark.parametrize("limit", [0, 2**24])
def test_relevance_has_a_derivative(limit, monkeypatch):
    """Of what is read as of what comes back: made in the model, or tile by tile."""
    monkeypatch.setattr(xv.attention.layers, "_FUSED_MAP", limit)
    draw = np.random.default_rng(0).normal
    weights = jnp.float32(draw(size=(2, 4, 8, 8)) / 3)

    def block(x, w):
        query, key, value = ((x @ each).reshape(len(x), 2, 4) for each in w[:3])
        maps = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", query, key))
        mixed = jnp.einsum("hqk,khd->qhd", maps, value)
        return jnp.tanh(x + mixed.reshape(x.shape) @ w[3]), None

    model = lambda x: jax.lax.scan(block, x, weights)[0][0, :3]
    explain = xv.attention_relevance(model)
    score = jax.jit(lambda x: explain(x, target=1).scores @ jnp.arange(5.0))
    x, step = jnp.float32(draw(size=(2, 5, 8)))
    slope = jnp.sum(jax.jit(jax.grad(score))(x) * step)
    moved = (score(x + 1e-2 * step) - score(x - 1e-2 * step)) / 2e-2
    assert abs(slope) > 0.1
    np.testing.assert_allclose(slope, moved, rtol=2e-2)


@pytest.mark.parametrize("queries", [1, 5, 7, 9])
def test_keys_that_are_known_to_be_padding(queries):
    """A count of keys that does not vary with the query is no window of any width."""
    weights = np.random.default_rng(4).normal(size=(3, 4, 4)).astype(np.float32)

    def model(x, y, seen=None):
        if seen is None:
            seen = jnp.arange(7) < 4
        query, key, value = (z @ w for z, w in zip((x, y, y), weights, strict=True))
        scores = jnp.where(seen, query @ key.T, -jnp.inf)
        return (jax.nn.softmax(scores) @ value)[0]

    x, y = (jax.random.normal(jax.random.key(n), (n, 4)) for n in (queries, 7))
    (site,) = (s for s in tracing.sites(model, x, y) if s.kind == "attention")
    assert (site.causal, site.window) == (None, None)
    scalar = lambda logits: logits[0]
    _, known = layers.capture_named(model, (x, y), site.name, scalar)
    _, given = layers.capture_named(model, (x, y, np.arange(7) < 4), site.name, scalar)
    for layer in (known, given):
        assert "probabilities" not in layer.values
        made = rows.matrix(layer, Fusion())
        _, maps = tracing.capture(model)(x, y)
        expected = maps[site.name]["probabilities"][0, 0]
        np.testing.assert_allclose(made, expected, rtol=1e-5)
        assert not made[:, 4:].any()
