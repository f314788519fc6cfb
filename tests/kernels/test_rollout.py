"""`rollout_rows` and `rollout_full` against the float64 product of matrices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax.kernels.rollout_full import rollout_full
from xviz_jax.kernels.rollout_rows import rollout_rows

STRIPS: Any = dict(block_b=1, block_h=1, block_q=10)


def close(got, want, tolerance=3e-6):
    want = np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(np.asarray(got) - want).max() <= tolerance * np.abs(want).max()


def stack(oracle, layers=3, **shape):
    """Stacked arrays, and the same as one dict a layer for the oracle."""
    xs = [oracle.make(seed=seed, **shape) for seed in range(layers)]
    stacked = {
        name: np.stack([getattr(x, name) for x in xs])
        for name in ("q", "k", "v", "dout")
    }
    return stacked, xs


def rollout(qs, ks, rows, **options):
    return jax.jit(lambda qs, ks: rollout_rows(qs, ks, rows, **options))(qs, ks)


def arguments(stacked, relevance):
    options: Any = dict(relevance=relevance)
    if relevance != "attention":
        options |= dict(vs=stacked["v"], douts=stacked["dout"])
    return (stacked["q"], stacked["k"]), options


CASES = [
    ("half", "attention", "mean", {}),
    ("half", "attention", "mean", dict(causal=True)),
    ("add", "relu_gradient_x_attention", "mean", dict(causal=True, window=(9, None))),
    ("add", "gradient_x_attention", "mean", dict(window=(8, 5), softcap=2.0)),
    ("normalize", "attention", "mean", {}),
    ("normalize", "attention", "max", dict(causal=True)),
    ("normalize", "relu_gradient_x_attention", "min", {}),
    ("none", "attention", "sum", {}),
]


@pytest.mark.parametrize("residual,relevance,fusion,mask", CASES)
def test_equals_the_product_of_matrices(oracle, residual, relevance, fusion, mask):
    stacked, xs = stack(oracle, batch=(2,), nq=33, heads=4, kv_heads=2)
    names = ("q", "k") if relevance == "attention" else ("q", "k", "v", "dout")
    layers = [
        {name: getattr(x, name) for name in names}
        | dict(relevance=relevance, head_fusion=fusion, **mask)
        for x in xs
    ]
    want = oracle.rollout(layers, residual)
    arrays, options = arguments(stacked, relevance)
    options |= dict(residual=residual, head_fusion=fusion, **mask)

    @jax.jit
    def both(q, k):
        rows = rollout_rows(q, k, [0, -1, 5], config=STRIPS, **options)
        return rows, rollout_full(q, k, config=STRIPS, **options)

    (rows, mass), full = both(*arrays)
    close(full, want)
    close(rows, want[:, [0, 32, 5]])
    close(mass, want[:, [0, 32, 5]].sum(-1))
    if residual in ("half", "normalize"):
        stochastic = relevance == "attention" and fusion == "mean"
        if residual == "normalize" or stochastic:
            np.testing.assert_allclose(np.asarray(mass), 1, atol=1e-5)


def test_reference_is_the_product_of_matrices(oracle):
    stacked, xs = stack(oracle, nq=9)
    want = oracle.rollout([dict(q=x.q, k=x.k) for x in xs], "half")
    q, k = stacked["q"], stacked["k"]
    rows, _ = rollout(q, k, rows=[2], implementation="reference")
    close(rows, want[[2]])
    full = functools.partial(rollout_full, implementation="reference")
    close(jax.jit(full)(q, k), want)


def test_twelve_layers_stay_within_a_millionth(oracle):
    stacked, xs = stack(oracle, layers=12, nq=197, heads=3, dim=64)
    want = oracle.rollout([dict(q=x.q, k=x.k) for x in xs], "half")
    rows, mass = rollout(stacked["q"], stacked["k"], rows=[0])
    close(rows, want[[0]], 1e-6)
    np.testing.assert_allclose(np.asarray(mass), 1, atol=1e-5)


def test_sequence_of_layers_equals_their_stack(oracle):
    stacked, xs = stack(oracle, batch=(2,), nq=20, heads=4, kv_heads=2)
    qs, ks = [x.q for x in xs], [x.k for x in xs]
    rows, _ = rollout(qs, ks, rows=[3], causal=True)
    of_stack, _ = rollout(stacked["q"], stacked["k"], rows=[3], causal=True)
    close(rows, of_stack)


def test_layers_may_differ(oracle):
    shapes = [dict(heads=2), dict(heads=4, kv_heads=2, dim=8), dict(heads=3)]
    windows = [(4, None), None, (2, None)]
    xs = [oracle.make(nq=16, seed=n, **shape) for n, shape in enumerate(shapes)]
    layers = [
        dict(q=x.q, k=x.k, causal=True, window=window)
        for x, window in zip(xs, windows, strict=True)
    ]
    want = oracle.rollout(layers, "half")
    arrays = ([x.q for x in xs], [x.k for x in xs])
    options: Any = dict(
        causal=True, per_layer=[dict(window=window) for window in windows]
    )
    rows, _ = rollout(*arrays, rows=[15, 0], **options)
    close(rows, want[[15, 0]])
    close(jax.jit(functools.partial(rollout_full, **options))(*arrays), want)


def test_head_weights_and_lses_have_a_layer_axis(oracle):
    stacked, xs = stack(oracle, nq=12, heads=2)
    weights = np.asarray([[0.5, 0.5], [1.0, -0.3], [0.2, 0.1]], np.float32)
    layers = [
        dict(q=x.q, k=x.k, head_fusion="weighted", head_weights=w)
        for x, w in zip(xs, weights, strict=True)
    ]
    rows, _ = rollout(
        stacked["q"],
        stacked["k"],
        rows=[1],
        residual="add",
        head_fusion="weighted",
        head_weights=weights,
        lses=np.stack([oracle.lse(x.q, x.k) for x in xs]).astype(np.float32),
    )
    close(rows, oracle.rollout(layers, "add")[[1]])


def test_rows_of_each_example_and_weights_over_rows(oracle):
    stacked, _ = stack(oracle, batch=(3,), nq=14)
    q, k = stacked["q"], stacked["k"]

    @jax.jit
    def all_ways(q, k, own):
        weights = jnp.full((3, 1, 14), 1 / 14)
        return (
            rollout_full(q, k),
            rollout_rows(q, k, own)[0],
            rollout_rows(q, k, weights)[0],
        )

    own = jnp.int32([[13], [2], [-3]])
    full, rows, mean = all_ways(q, k, own)
    close(rows[:, 0], full[np.arange(3), [13, 2, 11]])
    close(mean[:, 0], full.mean(1))


def test_padding_changes_nothing(oracle):
    stacked, _ = stack(oracle, nq=14, heads=2)
    short = {name: x[:, :10] for name, x in stacked.items()}
    # What a model leaves in padding is often not a number.
    stacked["q"][1:, 10:] = np.nan
    stacked["k"][1:, 10:] = np.nan
    key_mask = np.arange(14) < 10
    for residual in ("half", "normalize"):
        options: Any = dict(residual=residual)
        rows, _ = rollout(short["q"], short["k"], rows=[9], **options)
        padded, mass = rollout(
            stacked["q"], stacked["k"], rows=[9], key_mask=key_mask, **options
        )
        close(padded[:, :10], rows)
        assert (np.asarray(padded[:, 10:]) == 0).all()
        np.testing.assert_allclose(np.asarray(mass), 1, atol=1e-5)


def test_discard_ratio_zeroes_the_lowest_entries(oracle):
    stacked, xs = stack(oracle, nq=20)
    layers = []
    for x in xs:
        ordered = np.sort(oracle.fused(x.q, x.k, head_fusion="max").ravel())
        # Halfway to the entry before, where rounding cannot reach.
        threshold = ordered[359:361].mean()
        layers.append(dict(q=x.q, k=x.k, head_fusion="max", threshold=threshold))
    options: Any = dict(residual="normalize", head_fusion="max", discard_ratio=0.9)
    q, k = stacked["q"], stacked["k"]
    rows, mass = rollout(q, k, rows=[0], **options)
    want = oracle.rollout(layers, "normalize")
    close(rows, want[[0]])
    close(jax.jit(functools.partial(rollout_full, **options))(q, k), want)
    np.testing.assert_allclose(np.asarray(mass), 1, atol=1e-5)


def test_heads_may_be_permuted_and_a_causal_prefix_stands_alone(oracle):
    stacked, _ = stack(oracle, nq=24, heads=4)
    q, k = stacked["q"], stacked["k"]
    options: Any = dict(rows=[11], causal=True)
    rows, _ = rollout(q, k, **options)
    permuted = (x[:, :, [2, 0, 3, 1]] for x in (q, k))
    close(rollout(*permuted, **options)[0], rows)
    close(rows[:, :12], rollout(q[:, :12], k[:, :12], **options)[0])


def test_gradient_and_vmap_and_shard_map(oracle):
    stacked, _ = stack(oracle, batch=(4,), nq=16)
    q, k = stacked["q"], stacked["k"]
    score = lambda implementation, q: rollout_rows(
        q, k, [0], residual="normalize", implementation=implementation, causal=True
    )[0][..., 3].sum()
    got, want = (
        jax.jit(jax.grad(functools.partial(score, how)))(q)
        for how in ("xla", "reference")
    )
    close(got, want, 1e-5)
    strips = functools.partial(rollout_rows, rows=[0, 3], config=STRIPS)
    batched, _ = jax.jit(strips)(q, k)
    mapped, _ = jax.jit(jax.vmap(strips, 1))(q, k)
    close(mapped, batched)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        strips, mesh=mesh, in_specs=P(None, "data"), out_specs=P("data")
    )
    close(jax.jit(sharded)(q, k)[0], batched)


def test_a_traced_row_out_of_range_is_not_a_number(oracle):
    stacked, _ = stack(oracle, nq=6)
    traced = jax.jit(lambda rows: rollout_rows(stacked["q"], stacked["k"], rows))
    rows, mass = traced(jnp.int32([5, 6, -6, -7]))
    np.testing.assert_array_equal(np.isnan(mass), [False, True, False, True])
    assert np.isnan(rows[1]).all()


def test_bad_input_says_what_was_got_and_wanted(oracle):
    stacked, _ = stack(oracle, layers=2, nq=7, heads=2)
    q, k = stacked["q"], stacked["k"]

    def fails(error, text, *arguments, **options):
        with pytest.raises(error, match=text):
            rollout_rows(*arguments, **options)

    fails(ValueError, r"rows of 7 tokens, got \[7, -8\]", q, k, [0, 7, -8])
    fails(ValueError, "rows is empty", q, k, np.zeros(0, int))
    fails(ValueError, r"rows wants shape \('M',\)", q, k, np.zeros((2, 1), int))
    fails(TypeError, "rows wants integers", q, k, np.ones(7, bool))
    fails(ValueError, "residual wants one of", q, k, [0], residual="mean")
    fails(ValueError, "discard_ratio wants", q, k, [0], discard_ratio=1.0)
    fails(ValueError, "of 2 layers", q, k[:1], [0])
    fails(ValueError, "ks wants an array", q, list(k), [0])
    fails(ValueError, "per_layer wants", q, k, [0], per_layer=[{}, {}])
    fails(ValueError, "as many queries as keys", q, k[:, :5], [0])
    fails(ValueError, "both v and dout", q, k, [0], relevance="gradient_x_attention")
