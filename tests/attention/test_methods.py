"""Methods on attention, against float64 formulae on maps that are all written out."""

import dataclasses
import inspect
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax.attention import layers
from xviz_jax.explain import methods

WIDTH, CLASSES = 8, 3


@dataclasses.dataclass(frozen=True)
class Network:
    """A transformer; `scan` runs its layers in a loop, `pad` masks its last tokens.

    Of a `window`, queries see so many keys to the left and to the right. An `opaque`
    one adds nothing to its maps, but then queries and keys do not tell them.
    """

    depth: int = 2
    heads: int = 4
    groups: int = 4
    length: int = 7
    causal: bool = False
    scan: bool = False
    pad: int = 0
    post: bool = False
    window: tuple[int, int] | None = None
    opaque: bool = False

    def weights(self):
        draw = lambda seed, *shape: (
            np.random.default_rng(seed).normal(size=(self.depth, *shape))
            / shape[0] ** 0.5
        )
        keys = WIDTH * self.groups // self.heads
        return {
            "query": draw(1, WIDTH, WIDTH),
            "key": draw(2, WIDTH, keys),
            "value": draw(3, WIDTH, keys),
            "out": draw(4, WIDTH, WIDTH),
            "head": draw(5, WIDTH, CLASSES)[0],
        }

    def input(self, pad=None):
        x = np.random.default_rng(6).normal(size=(self.length, WIDTH))
        return np.concatenate([x, np.ones((pad or self.pad, WIDTH))])

    def allowed(self, length):
        if self.window is not None:
            # Made of positions, so that tracing proves it.
            ahead = jnp.arange(length)[None] - jnp.arange(length)[:, None]
            left, right = self.window
            return (ahead >= -left) & (ahead <= right)
        seen = np.ones((length, length), bool)
        if self.causal:
            seen = np.tril(seen)
        return seen & (np.arange(length) < self.length)

    def block(self, x, weights, added=None):
        """Also the map; `added` moves it."""
        length = len(x)
        split = lambda name, heads: (x @ weights[name]).reshape(length, heads, -1)
        repeat = self.heads // self.groups
        key, value = (
            jnp.repeat(split(name, self.groups), repeat, axis=1)
            for name in ("key", "value")
        )
        scores = jnp.einsum("qhd,khd->hqk", split("query", self.heads), key)
        scores = jnp.where(self.allowed(length), scores / 1.5, -jnp.inf)
        maps = jax.nn.softmax(scores)
        if added is None and self.opaque:
            added = 0.0
        moved = maps if added is None else maps + added
        mixed = jnp.einsum("hqk,khd->qhd", moved, value).reshape(length, -1)
        x = x + mixed @ weights["out"]
        if self.post:
            x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True))
        return jnp.tanh(x) + 0.1 * x, maps

    def __call__(self, x):
        weights = jax.tree.map(jnp.float32, self.weights())
        head = weights.pop("head")
        if self.scan:
            x, _ = jax.lax.scan(lambda x, w: (self.block(x, w)[0], None), x, weights)
        else:
            for layer in range(self.depth):
                x, _ = self.block(x, jax.tree.map(lambda w, n=layer: w[n], weights))
        return x[self.query] @ head

    def truth(self, target, pad=None):
        """Maps, their gradients, streams and their gradients, in float64."""
        with jax.enable_x64(True):
            weights, x = jax.tree.map(jnp.asarray, (self.weights(), self.input(pad)))
            head = weights.pop("head")
            length = len(x)
            shape = (self.depth, self.heads, length, length)

            def run(added, moved):
                h, maps, streams = x, [], []
                for layer in range(self.depth):
                    h = h + moved[layer]
                    streams.append(h)
                    own = jax.tree.map(lambda w, n=layer: w[n], weights)
                    h, seen = self.block(h, own, added[layer])
                    maps.append(seen)
                logits = h[self.query] @ head
                return logits[target], (jnp.stack(maps), jnp.stack(streams))

            zeros = jnp.zeros(shape), jnp.zeros((self.depth, length, WIDTH))
            slopes, found = jax.grad(run, argnums=(0, 1), has_aux=True)(*zeros)
            maps, streams = map(np.asarray, found)
            return maps, np.asarray(slopes[0]), streams, np.asarray(slopes[1])

    @property
    def query(self):
        """Which position is read; of a window, one that both its sides cut off."""
        if self.window is not None:
            return self.length // 2
        return -1 if self.causal else 0


NETWORKS = {
    "one layer": Network(depth=1),
    "two layers": Network(),
    "grouped, scanned": Network(depth=3, groups=2, length=9, scan=True),
    "causal, four layers": Network(depth=4, groups=1, length=5, causal=True),
    "padded": Network(pad=3, scan=True),
    "normalised after": Network(depth=3, post=True, opaque=True),
    "windowed": Network(groups=2, length=9, window=(1, 2)),
}
# Two layers are taken tile by tile, further down.
SHAPES = [name for name in NETWORKS if name != "two layers"]


near = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def relu(x):
    return np.maximum(x, 0)


def rollout(matrices, query, residual):
    product = np.eye(matrices.shape[-1])
    for matrix in matrices:
        step = residual * np.eye(len(matrix)) + (1 - residual) * matrix
        total = step.sum(axis=-1, keepdims=True)
        product = step / np.where(total == 0, 1, total) @ product
    return product[query]


def added(matrices):
    product = np.eye(matrices.shape[-1])
    for matrix in matrices:
        product = (np.eye(len(matrix)) + matrix) @ product
    return product


def cam(network, layer, maps, slopes):
    row, slope = maps[layer][:, network.query], slopes[layer][:, network.query]
    seen = slope[:, : network.length]
    return relu((row * seen.mean(axis=1, keepdims=True)).mean(axis=0))


def column_mean(network, matrices):
    return matrices[:, : network.length].sum(axis=1) / network.length


# Of each method: how it is called, and its formula.
METHODS = {
    "raw_attention": (
        lambda m, n: xv.raw_attention(m, query=n.query),
        lambda n, maps, *_: maps[-1].mean(axis=0)[n.query],
    ),
    "raw_attention-layer": (
        lambda m, n: xv.raw_attention(m, query=n.query, layer=0, heads="max"),
        lambda n, maps, *_: maps[0].max(axis=0)[n.query],
    ),
    "raw_attention-head": (
        lambda m, n: xv.raw_attention(m, query=n.query, head=-2),
        lambda n, maps, *_: maps[-1][-2, n.query],
    ),
    "gradient_rollout": (
        lambda m, n: xv.gradient_rollout(m, query=n.query, residual=0.01),
        lambda n, maps, slopes, *_: rollout(
            relu((maps * slopes).mean(axis=1)), n.query, 0.01
        ),
    ),
    "attention_relevance": (
        lambda m, n: xv.attention_relevance(m, query=n.query),
        lambda n, maps, slopes, *_: added(relu(maps * slopes).mean(axis=1))[n.query],
    ),
    "attention_grad_cam": (
        lambda m, n: xv.attention_grad_cam(m, query=n.query),
        lambda n, maps, slopes, *_: cam(n, -1, maps, slopes),
    ),
    "attention_grad_cam-layer": (
        lambda m, n: xv.attention_grad_cam(m, query=n.query, layer=0),
        lambda n, maps, slopes, *_: cam(n, 0, maps, slopes),
    ),
    "grad_sam": (
        lambda m, n: xv.grad_sam(m),
        lambda n, maps, slopes, *_: column_mean(
            n, relu(maps * slopes).mean(axis=1)
        ).mean(axis=0),
    ),
    "attcat": (
        lambda m, n: xv.attcat(m),
        lambda n, maps, _, streams, moves: (
            column_mean(n, maps.mean(axis=1)) * (streams * moves).sum(axis=-1)
        ).sum(axis=0),
    ),
}


def test_networks_are_what_they_are_for():
    """Windows are told by the site, not by a mask, and maps by queries and keys."""
    for network in NETWORKS.values():
        x, scalar = jnp.float32(network.input()), lambda logits: logits[0]
        run = lambda x, n=network, s=scalar: layers.capture(n, (x,), s)[1]
        read = jax.eval_shape(lambda x, run=run: [one.values for one in run(x)], x)
        for site in xv.tracing.sites(network, x):
            if site.kind == "attention":
                assert site.window == network.window
                assert bool(site.causal) == network.causal
        for values in read:
            assert ("probabilities" in values) == network.opaque
            masked = not (network.causal or network.window)
            assert ("remaining_mask" in values) == masked


def explained(network, target):
    """By every method, as one program."""
    every = lambda x: {
        method: make(network, network)(x, target=target)
        for method, (make, _) in METHODS.items()
    }
    return jax.jit(every)


@pytest.mark.parametrize("name", SHAPES)
def test_formulae(name):
    network = NETWORKS[name]
    x = jnp.float32(network.input())
    logits, truth = network(x), network.truth(1)
    for method, found in explained(network, 1)(x).items():
        _, formula = METHODS[method]
        expected = formula(network, *truth)
        atol = 2e-5 * np.abs(expected).max()
        np.testing.assert_allclose(
            found.scores, expected, atol=atol, rtol=2e-5, err_msg=method
        )
        np.testing.assert_allclose(found.output, logits[1], rtol=1e-5)
        assert not np.asarray(found.scores)[network.length :].any(), method


def fused(maps, heads: str | np.ndarray = "mean", discard=0.0):
    if isinstance(heads, str):
        maps = getattr(maps, heads)(axis=1)
    else:
        maps = np.einsum("lhqk,h->lqk", maps, heads)
    lowest = int(discard * maps[0].size)
    cuts = np.sort(maps.reshape(len(maps), -1), axis=-1)[:, lowest]
    return np.where(maps < cuts[:, None, None], 0, maps)


WEIGHTS = np.array([0.1, 0.4, 0.0, 0.3])
ROLLOUTS = {
    "weighted": ({"heads": WEIGHTS}, lambda m: rollout(fused(m, WEIGHTS), ..., 0.5)),
    "chefer2021": ({"convention": "chefer2021"}, lambda m: added(fused(m))),
    "vit_explain": (
        {"convention": "vit_explain"},
        lambda m: rollout(fused(m, discard=0.9), ..., 0.5),
    ),
    "discard, max, no residual": (
        {"discard_ratio": 0.3, "heads": "max", "residual": 0.0},
        lambda m: rollout(fused(m, "max", 0.3), ..., 0.0),
    ),
}


@pytest.mark.parametrize("small", [0, 8 * 2**20])
@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("weighted", "grouped, scanned"),
        ("weighted", "causal, four layers"),
        ("chefer2021", "padded"),
        ("chefer2021", "two layers"),
        ("vit_explain", "causal, four layers"),
        ("vit_explain", "grouped, scanned"),
        ("discard, max, no residual", "padded"),
        ("discard, max, no residual", "normalised after"),
    ],
)
def test_rollouts_by_convention(option, name, small, monkeypatch):
    """All rows at once, and the explained one alone."""
    for limit in ("_SMALL_MAP", "_FUSED_MAP"):
        monkeypatch.setattr(xv.attention.layers, limit, small)
    network, (options, formula) = NETWORKS[name], ROLLOUTS[option]
    x = jnp.float32(network.input())
    expected = formula(network.truth(0)[0])
    expected[network.length :] = 0
    every = jax.jit(xv.attention_rollout(network, query=None, **options))(x)
    one = jax.jit(xv.attention_rollout(network, query=network.query, **options))(x)
    np.testing.assert_allclose(every.scores, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        one.scores, expected[network.query], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        every.diagnostics["self_share"], np.diag(expected), rtol=1e-4, atol=1e-6
    )
    assert not np.asarray(every.scores)[network.length :].any()
    if network.causal:
        assert not np.triu(every.scores, 1).any()


@pytest.mark.parametrize("small", [0, 8 * 2**20])
def test_gradient_rollout_discards(small, monkeypatch):
    """Of maps and tile by tile; the cut is above zero, so that it takes something."""
    for limit in ("_SMALL_MAP", "_FUSED_MAP"):
        monkeypatch.setattr(xv.attention.layers, limit, small)
    network = NETWORKS["grouped, scanned"]
    maps, slopes, *_ = network.truth(1)
    kept = relu(fused(maps * slopes, discard=0.9))
    assert 0 < (kept > 0).mean() < 0.5 * (maps * slopes > 0).mean()
    ways = [
        {"residual": 0.01, "discard_ratio": 0.9},
        {"residual": 0.01, "convention": "vit_explain"},
        {"convention": "vit_explain"},
    ]

    @jax.jit
    def every(x):
        of = lambda options: xv.gradient_rollout(network, **options)(x, target=1)
        return [of(options).scores for options in ways]

    given, named, plain = every(jnp.float32(network.input()))
    expected = rollout(kept, network.query, 0.01)
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(named, given)
    expected = rollout(kept, network.query, 0.5)
    np.testing.assert_allclose(plain, expected, rtol=1e-4, atol=1e-6)


def test_self_is_excluded():
    network = NETWORKS["two layers"]
    x = jnp.float32(network.input())
    for query in (0, None):
        plain = xv.attention_rollout(network, query=query)(x)
        other = xv.attention_rollout(network, query=query, exclude_self=True)(x)
        both = np.atleast_2d(plain.scores), np.atleast_2d(other.scores)
        for a, b in zip(*both, strict=True):
            own = int(np.argmin(b))
            assert b[own] == 0
            np.testing.assert_allclose(
                np.delete(b, own), np.delete(a, own) / (1 - a[own]), rtol=1e-5
            )
        np.testing.assert_array_equal(
            plain.diagnostics["self_share"], other.diagnostics["self_share"]
        )


def test_padding_changes_nothing():
    network = NETWORKS["padded"]
    run = explained(network, 1)
    few, many = (run(jnp.float32(network.input(pad))) for pad in (1, 6))
    own = slice(network.length)
    for method, found in few.items():
        other = many[method].scores[own]
        np.testing.assert_allclose(
            found.scores[own], other, rtol=2e-5, atol=1e-7, err_msg=method
        )


EVERY = [name for name in dir(xv.attention) if name in methods()]


@pytest.mark.parametrize("method", EVERY)
def test_padding_has_nothing(method):
    """Tokens that no query may attend score exactly zero, and so do their rows.

    But what is no number is not taken for padding.
    """
    network = NETWORKS["padded"]
    x, real = jnp.float32(network.input()), network.length
    make, options = getattr(xv, method), [{}]
    if "query" in (known := inspect.signature(make).parameters):
        options.append({"query": "mean"})
        if type(None) in get_args(known["query"].annotation):
            options.append({"query": None})

    @jax.jit
    def every(x):
        of = lambda target: [make(network, **o)(x, target=target) for o in options]
        return [each.scores for each in jax.vmap(of)(jnp.arange(CLASSES))]

    for option, found in zip(options, map(np.asarray, every(x)), strict=True):
        assert not found[:, real:].any()
        assert found[:, :real].any()
        if option == {"query": None}:
            assert not found[:, :, real:].any()
            assert found[:, :real].any(axis=2).all()
    for found in every(x.at[0].set(jnp.nan)):
        assert np.isnan(found[:, :real]).all()


def test_tiles_are_the_map(monkeypatch):
    """Long maps are made again from queries and keys, and never read whole."""
    network = NETWORKS["two layers"]
    for limit in ("_SMALL_MAP", "_FUSED_MAP"):
        monkeypatch.setattr(xv.attention.layers, limit, 0)
    every = explained(network, 2)(jnp.float32(network.input()))
    truth = network.truth(2)
    for method, found in every.items():
        expected = METHODS[method][1](network, *truth)
        np.testing.assert_allclose(
            found.scores, expected, rtol=1e-4, atol=1e-6, err_msg=method
        )


def statistics(network, maps, pad):
    """Of the formulae, in float64; the last `pad` positions do not count."""
    length = maps.shape[-1]
    maps = maps[:, :, : length - pad]
    places = np.arange(length)
    far = np.abs(places[: maps.shape[2], None] - places)
    logs = np.log(np.where(maps > 0, maps, 1))
    strongest = maps.argmax(axis=-1)
    same = [
        [strongest[:, a] == strongest[:, b] for b in range(network.heads) if b != a]
        for a in range(network.heads)
    ]
    return {
        "entropy": -(maps * logs).sum(axis=-1).mean(axis=-1),
        "distance": (maps * far).sum(axis=-1).mean(axis=-1),
        "self_share": np.diagonal(maps, axis1=2, axis2=3).mean(axis=-1),
        "first_share": maps[..., 0].mean(axis=-1),
        "pad_leak": maps[..., length - pad :].sum(axis=-1).mean(axis=-1),
        "head_agreement": np.mean(same, axis=(0, 1, 3)),
        "top_keys": np.argsort(-maps, axis=-1)[..., :2],
        "top_weights": -np.sort(-maps, axis=-1)[..., :2],
    }


@pytest.mark.parametrize("small", [0, 8 * 2**20])
@pytest.mark.parametrize("name", NETWORKS)
def test_statistics(name, small, monkeypatch):
    """The last two positions are said to be padding; the model does not know."""
    for limit in ("_SMALL_MAP", "_FUSED_MAP"):
        monkeypatch.setattr(xv.attention.layers, limit, small)
    network = NETWORKS[name]
    pad = 0 if network.pad else 2
    says = lambda x: jnp.arange(len(x)) >= len(x) - pad
    explain = xv.attention_statistics(network, pad=says if pad else None, top_k=2)
    found = jax.jit(explain)(jnp.float32(network.input()))
    maps = network.truth(0)[0]
    received = maps[:, :, : network.length - pad].mean(axis=(0, 1, 2))
    np.testing.assert_allclose(found.scores, received, rtol=2e-5, atol=1e-7)
    expected = statistics(network, maps[:, :, : network.length], pad)
    for each, wanted in expected.items():
        got = found.diagnostics[each]
        if each.startswith("top"):
            got, wanted = (
                got[:, :, : wanted.shape[2]],
                np.where(
                    expected["top_weights"] > 0, wanted, -1 if each == "top_keys" else 0
                ),
            )
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-6, err_msg=each)


def test_statistics_refuse():
    network = Network()
    x = jnp.float32(network.input())
    with pytest.raises(ValueError, match="from 0 to 7 keys, got 8"):
        xv.attention_statistics(network, top_k=8)(x)
    with pytest.raises(ValueError, match=r"gives bool\[7\], got float32\[7, 8\]"):
        xv.attention_statistics(network, pad=lambda x: x)(x)


BY_HAND = {
    "raw_attention": {},
    "raw_attention, first": {"layer": 0},
    "grad_sam": {},
    "attention_grad_cam": {},
    "attention_grad_cam, first": {"layer": 0, "query": 1},
    "attcat": {},
    "gradient_rollout": {},
    "attention_relevance": {},
    "attention_statistics": {"top_k": 1},
}


def two_layers(x):
    first = jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0]]))
    second = jnp.array([[0.0, np.log(3)], [-1e9, 0.0]])
    for bias, factor in ((first, -1.0), (second, -2.0)):
        scores = (0.0 * x) @ x.T + bias
        x = x + jax.nn.softmax(scores) @ (x * factor)
    return x[0]


@pytest.fixture(scope="module")
def found():
    def every(x):
        of = lambda name: getattr(xv, name.partition(",")[0])
        return {
            name: of(name)(two_layers, **options)(x, target=0)
            for name, options in BY_HAND.items()
        }

    return jax.jit(every)(jnp.array([[2.0], [-4.0]]))


class TestByHand:
    """Two layers of one head over the tokens 2 and -4, of which the first is read.

    Maps A = [[3/4, 1/4], [1/2, 1/2]], then B = [[1/4, 3/4], [0, 1]]. The values of A
    are [-2, 4], and it adds [-1/2, 1]; the tokens are then [3/2, -3], and the values
    of B twice that, negative, [-3, 6]. The output is 3/2 - 3/4 + 9/2 = 21/4.

    Its gradient at B is [-3, 6] in the first row. At the tokens between it is
    [1 - 2/4, -3/2], and so at A [[-1, 2], [3, -6]]. Times the maps: of A
    [[-3/4, 1/2], [3/2, -3]], and of B [-3/4, 9/2].
    """

    def test_output(self, found):
        for each in found.values():
            np.testing.assert_allclose(each.output, 21 / 4, rtol=1e-6)

    def test_raw_attention(self, found):
        near(found["raw_attention"].scores, [1 / 4, 3 / 4])
        near(found["raw_attention, first"].scores, [3 / 4, 1 / 4])

    def test_grad_sam(self, found):
        """Columns of positive parts over 2 queries: [3/4, 1/4] and [0, 9/4]."""
        near(found["grad_sam"].scores, [3 / 8, 5 / 4])

    def test_attention_grad_cam(self, found):
        """Mean gradients are 3/2 in the first row of B, -3/2 in the second of A."""
        near(found["attention_grad_cam"].scores, [3 / 8, 9 / 8])
        assert not found["attention_grad_cam, first"].scores.any()

    def test_attcat(self, found):
        """Columns of maps, on average [5/8, 3/8] and [1/8, 7/8].

        The gradient at the tokens below is [1/2, -3/2] less that through A,
        [3/8 - 3/4, 1/8 - 3/4]: [7/8, -7/8]. Times the tokens: [7/4, 7/2], [3/4, 9/2].
        """
        near(found["attcat"].scores, [35 / 32 + 3 / 32, 21 / 16 + 63 / 16])

    def test_gradient_rollout(self, found):
        """Rows over their sums: [[2/3, 1/3], [3/5, 2/5]], and of B [2/11, 9/11]."""
        near(found["gradient_rollout"].scores, [101 / 165, 64 / 165])

    def test_attention_relevance(self, found):
        """[1, 9/2] times [[1, 1/2], [3/2, 1]]."""
        near(found["attention_relevance"].scores, [31 / 4, 5])

    def test_attention_statistics(self, found):
        near(found["attention_statistics"].scores, [3 / 8, 5 / 8])
        narrow = np.log(4) - 3 / 4 * np.log(3)
        expected = {
            "entropy": [[(narrow + np.log(2)) / 2], [narrow / 2]],
            "distance": [[3 / 8], [3 / 8]],
            "self_share": [[5 / 8], [5 / 8]],
            "first_share": [[5 / 8], [1 / 8]],
            "pad_leak": [[0], [0]],
            "top_weights": [[[[3 / 4], [1 / 2]]], [[[3 / 4], [1]]]],
            "head_agreement": [1, 1],
        }
        statistics = dict(found["attention_statistics"].diagnostics)
        top = np.asarray(statistics.pop("top_keys"))
        assert (top[0, 0, 0], *top[1, 0, :, 0]) == (0, 1, 1)
        assert set(statistics) == set(expected)
        for name, wanted in expected.items():
            near(statistics[name], wanted, err_msg=name)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (partial(xv.raw_attention, layer=2), "`layer` is from -2 to 1 for 2 layers"),
        (partial(xv.raw_attention, head=4), "`head` is from -4 to 3"),
        (partial(xv.raw_attention, query=7), "`query` is a position from -7 to 6"),
        (partial(xv.attention_grad_cam, layer=-3), "got -3"),
        (partial(xv.grad_sam, start_layer=2), "`start_layer` is from 0 to 1"),
    ],
)
def test_wrong_calls(make, said):
    network = NETWORKS["two layers"]
    with pytest.raises(ValueError, match=said):
        make(network)(jnp.float32(network.input()))


def test_wrong_options():
    x = jnp.float32(Network().input())
    with pytest.raises(ValueError, match="has 3 weights for layers of \\[4\\] heads"):
        xv.attention_rollout(Network(), heads=jnp.ones(3))(x)
    with pytest.raises(ValueError, match="one weight for each"):
        xv.attention_rollout(Network(), heads=jnp.ones((4, 1)))
    with pytest.raises(ValueError, match="less than 1, got 1"):
        xv.attention_rollout(Network(), discard_ratio=1)
    with pytest.raises(ValueError, match="got 'half'"):
        xv.attention_rollout(Network(), residual="half")  # pyright: ignore
    with pytest.raises(ValueError, match="got 'captum'"):
        xv.attention_rollout(Network(), convention="captum")  # pyright: ignore
    with pytest.raises(ValueError, match="less than 1, got 1"):
        xv.gradient_rollout(Network(), discard_ratio=1)
    with pytest.raises(ValueError, match="from 0 to 1, got 2"):
        xv.gradient_rollout(Network(), residual=2)
    with pytest.raises(ValueError, match="got 'chefer2021'"):
        xv.gradient_rollout(Network(), convention="chefer2021")  # pyright: ignore
    with pytest.raises(ValueError, match="got 'median'"):
        xv.raw_attention(Network(), heads="median")  # pyright: ignore


def test_attcat_needs_a_stream():
    model = lambda x: (jax.nn.softmax(x @ x.T) @ x)[0]
    with pytest.raises(ValueError, match="no residual stream"):
        xv.attcat(model)(jnp.ones((3, 2)))
