"""Methods that explain, or look at, what lies inside a model; and tokens."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
from tests.contract.table import LENGTH, WIDTH, example, parameters, transformer

WEIGHTS = parameters()
KEY = jax.random.key(0)
TABLE = jax.random.normal(jax.random.key(8), (11, WIDTH))
TOKENS = jnp.array([3, 1, 4, 1, 5])


def first(x):
    return jnp.tanh(x @ WEIGHTS[0]["up"])


def second(h):
    return (h**2).sum(axis=0) @ WEIGHTS[-1]["head"]


def model(x):
    return second(checkpoint_name(first(x), "hidden"))


def looped(x):
    """Two turns of a loop, with a named value in each."""
    stack = jnp.stack([WEIGHTS[0]["up"], WEIGHTS[1]["up"]])
    turn = lambda x, w: (checkpoint_name(jnp.tanh(x @ w), "hidden"), None)
    return second(jax.lax.scan(turn, x, stack)[0])


def of_tokens(tokens):
    return transformer(WEIGHTS, TABLE[tokens])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


near = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_at_a_site_is_the_rest_of_the_model():
    """Every method at the site is the method of what comes after it."""
    hidden = first(example())
    for make in (
        xv.saliency,
        xv.input_x_gradient,
        lambda m, **o: xv.integrated_gradients(m, steps=4, **o),
        lambda m, **o: xv.feature_ablation(m, chunk=40, **o),
        lambda m, **o: xv.occlusion(m, window=2, **o),
    ):
        inside = jax.jit(make(model, at="hidden"))(example())
        after = jax.jit(make(second))(hidden)
        near(inside.scores, after.scores)
        near(inside.output, after.output)


def test_what_comes_before_a_site_is_not_run_again():
    """Beyond the one forward that reads it, nothing before the site is evaluated."""
    explain = xv.feature_ablation(model, at="hidden", chunk=40)
    tanhs = str(jax.make_jaxpr(explain)(example())).count("tanh")
    first_alone = str(jax.make_jaxpr(lambda x: model(x))(example())).count("tanh")
    program = str(jax.jit(explain).lower(example()).compile().as_text())
    assert tanhs >= first_alone == 1
    batched = [line for line in program.splitlines() if "tanh(" in line]
    assert all("[40," not in line for line in batched)


def test_several_sites_and_loops():
    both = xv.input_x_gradient(
        lambda x: model(x) + looped(x), at=["hidden", "hidden#1"]
    )
    found = both(example(), target=1).scores
    assert found["hidden"].shape == (LENGTH, WIDTH)
    assert found["hidden#1"].shape == (2, LENGTH, WIDTH)
    alone = xv.input_x_gradient(looped, at="hidden")(example(), target=1).scores
    near(found["hidden#1"], alone)
    last = jnp.tanh(jnp.tanh(example() @ WEIGHTS[0]["up"]) @ WEIGHTS[1]["up"])
    near(alone[1], xv.input_x_gradient(second)(last, target=1).scores)


def test_a_baseline_carried_to_the_site():
    start = 0.3 * jnp.ones((LENGTH, WIDTH))
    carried = xv.baselines.carried(start)
    inside = xv.integrated_gradients(model, at="hidden", baseline=carried, steps=4)
    after = xv.integrated_gradients(second, baseline=first(start), steps=4)
    near(inside(example()).scores, after(first(example())).scores)


def test_conductance_adds_up_where_all_flows_through_the_site():
    explain = xv.conductance(model, at="hidden", steps=32)
    found = jax.jit(explain)(example(), target=1)
    change = model(example())[1] - model(jnp.zeros((LENGTH, WIDTH)))[1]
    near(found.scores.sum(), change)
    assert found.diagnostics["absolute_gap"] < 1e-4 * abs(change)


def test_conductance_of_an_additive_layer_is_integrated_gradients():
    """Each unit sees its own inputs only: what flows through it is what they add."""
    weights = jax.random.normal(KEY, (WIDTH,))
    pairs = lambda x: jnp.tanh(x.reshape(WIDTH // 2, 2).sum(-1))
    net = lambda x: (weights[:4] @ checkpoint_name(pairs(x), "pairs") ** 3)[None]
    x = example()[0]
    inside = xv.conductance(net, at="pairs", steps=24)(x).scores
    outside = xv.integrated_gradients(net, steps=24)(x).scores
    near(inside, outside.reshape(WIDTH // 2, 2).sum(-1))


def test_internal_influence_is_the_mean_gradient():
    steps = 16
    explain = xv.internal_influence(model, at="hidden", steps=steps, rule="midpoint")
    scores = explain(example(), target=2).scores
    places = (np.arange(steps) + 0.5) / steps
    slope = jax.grad(lambda h: second(h)[2])
    expected = np.mean([slope(first(p * example())) for p in places], axis=0)
    near(scores, expected)


def test_tokens_flow_through_sites_and_windows():
    """Paths start at other tokens; one score for each token."""
    pad = xv.baselines.tokens(0, keep=(3,))
    start = TABLE[jnp.array([3, 0, 0, 0, 0])]
    of_embeddings = lambda e: transformer(WEIGHTS, e)
    for make in (
        lambda m, **o: xv.integrated_gradients(m, steps=4, **o),
        lambda m, **o: xv.leave_one_out(m, **o),
    ):
        tokens = jax.jit(make(of_tokens, baseline=pad))(TOKENS)
        floats = jax.jit(make(of_embeddings, baseline=start))(TABLE[TOKENS])
        expected = floats.scores if floats.scores.ndim == 1 else floats.scores.sum(-1)
        near(tokens.scores, expected)
    inside = xv.conductance(of_tokens, at="stream", baseline=pad, steps=3)
    outside = xv.conductance(of_embeddings, at="stream", baseline=start, steps=3)
    near(inside(TOKENS).scores, outside(TABLE[TOKENS]).scores)


def test_token_games():
    groups = np.array([0, 0, 1, 2, 2])
    pad = xv.baselines.tokens(0)
    found = xv.exact_shapley(of_tokens, groups=groups, baseline=pad)(TOKENS, target=1)
    assert found.scores.shape == (LENGTH,)
    change = of_tokens(TOKENS)[1] - of_tokens(jnp.zeros(5, int))[1]
    near(found.scores[jnp.array([0, 2, 3])].sum(), change)
    shap = xv.expected_gradients(of_tokens, baselines=jnp.zeros((1, 5), int), samples=4)
    assert shap(TOKENS, key=KEY).scores.shape == (LENGTH,)
    random = xv.rise(of_tokens, cells=5, samples=4, baseline=pad)
    assert random(TOKENS, key=KEY).scores.shape == (LENGTH,)


class TestMaps:
    def test_cam_of_a_loop_takes_a_turn(self):
        hidden = jnp.tanh(example() @ WEIGHTS[0]["up"])
        rest = lambda h: second(jnp.tanh(h @ WEIGHTS[1]["up"]))
        for make in (xv.grad_cam, xv.hires_cam):
            tagged = lambda h: rest(checkpoint_name(h, "hidden"))
            expected = make(tagged)(hidden, target=1).scores
            near(make(looped, turn=0)(example(), target=1).scores, expected)

    def test_transformers_are_mapped_at_the_last_block(self):
        def plain(x):
            *layers, last = WEIGHTS
            for layer in layers:
                scores = (x @ layer["query"]) @ (x @ layer["key"]).T
                x = x + jax.nn.softmax(scores) @ (x @ layer["value"])
            return x[0] @ last["head"]

        found = xv.hires_cam(plain)(example(), target=1).scores
        block = [s for s in xv.tracing.sites(plain, example()) if s.kind == "block"][-1]
        at = xv.input_x_gradient(plain, at=block)(example(), target=1).scores
        near(found, at.reshape(LENGTH, WIDTH).sum(-1))

    @pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
    @pytest.mark.parametrize("make", [xv.grad_cam, xv.hires_cam])
    def test_convolutions_are_mapped_at_the_last_one(self, make, layout):
        first, last = normal(1, 3, 3, 2, 5), normal(2, 3, 3, 5, 4)
        channels = layout.index("C")
        places = tuple({1, 2, 3} - {channels})
        bias = jnp.expand_dims(jnp.arange(4.0) - 2, (0, *places))

        def network(mark, image):
            layouts = (layout, "HWIO", layout)
            conv = partial(
                jax.lax.conv_general_dilated, padding="SAME", dimension_numbers=layouts
            )
            x = jax.nn.relu(conv(image[None], first, (1, 1)))
            x = mark(conv(x, last, (2, 1)) + bias)
            return jax.nn.relu(x).mean(axis=(0, *places))

        image = jnp.moveaxis(normal(3, 6, 8, 2), -1, channels - 1)
        plain = make(partial(network, lambda x: x))(image, target=2).scores
        tagged = partial(network, lambda x: checkpoint_name(x, "maps"))
        axis = {"NHWC": -1, "NCHW": 1}[layout]
        named = make(tagged, at="maps", channel_axis=axis)(image, target=2)
        assert plain.shape == (3, 8)
        assert plain.any()
        near(plain, named.scores)

    def test_layers_of_flax_and_scanned_ones_are_mapped(self):
        bias = nnx.initializers.constant(0.7)
        layer = nnx.Conv(2, 2, (3, 3), bias_init=bias, rngs=nnx.Rngs(0))
        graph, state = nnx.split(layer)
        image = normal(1, 5, 5, 2)

        def last(x, mark=lambda x: x):
            return jnp.tanh(mark(nnx.merge(graph, state)(x))).sum(axis=(0, 1))

        wanted = xv.hires_cam(partial(last, mark=lambda x: checkpoint_name(x, "maps")))
        wanted = wanted(image, target=1).scores
        assert wanted.shape == (5, 5)
        near(xv.hires_cam(last)(image, target=1).scores, wanted)

        def scanned(x):
            step = lambda x, _: (jnp.tanh(layer(x)), None)
            return jax.lax.scan(step, x, None, length=3)[0].sum(axis=(0, 1))

        before = jnp.tanh(layer(jnp.tanh(layer(image))))
        wanted = xv.hires_cam(last)(before, target=1).scores
        near(xv.hires_cam(scanned)(image, target=1).scores, wanted)

    def test_a_sum_with_an_image_is_no_bias(self):
        kernel = normal(1, 3, 3, 2, 2)

        def model(image):
            layouts = ("NHWC", "HWIO", "NHWC")
            maps = jax.lax.conv_general_dilated(
                image[None], kernel, (1, 1), "SAME", dimension_numbers=layouts
            )
            return (maps + image[None]).sum(axis=(0, 1, 2))

        image = normal(2, 4, 4, 2)
        scores = xv.hires_cam(model)(image, target=0).scores
        near(scores.sum(), model(image)[0] - image[..., 0].sum())

    def test_what_cannot_be_mapped_is_refused(self):
        with pytest.raises(ValueError, match="no activation to map"):
            xv.grad_cam(lambda x: x)(jnp.ones(3))
        with pytest.raises(ValueError, match="`channel_axis` is an axis"):
            xv.grad_cam(model, channel_axis=2)(example())
        with pytest.raises(ValueError, match="from -2 to 1"):
            xv.hires_cam(looped, turn=2)(example())
        with pytest.raises(ValueError, match="no site is named"):
            xv.grad_cam(model, at="elsewhere")(example())


def test_a_neuron_is_a_model():
    unit = xv.neuron(model, at="hidden", index=(2, 5))
    near(unit(example()), first(example())[2, 5])
    slope = jax.grad(lambda x: first(x)[2, 5])(example())
    near(xv.saliency(unit, signed=True)(example()).scores, slope)
    with pytest.raises(ValueError, match="`index` is a place"):
        xv.neuron(model, at="hidden", index=(5, 0))(example())


@pytest.mark.parametrize(
    ("baseline", "said"),
    [
        (xv.baselines.tokens(0), "for integer inputs"),
        (xv.baselines.carried(), "for methods with `at`"),
        (xv.baselines.embedding(jnp.ones(3)), "has 3 features"),
    ],
)
def test_baselines_that_do_not_fit(baseline, said):
    with pytest.raises(ValueError, match=said):
        xv.occlusion(model, window=1, baseline=baseline)(example())


def test_baselines():
    x = example()
    near(xv.baselines.mean()(x), jnp.full_like(x, x.mean()))
    near(xv.baselines.mean(0)(x)[3], x.mean(0))
    drawn = xv.baselines.uniform(2.0, 3.0, key=KEY)({"a": x, "b": x})
    assert ((drawn["a"] >= 2) & (drawn["a"] < 3)).all()
    assert not np.array_equal(drawn["a"], drawn["b"])
    near(xv.baselines.embedding(x[0])(x)[4], x[0])


def test_blur_is_a_gaussian_that_keeps_the_mean():
    line = jnp.zeros(41).at[20].set(1.0)
    blurred = xv.baselines.blur(3.0)(line)
    place = np.arange(41.0, dtype=np.float32) - 20
    near(blurred.sum(), 1.0)
    np.testing.assert_allclose((blurred * place**2).sum(), 9.0, rtol=1e-3)
    twice = xv.baselines.blur(4.0)(blurred)
    np.testing.assert_allclose(twice, xv.baselines.blur(5.0)(line), atol=1e-6)
    assert np.array_equal(xv.baselines.blur(0.0)(line).round(5), line)
