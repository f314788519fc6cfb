"""Value zeroing against every layer run again in float64, and by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import xviz_jax as xv
from tests.attention.test_methods import NETWORKS, SHAPES, Network
from tests.contract.quick import quick_compilation as quick_compilation


@dataclasses.dataclass(frozen=True)
class Marked(Network):
    """Layers say what they return."""

    def block(self, x, weights, added=None):
        """As a network's."""
        x, maps = super().block(x, weights, added)
        return checkpoint_name(x, "returned"), maps


def layer_of(network, number, maps, stream, zeroed=None):
    """What leaves one layer, without the values of one position."""
    own = {n: w[number] for n, w in network.weights().items() if n != "head"}
    length = len(stream)
    value = (stream @ own["value"]).reshape(length, network.groups, -1)
    value = np.repeat(value, network.heads // network.groups, axis=1)
    if zeroed is not None:
        value[zeroed] = 0
    mixed = np.einsum("hqk,khd->qhd", maps[number], value).reshape(length, -1)
    x = stream + mixed @ own["out"]
    if network.post:
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True))
    return np.tanh(x) + 0.1 * x


def cosine(a, b):
    size = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return 1 - (a * b).sum(axis=-1) / size


def euclidean(a, b):
    return np.linalg.norm(a - b, axis=-1)


def formula(network, distance=cosine):
    """Normalised scores of each layer, in float64."""
    maps, _, streams, _ = network.truth(0)
    found = []
    for number, stream in enumerate(streams):
        whole = layer_of(network, number, maps, stream)
        columns = [
            distance(whole, layer_of(network, number, maps, stream, zeroed))
            for zeroed in range(len(stream))
        ]
        scores = np.stack(columns, axis=-1)
        found.append(scores / scores.sum(axis=-1, keepdims=True))
    return found


def product(matrices):
    found = np.eye(len(matrices[0]))
    for matrix in matrices:
        found = matrix @ found
    return found


def of(network, **options):
    """A network with one layer has none to tell where the last ends."""
    if network.depth > 1:
        return xv.value_zeroing(network, **options)
    marked = Marked(**dataclasses.asdict(network))
    return xv.value_zeroing(marked, last="returned", **options)


@pytest.mark.parametrize("name", SHAPES)
def test_every_row_of_the_float64_product(name):
    network = NETWORKS[name]
    x = jnp.float32(network.input())
    found = jax.jit(of(network, query=None, chunk=4))(x)
    expected = product(formula(network))
    expected[network.length :] = 0
    real = np.arange(len(x)) < network.length
    np.testing.assert_allclose(found.scores, expected, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(found.diagnostics["mass"], real, rtol=1e-5)
    np.testing.assert_allclose(
        found.diagnostics["self_share"], np.diag(expected), rtol=2e-4, atol=1e-6
    )
    np.testing.assert_allclose(found.output, network(x).max(), rtol=1e-5)
    assert not np.asarray(found.scores)[~real].any()
    assert not np.asarray(found.scores)[:, ~real].any()
    # The model's, the layers' as they are, and without each position.
    assert found.diagnostics["evaluations"] == len(x) + 2
    if network.causal:
        assert not np.triu(found.scores, 1).any()


@pytest.mark.parametrize("name", ["two layers", "grouped, scanned"])
def test_one_row_one_layer_and_other_distances(name):
    network = NETWORKS[name]
    x = jnp.float32(network.input())
    plain, other = formula(network), formula(network, euclidean)

    def rows(x, query):
        row = lambda **options: xv.value_zeroing(network, **options)(x).scores
        return {
            "row": row(query=query, start_layer=1),
            "last": row(query=query, layer=-1),
            "first": row(query=query, layer=0, chunk=64),
            "euclidean": row(query=query, distance="euclidean"),
        }

    found = jax.jit(rows)(x, 2)
    expected = {
        "row": product(plain[1:]),
        "last": plain[-1],
        "first": plain[0],
        "euclidean": product(other),
    }
    for each, wanted in expected.items():
        np.testing.assert_allclose(
            found[each], wanted[2], rtol=2e-4, atol=1e-6, err_msg=each
        )


def test_two_layers_by_hand():
    """Two positions, one feature for each, uniform attention, the second layer causal.

    First layer: streams [1, 0] and [0, 1], values [1, 0] and [0, -1], so that both get
    [1/2, -1/2]: [3/2, -1/2] and [1/2, 1/2]. Without the first value the outputs are
    [1, -1/2] and [0, 1/2], without the second [3/2, 0] and [1/2, 1].
    """
    first = np.array([[3 / 2, -1 / 2], [1 / 2, 1 / 2]])
    without = [[[1, -1 / 2], [0, 1 / 2]], [[3 / 2, 0], [1 / 2, 1]]]
    moved = np.stack([cosine(first, np.array(w)) for w in without], axis=-1)
    below = moved / moved.sum(axis=-1, keepdims=True)
    # 1 - cos of [3, -1] with [2, -1], and with [1, 0]; of [1, 1] with [0, 1], [1, 2].
    np.testing.assert_allclose(
        moved,
        [
            [1 - 7 / np.sqrt(50), 1 - 3 / np.sqrt(10)],
            [1 - 1 / np.sqrt(2), 1 - 3 / np.sqrt(10)],
        ],
    )
    values = jnp.array([[1.0, 0.0], [0.0, -1.0]])

    def two_layers(x):
        for causal in (False, True):
            scores = (0.0 * x) @ x.T
            if causal:
                scores = jnp.where(jnp.tri(2) > 0, scores, -jnp.inf)
            x = x + jax.nn.softmax(scores) @ values
        return x[0]

    one = xv.value_zeroing(two_layers, query=None, layer=0)(jnp.eye(2))
    np.testing.assert_allclose(one.scores, below, rtol=1e-5)
    # At the top, the first position sees itself alone, and so what it saw below.
    both = xv.value_zeroing(two_layers)(jnp.eye(2))
    np.testing.assert_allclose(both.scores, below[0], rtol=1e-5)


def test_heads_mixed_after_the_softmax():
    """An output that is no plain product is made again without a column of the map."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(2, 3, 8, 8)) / 8**0.5
    mixing = np.array([[1.0, 0.5], [-0.5, 1.0]])

    def block(x, w, keep):
        xp = jnp if isinstance(x, jax.Array) else np
        split = lambda n: (x @ w[n].astype(x.dtype)).reshape(len(x), 2, -1)
        scores = xp.einsum("qhd,khd->hqk", split(0), split(1))
        if xp is np:
            maps = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
        else:
            maps = jax.nn.softmax(scores)
        maps = xp.einsum("hqk,hg->gqk", maps, mixing.astype(x.dtype))
        value = split(2) if keep is None else split(2) * keep[:, None, None]
        return xp.tanh(x + xp.einsum("hqk,khd->qhd", maps, value).reshape(x.shape))

    def model(x):
        for w in weights:
            x = block(x, w, None)
        return x[0]

    x, expected = Network().input(), []
    found = jax.jit(xv.value_zeroing(model, query=None))(jnp.float32(x))
    for w in weights:
        whole = block(x, w, None)
        moved = [cosine(whole, block(x, w, 1 - row)) for row in np.eye(len(x))]
        scores = np.stack(moved, axis=-1)
        expected.append(scores / scores.sum(axis=-1, keepdims=True))
        x = whole
    np.testing.assert_allclose(found.scores, product(expected), rtol=2e-4, atol=1e-6)


def test_padding_changes_nothing():
    network = NETWORKS["padded"]
    explain = jax.jit(xv.value_zeroing(network))
    few, many = (explain(jnp.float32(network.input(pad))).scores for pad in (1, 6))
    own = slice(network.length)
    np.testing.assert_allclose(few[own], many[own], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"distance": "manhattan"}, "got 'manhattan'"),
        ({"chunk": 0}, "`chunk` is a positive integer, got 0"),
        ({"query": 7}, "from -7 to 6, got 7"),
        ({"start_layer": 2}, "`start_layer` is from 0 to 1 for 2 layers, got 2"),
        ({"layer": 2}, "`layer` is from -2 to 1 for 2 layers, got 2"),
        ({"last": "end"}, "`last` names no site, got 'end'; there are "),
        ({"last": "attention"}, "is of kind 'attention'"),
    ],
)
def test_wrong_options(options, said):
    network = NETWORKS["two layers"]
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(
            lambda x: xv.value_zeroing(network, **options)(x).scores,
            jnp.float32(network.input()),
        )
