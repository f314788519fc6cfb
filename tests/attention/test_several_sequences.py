"""Methods over several sequences, against their definitions over all positions."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import xviz_jax as xv
from tests.attention.test_attention_flow import flows
from tests.attention.test_co_attention import (
    HEAD,
    HEADS,
    WIDTH,
    CoAttention,
    EncoderDecoder,
    X,
    attend,
    cast,
    draw,
    maps_and_slopes,
    mlp,
    norm,
    of_both,
    query_of,
    weights,
)
from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax.attention import layers, masking

MODELS = {
    "encoder and decoder": EncoderDecoder(),
    "padded, looped": EncoderDecoder(pad=2, scan=True),
    "of one length": EncoderDecoder(own=5, other=5),
    "co-attention": CoAttention(),
    "co-attention of one length, looped": CoAttention(own=5, other=5, scan=True),
}
MODEL = MODELS["encoder and decoder"]


TILED = ("padded, looped", "co-attention")
every_model = pytest.mark.parametrize(
    ("name", "held"),
    [*((name, "map") for name in MODELS), *((name, "tiles") for name in TILED)],
    indirect=["held"],
)


@pytest.fixture(params=["map", "tiles"])
def held(request, monkeypatch):
    """Maps are read of the model, or made again of queries and keys."""
    if request.param == "tiles":
        for limit in ("_SMALL_MAP", "_FUSED_MAP"):
            monkeypatch.setattr(xv.attention.layers, limit, 0)


def inputs(model):
    return tuple(map(jnp.float32, model.inputs()))


def places(model):
    """Of each sequence, its positions among all."""
    own, other = np.arange(model.own), np.arange(model.other)
    return {"own": own, "other": model.own + other}


def pairs(model):
    """The sequences of the queries and of the keys of each layer."""
    return [pair for group in model.groups for pair in group]


def steps(model, fused, kept, mixed, normalize=True, start=0, through=1.0):
    """Layers that run at once as one matrix over all positions, first ones first.

    Args:
      model: Which.
      fused: A matrix for each layer.
      kept: Of the identity.
      mixed: Of attention.
      normalize: Whether rows are divided by their sums.
      start: The first layer taken along.
      through: What goes from a position to itself where nothing is written.
    """
    at, number = places(model), 0
    length = model.own + model.other
    for group in model.groups:
        step = through * np.eye(length)
        for query, key in group:
            if number >= start:
                rows = kept * np.eye(length)[at[query]]
                rows[:, at[key]] += mixed * fused[number]
                total = rows.sum(axis=-1, keepdims=True)
                if normalize:
                    rows = rows / np.where(total == 0, 1, total)
                step[at[query]] = rows
            number += 1
        yield step


def product(model, fused, kept, mixed, **options):
    found = np.eye(model.own + model.other)
    for step in steps(model, fused, kept, mixed, **options):
        found = step @ found
    return found[: model.own]


def discarded(fused, ratio):
    lowest = np.sort(fused, axis=None)[int(ratio * fused.size)]
    return np.where(fused < lowest, 0, fused)


def check(model, scores, expected, rtol=2e-5, atol=1e-6):
    own, other = of_both(model, scores)
    first, second = expected[..., : model.own], expected[..., model.own :]
    np.testing.assert_allclose(own, first, rtol=rtol, atol=atol)
    np.testing.assert_allclose(other, second, rtol=rtol, atol=atol)
    if getattr(model, "pad", 0):
        assert not np.asarray(other)[..., -model.pad :].any()
    assert np.abs(other).max() > 1e-3


@every_model
def test_rollout(name, held):
    model = MODELS[name]
    maps, _ = maps_and_slopes(model, 0)
    explain = jax.jit(xv.attention_rollout(model, query=query_of(model)))
    found = explain(*inputs(model))
    expected = product(model, [each.mean(axis=0) for each in maps], 0.5, 0.5)
    check(model, found.scores, expected[query_of(model)])
    np.testing.assert_allclose(found.diagnostics["mass"], 1, rtol=1e-6)
    own = expected[query_of(model), query_of(model) % model.own]
    np.testing.assert_allclose(found.diagnostics["self_share"], own, rtol=2e-5)
    logits = jax.jit(model)(*inputs(model))
    np.testing.assert_allclose(found.output, logits.max(), rtol=1e-5)


def fused_by(maps, heads, ratio):
    if not isinstance(heads, str):
        return [np.einsum("h,hqk->qk", np.asarray(heads), each) for each in maps]
    fuse = {"mean": np.mean, "max": np.max}[heads]
    return [discarded(fuse(each, axis=0), ratio) for each in maps]


@pytest.mark.parametrize(
    ("options", "kept", "mixed"),
    [
        ({"heads": "max", "residual": 0.1}, 0.1, 0.9),
        ({"discard_ratio": 0.4, "residual": 0.0}, 0.0, 1.0),
        ({"convention": "chefer2021"}, 1.0, 1.0),
        ({"heads": jnp.array([0.75, 0.5])}, 0.5, 0.5),
    ],
)
@pytest.mark.parametrize("name", ["padded, looped", "co-attention"])
def test_options_of_rollout(name, options: dict[str, Any], kept, mixed, held):
    model = MODELS[name]
    maps, _ = maps_and_slopes(model, 0)
    ratio = options.get("discard_ratio", 0.0)
    fused = fused_by(maps, options.get("heads", "mean"), ratio)
    start = 4
    explain = xv.attention_rollout(model, query=0, start_layer=start, **options)
    found = jax.jit(explain)(*inputs(model))
    normalize = "convention" not in options
    expected = product(model, fused, kept, mixed, normalize=normalize, start=start)
    check(model, found.scores, expected[0])


def test_rows_of_rollout():
    """All at once, one by one, weighed, by name, and without the position itself."""
    model, x = MODELS["padded, looped"], inputs(MODELS["padded, looped"])
    maps, _ = maps_and_slopes(model, 0)
    expected = product(model, [each.mean(axis=0) for each in maps], 0.5, 0.5)
    every = xv.attention_rollout(model, query=None)(*x)
    check(model, every.scores, expected)
    np.testing.assert_allclose(every.diagnostics["mass"], np.ones(model.own), rtol=1e-6)
    encoder, decoder = every.scores
    np.testing.assert_allclose(
        every.diagnostics["self_share"], np.diag(every.scores[decoder]), rtol=1e-6
    )
    share = jnp.linspace(0, 1, model.own)
    check(model, xv.attention_rollout(model, query=share)(*x).scores, share @ expected)
    mean = xv.attention_rollout(model, query="mean")(*x)
    check(model, mean.scores, expected.mean(axis=0))
    named = xv.attention_rollout(model, query={decoder: 2})(*x)
    check(model, named.scores, expected[2])
    with pytest.raises(ValueError, match=r"no attention leads .* to \['attention"):
        xv.attention_rollout(model, query={encoder: 0})(*x)
    other = xv.attention_rollout(model, query=2, exclude_self=True)(*x)
    without = np.where(np.arange(expected.shape[1]) == 2, 0, expected[2])
    check(model, other.scores, without / without.sum())
    np.testing.assert_allclose(other.diagnostics["self_share"], expected[2, 2])
    with pytest.raises(ValueError, match="needs one position, got several"):
        xv.attention_rollout(model, query={decoder: share}, exclude_self=True)


def test_rows_that_the_output_pools():
    def mean(x, source):
        memory = mlp(source + attend(cast(weights(1), x), source, source))
        x = mlp(x + attend(cast(weights(2), x), x, x))
        return jnp.mean(mlp(x + attend(cast(weights(3), x), x, memory)), axis=0)

    x = inputs(MODEL)
    pooled = xv.attention_rollout(mean, query="pooled")(*x)
    given = xv.attention_rollout(mean, query="mean")(*x)
    for one, two in zip(pooled.scores.values(), given.scores.values(), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


@pytest.mark.parametrize("name", ["padded, looped", "co-attention"])
@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_gradient_rollout(name, ratio, held):
    model = MODELS[name]
    fused = [
        np.maximum(discarded((maps * slopes).mean(axis=0), ratio), 0)
        for maps, slopes in zip(*maps_and_slopes(model, 1), strict=True)
    ]
    options = {"query": query_of(model), "discard_ratio": ratio, "residual": 0.05}
    explain = xv.gradient_rollout(model, **options)
    found = jax.jit(partial(explain, target=1))(*inputs(model))
    expected = product(model, fused, 0.05, 0.95)
    check(model, found.scores, expected[query_of(model)], rtol=1e-4)
    np.testing.assert_allclose(found.diagnostics["mass"], 1, rtol=1e-5)


@every_model
def test_flow(name, held):
    model = MODELS[name]
    maps, _ = maps_and_slopes(model, 0)
    fused = [each.mean(axis=0) for each in maps]
    # Where nothing is written, more could pass than ever comes.
    widths = np.stack(list(steps(model, fused, 0.3, 0.7, through=1.5)))
    query = query_of(model) % model.own
    explain = xv.attention_flow(model, query=query_of(model), residual=0.3)
    found = jax.jit(explain)(*inputs(model))
    expected = flows(widths, query)
    check(model, found.scores, expected / expected.sum(), rtol=1e-5)
    flow = {name: found.diagnostics[f"flow/{name}"] for name in found.scores}
    check(model, flow, expected, rtol=1e-5)
    assert found.diagnostics["optimality_gap"] < 1e-6
    own = of_both(model, found.scores)[0][query]
    np.testing.assert_allclose(found.diagnostics["self_share"], own)


def test_flow_of_every_row():
    model = MODELS["padded, looped"]
    explain = lambda query: jax.jit(xv.attention_flow(model, query=query))
    every = explain(None)(*inputs(model))
    for row in range(model.own):
        one = explain(row)(*inputs(model))
        for name, scores in one.scores.items():
            np.testing.assert_allclose(every.scores[name][row], scores, atol=1e-6)


def by_keys(model, given, combine):
    """What each sequence gets as keys, of all the layers that attend to it."""
    found = {"own": [], "other": []}
    for (_, key), row in zip(pairs(model), given, strict=True):
        found[key].append(row)
    both = [combine(found[name], axis=0) for name in ("own", "other")]
    return np.concatenate(both)


@every_model
def test_grad_sam(name, held):
    model = MODELS[name]
    given = []
    padding = getattr(model, "pad", 0)
    for (query, _), maps, slopes in zip(
        pairs(model), *maps_and_slopes(model, 2), strict=True
    ):
        counted = (maps * np.maximum(slopes, 0)).mean(axis=0)
        last = len(counted) - (padding if query == "other" else 0)
        given.append(counted[:last].mean(axis=0))
    found = jax.jit(partial(xv.grad_sam(model), target=2))(*inputs(model))
    check(model, found.scores, by_keys(model, given, np.mean))
    late = jax.jit(partial(xv.grad_sam(model, start_layer=5), target=2))(*inputs(model))
    if isinstance(model, EncoderDecoder):
        own, other = of_both(model, late.scores)
        assert not own.any()
        np.testing.assert_allclose(other, given[5], rtol=2e-5, atol=1e-6)


@every_model
def test_grad_cam_of_a_layer_by_name(name, held):
    model, x = MODELS[name], inputs(MODELS[name])
    maps, slopes = maps_and_slopes(model, 1)
    *_, site = (s for s in xv.tracing.sites(model, *x) if s.kind == "attention")
    explain = xv.attention_grad_cam(model, query=1, layer=site.name)
    found = jax.jit(partial(explain, target=1))(*x)
    seen = (maps[-1] > 0).any(axis=(0, 1))
    weights = np.where(seen, slopes[-1][:, 1], 0).sum(axis=-1) / seen.sum()
    expected = np.maximum(np.einsum("h,hk->k", weights, maps[-1][:, 1]) / HEADS, 0)
    np.testing.assert_allclose(found.scores, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["padded, looped", "co-attention"])
def test_statistics(name, held):
    model, x = MODELS[name], inputs(MODELS[name])
    maps, _ = maps_and_slopes(model, 0)
    encoder = next(iter(xv.grad_sam(model)(*x).scores))
    padding = getattr(model, "pad", 0)
    marked = np.arange(model.other) >= model.other - padding
    pad = (lambda *_: {encoder: jnp.asarray(marked)}) if padding else None
    found = jax.jit(xv.attention_statistics(model, pad=pad, top_k=2))(*x)
    by_pair, received = {}, []
    for pair, each in zip(pairs(model), maps, strict=True):
        rows = len(each[0]) - (padding if pair[0] == "other" else 0)
        each = each[:, :rows]
        received.append(each.mean(axis=(0, 1)))
        logs = np.log(np.where(each > 0, each, 1))
        strongest = each.argmax(axis=-1)
        statistics = {
            "entropy": -(each * logs).sum(axis=-1).mean(axis=-1),
            "first_share": each[..., 0].mean(axis=-1),
            "pad_leak": np.zeros(HEADS),
            "head_agreement": (strongest[0] == strongest[1]).mean(),
        }
        if pair[0] == pair[1]:
            rows, keys = np.arange(rows), np.arange(each.shape[-1])
            apart = np.abs(rows[:, None] - keys)
            statistics["distance"] = (each * apart).sum(axis=-1).mean(axis=-1)
            statistics["self_share"] = each[:, rows, rows].mean(axis=-1)
        by_pair.setdefault(pair, []).append(statistics)
    check(model, found.scores, by_keys(model, received, np.mean))
    own, other = of_both(model, {name: name for name in found.scores})
    names = {"own": own, "other": other}
    counted = 0
    for (query, key), each_layer in by_pair.items():
        for statistic in each_layer[0]:
            title = f"{names[query]}>{names[key]}/{statistic}"
            expected = np.stack([each[statistic] for each in each_layer])
            np.testing.assert_allclose(
                found.diagnostics[title], expected, rtol=2e-5, atol=1e-6
            )
            counted += 1
        shape = found.diagnostics[f"{names[query]}>{names[key]}/top_keys"].shape
        lengths = {"own": model.own, "other": model.other}
        assert shape == (len(each_layer), HEADS, lengths[query], 2)
        counted += 2
    assert counted == len(found.diagnostics)


# Of each model, the streams that each layer's keys are made of, as `at` meets them.
TOKENS = {EncoderDecoder: (0, 1, 3, 2, 5, 2), CoAttention: (1, 0, 2, 3, 5, 4, 6, 7)}


@every_model
def test_attcat(name, held):
    model, given = MODELS[name], []
    padding = getattr(model, "pad", 0)
    unrolled = type(model)(**{**vars(model), "scan": False})
    with jax.enable_x64(True):
        x = tuple(map(jnp.asarray, model.inputs()))

        def moved(added):
            rest, found = iter(added), []

            def at(stream):
                found.append(stream)
                return stream + next(rest) if added else stream

            return unrolled(*x, at=at)[2], found

        _, streams = moved(())
        slopes, _ = jax.grad(moved, has_aux=True)(jax.tree.map(jnp.zeros_like, streams))
        impacts = [(a * b).sum(axis=-1) for a, b in zip(streams, slopes, strict=True)]
    maps, _ = maps_and_slopes(model, 2)
    for (query, _), each, tokens in zip(
        pairs(model), maps, TOKENS[type(model)], strict=True
    ):
        last = each.shape[1] - (padding if query == "other" else 0)
        given.append(each[:, :last].mean(axis=(0, 1)) * np.asarray(impacts[tokens]))
    found = jax.jit(partial(xv.attcat(model), target=2))(*inputs(model))
    check(model, found.scores, by_keys(model, given, np.sum), rtol=1e-4, atol=1e-5)


def cut_short(model, depth, tap):
    """What leaves the decoder after so many layers of each, and what the model says."""
    x, y = map(jnp.asarray, model.inputs())
    seen = np.arange(model.other) < model.other - model.pad
    past = np.tril(np.ones((model.own, model.own), bool))
    encoder, decoder = depth
    for w in model.encoder[:encoder]:
        y = mlp(y + attend(w["own"], y, y, seen, tap))
    every = [(w[name], name) for w in model.decoder for name in ("own", "cross")]
    for w, name in every[:decoder]:
        keys, mask = (x, past) if name == "own" else (y, seen)
        x = x + attend(w, x, keys, mask, tap)
        x = norm(x) if name == "own" else mlp(x)
    return x


def tap_at(number, change):
    """Changes one map, by its number."""
    count = iter(range(100))
    return lambda maps: change(maps) if next(count) == number else maps


@pytest.mark.parametrize("name", ["encoder and decoder", "padded, looped"])
def test_legrad(name, held):
    model, given = MODELS[name], []
    for number, (query, _) in enumerate(pairs(model)):
        encoder, decoder = (number + 1, 4) if number < 2 else (2, number - 1)
        seen = []

        def answer(added, number=number, depth=(encoder, decoder), seen=seen):
            tap = tap_at(number, lambda maps: seen.append(maps) or maps + added)
            return (cut_short(model, depth, tap)[-1] @ HEAD)[1]

        with jax.enable_x64(True):
            shape = model.shapes(model.own, model.other)[number]
            answer(jnp.zeros((HEADS, *shape)))
            slope = jax.grad(answer)(jnp.zeros((HEADS, *shape)))
        counted = np.where(np.asarray(seen[0]) > 0, np.maximum(slope, 0), 0)
        last = shape[0] - (model.pad if query == "other" else 0)
        given.append(counted[:, :last].mean(axis=(0, 1)))
    found = jax.jit(partial(xv.legrad(model), target=1))(*inputs(model))
    check(model, found.scores, by_keys(model, given, np.sum), rtol=1e-4)


@pytest.mark.parametrize("number", [1, 4, 5])
@pytest.mark.parametrize("name", ["encoder and decoder", "padded, looped"])
def test_value_zeroing_of_a_layer_by_name(name, number):
    model, x = MODELS[name], inputs(MODELS[name])
    sites = [s.name for s in xv.tracing.sites(model, *x) if s.kind == "attention"]
    # Of a loop's layers, the last.
    site = sites[{1: 0, 4: 1, 5: 2}[number] if model.scan else number]
    length, keys = model.shapes(model.own, model.other)[number]
    found = jax.jit(xv.value_zeroing(model, layer=site, query=None))(*x)

    def leaving(column):
        with jax.enable_x64(True):
            kept = np.arange(keys) != column
            tap = tap_at(number, lambda maps: jnp.where(kept, maps, 0))
            if number == 1:
                return np.asarray(encoded(model, tap))
            return np.asarray(cut_short(model, (2, number - 1), tap))

    before = leaving(None)
    unit = lambda z: z / np.linalg.norm(z, axis=-1, keepdims=True)
    cosine = lambda a, b: (unit(a) * unit(b)).sum(axis=-1)
    moved = np.stack([1 - cosine(before, leaving(j)) for j in range(keys)], axis=-1)
    maps = maps_and_slopes(model, 0)[0][number]
    moved = np.where((maps > 0).any(axis=0), moved, 0)
    expected = moved / moved.sum(axis=-1, keepdims=True)
    rows = length - (model.pad if number == 1 else 0)
    np.testing.assert_allclose(
        found.scores[:rows], expected[:rows], rtol=1e-3, atol=1e-5
    )
    assert ("self_share" in found.diagnostics) == (number != 5)
    assert int(found.diagnostics["evaluations"]) == keys + 2
    one = jax.jit(xv.value_zeroing(model, layer=site, query=1))(*x)
    np.testing.assert_allclose(one.scores, expected[1], rtol=1e-3, atol=1e-5)


def encoded(model, tap):
    y = jnp.asarray(model.inputs()[1])
    seen = np.arange(model.other) < model.other - model.pad
    for w in model.encoder:
        y = mlp(y + attend(w["own"], y, y, seen, tap))
    return y


def test_value_zeroing_multiplies_no_layers_of_several():
    with pytest.raises(ValueError, match="are not multiplied: name one as `layer`"):
        xv.value_zeroing(MODEL)(*inputs(MODEL))
    with pytest.raises(ValueError, match="no attention is named 'none'"):
        xv.value_zeroing(MODEL, layer="none")(*inputs(MODEL))


def probed(x):
    """A learned probe reads a sequence that attended to itself."""
    x = mlp(x + attend(cast(weights(1), x), x, x))
    probe = jnp.asarray(PROBE, x.dtype)
    return mlp(probe + attend(cast(weights(2), x), probe, x))[0]


PROBE = np.random.default_rng(5).normal(size=(1, WIDTH))
METHODS = {
    "attention_rollout": xv.attention_rollout,
    "gradient_rollout": xv.gradient_rollout,
    "attention_flow": xv.attention_flow,
    "attention_relevance": xv.attention_relevance,
    "grad_sam": xv.grad_sam,
    "legrad": xv.legrad,
    "attcat": xv.attcat,
    "attention_statistics": xv.attention_statistics,
}


@pytest.mark.parametrize("name", METHODS)
def test_a_probe_is_a_sequence(name):
    x, _ = inputs(MODEL)
    if name == "attcat":
        # Of one layer nothing tells where it ends.
        with pytest.raises(
            ValueError, match=r"'attention' .* name what its last layer"
        ):
            METHODS[name](probed)(x, target=0)
        return
    found = METHODS[name](probed)(x, target=0)
    sequence, probe = found.scores.values()
    assert (sequence.shape, probe.shape) == ((MODEL.own,), (1,))
    assert np.isfinite(sequence).all() and sequence.max() > 0


@pytest.mark.parametrize("name", METHODS)
def test_batches_and_compilation_change_nothing(name):
    model = MODELS["padded, looped"]
    x, y = inputs(model)
    batch = jnp.stack([x, 2 * x, x + 1]), jnp.stack([y, y - 1, 3 * y])
    explain = partial(METHODS[name](model), target=1)
    together = jax.jit(jax.vmap(explain))(*batch)
    for row in range(3):
        alone = explain(*(each[row] for each in batch))
        one = jax.tree.map(lambda leaf, row=row: leaf[row], together)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), one, alone
        )


def refuses(said, method, model, *args):
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(partial(method(model), target=0), *args)


def test_what_a_loop_stacks_is_not_taken_for_its_end():
    """A decoder that reads what left the first of two layers of an encoder."""

    def model(x, source, turn: int | None = 0):
        layers = jax.tree.map(lambda *w: jnp.stack(w), *(weights(n) for n in (1, 2)))

        def layer(y, w):
            y = mlp(y + attend(cast(w, x), y, y))
            return y, y

        end, every = jax.lax.scan(layer, source, layers)
        memory = end if turn is None else every[turn]
        return mlp(x + attend(cast(weights(3), x), x, memory))[0]

    x = inputs(MODEL)
    for method in (xv.attention_rollout, xv.attention_relevance, xv.attcat):
        refuses("reads what a loop stacks of 'attention'", method, model, *x)
    jax.eval_shape(xv.attention_rollout(partial(model, turn=None)), *x)


@pytest.mark.parametrize("method", [xv.attention_rollout, xv.grad_sam])
def test_keys_that_are_mixed_positions_are_no_sequence(method):
    mix = draw(3, 2, MODEL.own)

    def linear(x):
        return mlp(x + attend(cast(weights(1), x), x, jnp.float32(mix) @ x))[0]

    refuses("keys of 'attention' are made of other positions", method, linear, X)


def test_what_queries_see_of_other_keys():
    """Up to two keys further than their own number; and with a window besides."""
    offset = np.arange(MODEL.other) - np.arange(MODEL.own)[:, None]
    for mask in (offset <= 2, (offset <= 2) & (offset >= 0), offset <= 1):
        model = lambda x, y, mask=mask: attend(cast(weights(1), x), x, y, mask)[0]
        _, maps = xv.tracing.capture(model)(*inputs(MODEL))
        _, layer = layers.capture_named(
            model, inputs(MODEL), "attention", lambda logits: logits[0]
        )
        assert "probabilities" not in layer.values
        for position in range(MODEL.own):
            seen = masking.seen(layer, jnp.int32(position))
            expected = maps["attention"]["probabilities"][0][:, position] > 0
            np.testing.assert_array_equal(
                np.broadcast_to(seen, expected.shape), expected
            )


@pytest.mark.parametrize("scan", [False, True])
def test_layers_beside_each_other_over_positions_that_are_not_followed(scan):
    """What is cut and joined is named, and comes after what it was made of."""
    co = CoAttention(scan=scan)

    def encoded(x):
        return mlp(x + attend(cast(weights(7), x), x, x))

    def joined(x, y):
        x = encoded(x)
        return co(jnp.concatenate([x[:1], x[1:]]), y)

    whole = lambda x, y: co(encoded(x), y)
    x, y = inputs(co)
    sites = [s.name for s in xv.tracing.sites(joined, x, y) if s.kind == "attention"]
    layer = [("text", "image"), ("image", "text"), ("text", "text"), ("image", "image")]
    every = [("text", "text"), *layer * (1 if scan else 2)]
    streams = dict(zip(sites, every, strict=True))
    for method in (xv.attention_rollout, xv.attention_relevance):
        refuses("name it in `streams`", method, joined, x, y)
        given = method(joined, streams=streams)(x, y, target=0)
        text, image = method(whole)(x, y, target=0).scores.values()
        np.testing.assert_allclose(given.scores["text"], text, rtol=1e-5)
        np.testing.assert_allclose(given.scores["image"], image, rtol=1e-5)


def frozen(x, features):
    """A decoder of features that attend to nothing."""
    features = checkpoint_name(jnp.tanh(features), "features")
    for n in (1, 2):
        x = norm(x + attend(cast(weights(n), x), x, x))
        x = mlp(x + attend(cast(weights(n + 2), x), x, features))
    return x[-1] @ jnp.asarray(HEAD, x.dtype)


def test_the_tokens_of_keys_alone_are_named():
    x = inputs(MODEL)
    refuses("name what its last layer returns in `last`", xv.attcat, frozen, *x)
    named = {"attention#1/key": "features"}
    found = xv.attcat(frozen, last=named)(*x, target=0)
    own, features = found.scores.values()
    assert np.abs(features).max() > 1e-3
    assert np.isfinite(own).all()
    wrong = partial(xv.attcat, last={"none": "features"})
    refuses(r"`last` is a dict by .* got \['none'\]", wrong, frozen, *x)
    refuses("`last` is a dict by", partial(xv.legrad, last=named), frozen, *x)
    refuses("`last` is a dict by", partial(xv.legrad, last="features"), frozen, *x)
    one = lambda x: attend(cast(weights(1), x), x, x)[0]
    refuses("`last` is of several", partial(xv.attcat, last=named), one, X)
    refuses("of one sequence is one name", partial(xv.legrad, last=named), one, X)


def test_a_last_layer_that_lacks_a_part_is_to_be_named():
    def uneven(x, y):
        for n in (1, 2):
            x = norm(x + attend(cast(weights(n), x), x, x))
            x = mlp(x + attend(cast(weights(n + 2), x), x, y))
        x = mlp(norm(x + attend(cast(weights(5), x), x, x)))
        return checkpoint_name(x, "end")[-1] @ jnp.asarray(HEAD, x.dtype)

    x = inputs(MODEL)
    refuses("what leaves the last layer was not found", xv.legrad, uneven, *x)
    named = xv.legrad(uneven, last={"attention": "end"})
    assert jax.eval_shape(named, *x).scores["attention"].shape == (MODEL.own,)


@pytest.mark.parametrize("method", [xv.grad_sam, xv.legrad, xv.attcat])
def test_padding_that_others_tell_of_changes_nothing(method):
    """A text never attends to itself; what reads it leaves its padding out."""

    def model(text, image, length):
        seen = jnp.arange(len(text)) < length
        for n in (1, 2):
            image = norm(image + attend(cast(weights(n), text), image, text, seen))
            text = mlp(text + attend(cast(weights(n + 2), text), text, image))
        return image[0] @ jnp.asarray(HEAD, text.dtype)

    text, image = inputs(MODEL)
    padded = jnp.concatenate([text, jnp.ones((3, WIDTH))])
    name = "attention#1"
    explain = lambda text: method(model)(text, image, MODEL.own, target=0).scores
    for scores, other in zip(
        explain(text).values(), explain(padded).values(), strict=True
    ):
        np.testing.assert_allclose(other[: len(scores)], scores, rtol=1e-5, atol=1e-7)
    assert not explain(padded)[name][MODEL.own :].any()


def test_all_rows_with_gradients_are_refused_and_without_are_treated():
    x = inputs(MODEL)
    for method in (xv.gradient_rollout, xv.attention_relevance):
        refuses("weights of rows, got None", partial(method, query=None), MODEL, *x)
    every = xv.attention_rollout(MODEL, query=None)
    special = {name: jnp.arange(s.shape[1]) < 1 for name, s in every(*x).scores.items()}
    for name, scores in xv.special_tokens(every, special=special)(*x).scores.items():
        assert scores.shape == (MODEL.own, len(special[name]))
        assert not scores[:, 0].any()


def test_maps_that_weigh_one_product_are_one_layer_by_name():
    def differential(x):
        split = lambda name: x @ cast(weights(1), x)[name]
        one, two = (
            jax.nn.softmax(split(q) @ split(k).T)
            for q, k in (("query", "key"), ("key", "query"))
        )
        return ((one - 0.5 * two) @ split("value"))[0]

    names = [s.name for s in xv.tracing.sites(differential, X) if s.kind == "attention"]
    found = [xv.raw_attention(differential, layer=name)(X).scores for name in names]
    assert len(found) == 2
    np.testing.assert_array_equal(*found)
