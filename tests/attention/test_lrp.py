"""Relevance by edited gradients, against rules written out and against conservation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax.attention.relevance_rules import propagating

WIDTH, HEADS, LENGTH = 8, 2, 5


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape) / shape[0] ** 0.5


X = draw(0, LENGTH, WIDTH) * 2
NAMES = ("query", "key", "value", "out", "up", "gate", "down")
LAYERS = [
    {name: draw(10 * layer + n, WIDTH, WIDTH) for n, name in enumerate(NAMES)}
    for layer in (1, 2)
]
HEAD = draw(99, WIDTH, 3)


def rms(x):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def layer_norm(x):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.var(x, axis=-1, keepdims=True) + 1e-6)


def gated(x, w):
    return (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]


def plain(activation):
    return lambda x, w: activation(x @ w["up"]) @ w["down"]


def block(x, w, norm=rms, mlp=gated):
    split = lambda name, h: (h @ w[name]).reshape(len(h), HEADS, -1)
    h = norm(x)
    scores = jnp.einsum("qhd,khd->hqk", split("query", h), split("key", h)) / 2
    scores = jnp.where(jnp.tril(jnp.ones((len(x), len(x)), bool)), scores, -jnp.inf)
    mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), split("value", h))
    x = x + mixed.reshape(x.shape) @ w["out"]
    return x + mlp(norm(x), w)


def network(x, **options):
    for w in LAYERS:
        x = block(x, jax.tree.map(lambda a, x=x: jnp.asarray(a, x.dtype), w), **options)
    norm = options.get("norm", rms)
    return norm(x)[-1] @ jnp.asarray(HEAD, x.dtype)


def scanned(x, wrap=lambda f: f):
    stack = jax.tree.map(lambda *a: jnp.asarray(np.stack(a), x.dtype), *LAYERS)
    step = wrap(lambda x, w: (block(x, w), None))
    return rms(jax.lax.scan(step, x, stack)[0])[-1] @ jnp.asarray(HEAD, x.dtype)


class Rules:
    """Relevance of one block and the head in numpy, by the formulae of the papers."""

    def __init__(self, conservative):
        self.conservative = conservative

    @staticmethod
    def linear(x, w, relevance):
        """R_i = x_i sum_j w_ij R_j / z_j."""
        return x * ((relevance / (x @ w)) @ w.T)

    def softmax(self, scores, probabilities, relevance):
        """R_i = x_i (R_i - s_i sum_j R_j), masked scores having none."""
        finite = np.where(np.isfinite(scores), scores, 0)
        total = relevance.sum(axis=-1, keepdims=True)
        return finite * (relevance - probabilities * total)

    def attention(self, h, w, relevance):
        split = lambda x: x.reshape(LENGTH, HEADS, -1).transpose(1, 0, 2)
        join = lambda x: x.transpose(1, 0, 2).reshape(LENGTH, WIDTH)
        query, key, value = (split(h @ w[n]) for n in ("query", "key", "value"))
        scores = query @ key.transpose(0, 2, 1) / 2
        scores = np.where(np.tril(np.ones((LENGTH, LENGTH))), scores, -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p = p / p.sum(axis=-1, keepdims=True)
        mixed = p @ value
        share = split(self.linear(join(mixed), w["out"], relevance)) / mixed
        of_value = value * (p.transpose(0, 2, 1) @ share)
        if self.conservative:
            return self.linear(h, w["value"], join(of_value))
        of_map = p * (share @ value.transpose(0, 2, 1)) / 2
        of_scores = self.softmax(scores, p, of_map)
        share = of_scores / np.where(np.isfinite(scores), scores, 1) / 2
        of_query = query * (share @ key) / 2
        of_key = key * (share.transpose(0, 2, 1) @ query) / 2
        of_value = of_value / 2
        parts = (("query", of_query), ("key", of_key), ("value", of_value))
        return sum(self.linear(h, w[n], join(part)) for n, part in parts)

    def gated(self, h, w, relevance):
        gate, up = h @ w["gate"], h @ w["up"]
        product = gate / (1 + np.exp(-gate)) * up
        part = self.linear(product, w["down"], relevance)
        if self.conservative:
            return self.linear(h, w["up"], part)
        return self.linear(h, w["gate"], part / 2) + self.linear(h, w["up"], part / 2)

    def __call__(self, x, target):
        """Sums share relevance by what each part contributes; norms pass it on."""
        norm = lambda x: x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)
        as_float = lambda a: np.asarray(a, np.float64)
        w = LAYERS[0]
        middle = as_float(x + self.forward_attention(norm(x), w))
        gate = norm(middle) @ w["gate"]
        mlp = (gate / (1 + np.exp(-gate)) * (norm(middle) @ w["up"])) @ w["down"]
        last = middle + mlp
        relevance = np.zeros_like(last)
        relevance[-1] = norm(last)[-1] * HEAD[:, target]
        into_mlp = self.gated(norm(middle), w, relevance * mlp / last)
        relevance = relevance * middle / last + into_mlp
        mixed = middle - x
        into_attention = self.attention(norm(x), w, relevance * mixed / middle)
        return relevance * x / middle + into_attention

    def forward_attention(self, h, w):
        split = lambda x: x.reshape(LENGTH, HEADS, -1).transpose(1, 0, 2)
        query, key, value = (split(h @ w[n]) for n in ("query", "key", "value"))
        scores = query @ key.transpose(0, 2, 1) / 2
        scores = np.where(np.tril(np.ones((LENGTH, LENGTH))), scores, -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p = p / p.sum(axis=-1, keepdims=True)
        return (p @ value).transpose(1, 0, 2).reshape(LENGTH, WIDTH) @ w["out"]


@pytest.mark.parametrize("conservative", [False, True])
@pytest.mark.parametrize("target", range(3))
def test_rules_written_out(conservative, target):
    """Each rule in numpy and float64, of one layer with a gate and causal maps."""
    method = xv.cp_lrp if conservative else xv.attn_lrp
    one = lambda x: rms(block(x, jax.tree.map(jnp.asarray, LAYERS[0])))[-1] @ HEAD
    with jax.enable_x64(True):
        found = jax.jit(lambda x: method(one)(x, target=target))(jnp.asarray(X))
    expected = Rules(conservative)(X, target)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.scores, expected, atol=1e-5 * scale)
    np.testing.assert_allclose(found.output, one(jnp.asarray(X))[target], rtol=1e-5)


ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu-tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "elu": jax.nn.elu,
    "leaky": jax.nn.leaky_relu,
    "mish": jax.nn.mish,
    "squared relu": lambda x: jax.nn.relu(x) ** 2,
    "hard swish": jax.nn.hard_swish,
}
NORMS = {
    "rms": rms,
    "layer": layer_norm,
    "flax": lambda x: nnx.LayerNorm(WIDTH, use_bias=False, rngs=nnx.Rngs(0))(x),
    "length": lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
    "standardized": lambda x: jax.nn.standardize(x),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_conservation_through_activations(activation):
    """What is conserved without biases, and without softmaxes in the way."""
    model = lambda x: network(x, mlp=plain(ACTIVATIONS[activation]))
    found = jax.jit(lambda x: xv.cp_lrp(model)(x, target=1))(jnp.float32(X))
    np.testing.assert_allclose(found.output, model(jnp.float32(X))[1], rtol=1e-4)
    np.testing.assert_allclose(found.scores.sum(), found.output, rtol=2e-4, atol=1e-5)
    assert found.diagnostics["conserved"] == found.scores.sum()


@pytest.mark.parametrize("norm", NORMS)
def test_conservation_through_norms(norm):
    model = lambda x: network(x, norm=NORMS[norm])
    found = jax.jit(lambda x: xv.cp_lrp(model)(x, target=2))(jnp.float32(X))
    np.testing.assert_allclose(found.scores.sum(), found.output, rtol=2e-4, atol=1e-5)


def test_products_share():
    """Three factors: a half to the last, a quarter to each of the first two."""
    model = lambda x: (x[0] * x[1] * x[2])[None]
    scores = xv.attn_lrp(model)(jnp.array([2.0, 3.0, 5.0])).scores
    np.testing.assert_allclose(scores, [7.5, 7.5, 15.0])


@pytest.mark.parametrize("method", [xv.attn_lrp, xv.cp_lrp])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit])
def test_loops_are_their_layers(method, wrap):
    x = jnp.float32(X)
    rolled = method(lambda x: scanned(x, wrap))(x, target=0).scores
    flat = method(network)(x, target=0).scores
    np.testing.assert_allclose(rolled, flat, rtol=1e-4, atol=1e-5)


def test_values_stay_as_they_are():
    edited = propagating(network, jnp.float32(X), conservative=False)
    np.testing.assert_array_equal(
        jax.jit(edited)(jnp.float32(X)), jax.jit(network)(jnp.float32(X))
    )


def test_biases_take_their_part():
    """z = 2 * 3 + 4: of the relevance tanh(z), six tenths reach the input."""
    model = lambda x: jnp.tanh(2 * x + jnp.array([4.0]))
    found = xv.attn_lrp(model)(jnp.array([3.0]))
    np.testing.assert_allclose(found.scores, 0.6 * found.output, rtol=1e-6)


def test_tokens_and_branches():
    table = jnp.float32(draw(5, 7, WIDTH))
    tokens = jnp.array([1, 6, 2])
    model = lambda t: network(table[t])
    found = xv.attn_lrp(model)(tokens, target=1)
    rows = xv.attn_lrp(network)(table[tokens], target=1).scores
    np.testing.assert_allclose(found.scores, rows.sum(axis=1), rtol=1e-4, atol=1e-6)
    branch = lambda x, on: jax.lax.cond(on, jnp.tanh, lambda x: x * 3, x)
    both = [xv.attn_lrp(branch)(jnp.ones(2), on).scores for on in (True, False)]
    np.testing.assert_allclose(both[0], [np.tanh(1), 0], rtol=1e-6)
    np.testing.assert_allclose(both[1], [3.0, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda x: jnp.sort(x), "no rule for 'sort'"),
        (lambda x: x / x[::-1], "quotient of two arrays"),
        (lambda x: jax.lax.while_loop(lambda x: x[0] < 1, lambda x: 2 * x, x), "while"),
        (lambda x: jnp.cumprod(x), "no rule for"),
    ],
)
def test_what_has_no_rule_is_named(model, said):
    with pytest.raises(ValueError, match=said):
        xv.attn_lrp(model)(jnp.ones(3), target=0)


def test_what_the_output_does_not_need_needs_no_rule():
    model = lambda x: jax.nn.softmax(x) + 0 * jax.lax.stop_gradient(jnp.sort(x))
    assert xv.attn_lrp(model)(jnp.arange(3.0), target=0).scores.any()
