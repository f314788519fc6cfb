"""What every method promises, whichever it is."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import xviz_jax as xv
from tests.contract.table import (
    CLASSES,
    LENGTH,
    METHODS,
    WIDTH,
    Method,
    example,
    parameters,
    transformer,
)

WEIGHTS = parameters()
near = partial(np.testing.assert_allclose, rtol=5e-5, atol=1e-5)


def model(x):
    return transformer(WEIGHTS, x)


def close(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        near(a, b)


def over(rows):
    return pytest.mark.parametrize("method", rows, ids=lambda method: method.name)


every_method = over(METHODS)
gradient_methods = over([method for method in METHODS if method.like_input])
complete_methods = over([method for method in METHODS if method.complete])
linear_methods = over([method for method in METHODS if method.linear is not None])


@pytest.fixture
def explain(method: Method):
    """The method's explainer of the transformer, compiled."""
    compiled = jax.jit(method.make(model), static_argnames="target")

    def call(x, *, target=None):
        if target is None or isinstance(target, int | tuple):
            return compiled(x, target=target)
        return method.make(model)(x, target=target)

    return call


@every_method
def test_scores_are_a_float32_pytree(method, explain):
    attribution = explain(example())
    assert isinstance(attribution, xv.Attribution)
    assert attribution.scores.dtype == jnp.float32
    expected = (LENGTH, WIDTH) if method.like_input else (LENGTH,)
    assert attribution.scores.shape == expected
    assert attribution.output.shape == ()
    assert attribution.output.dtype == jnp.float32
    leaves, tree = jax.tree.flatten(attribution)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert isinstance(jax.tree.unflatten(tree, leaves), xv.Attribution)
    assert np.abs(attribution.scores).max() > 0


@every_method
def test_jit_equals_eager(method):
    explain = method.make(model)
    close(jax.jit(explain)(example()), explain(example()))


@every_method
def test_vmap_equals_a_loop(method, explain):
    batch = example(3)
    stacked = jax.jit(jax.vmap(explain))(batch)
    for index, row in enumerate(batch):
        close(jax.tree.map(lambda leaf, i=index: leaf[i], stacked), explain(row))


@every_method
def test_padding_a_batch_changes_nothing(method, explain):
    program = jax.jit(jax.vmap(explain))
    batch = example(3)
    padded = jnp.concatenate([batch, 1e3 * jnp.ones((2, LENGTH, WIDTH))])
    close(jax.tree.map(lambda leaf: leaf[:3], program(padded)), program(batch))


@every_method
def test_one_trace_per_shape(method):
    traces = 0

    def counted(x):
        nonlocal traces
        traces += 1
        return transformer(WEIGHTS, x)

    program = jax.jit(method.make(counted))
    program(example())
    first = traces
    for seed in range(9):
        program(example() + seed)
    assert traces == first > 0


@every_method
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_equals_a_single_device(method, explain, kind):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(kind,))
    batch = example(8)
    placed = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("batch")))
    program = jax.jit(jax.vmap(explain))
    close(program(placed), program(batch))


@every_method
def test_shard_map_equals_a_single_device(method, explain):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("batch")
    batch = example(8)
    mapped = jax.shard_map(
        jax.vmap(explain), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    close(jax.jit(mapped)(batch), jax.jit(jax.vmap(explain))(batch))


@every_method
def test_parameters_may_be_arguments(method, explain):
    if method.name.startswith("attention"):
        other = method.make(transformer)
    else:
        other = method.make(transformer, argnums=1)
    close(jax.jit(other)(WEIGHTS, example()), explain(example()))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, WEIGHTS)
    changed = jax.jit(other)(doubled, example()).scores
    assert not np.allclose(changed, explain(example()).scores, rtol=1e-3)


@every_method
def test_bfloat16_gives_float32_scores(method):
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), WEIGHTS)
    half = method.make(lambda x: transformer(halved, x))
    rounded = example().astype(jnp.bfloat16)
    target = int(jnp.argmax(model(example())))
    scores = half(rounded, target=target).scores
    full = method.make(model)(example(), target=target).scores
    assert scores.dtype == jnp.float32
    assert np.corrcoef(scores.ravel(), full.ravel())[0, 1] > 0.99


class TestTargets:
    @every_method
    def test_none_is_the_predicted_class(self, method, explain):
        predicted = int(jnp.argmax(model(example())))
        close(explain(example()), explain(example(), target=predicted))

    @every_method
    def test_traced_integer(self, method, explain):
        traced = jax.jit(lambda x, target: explain(x, target=target))
        for target in range(CLASSES):
            close(traced(example(), target), explain(example(), target=target))

    @every_method
    def test_one_target_per_example(self, method, explain):
        targets = jnp.array([2, 0, 3])
        batch = jax.vmap(explain)(example(3), target=targets)
        for index, target in enumerate([2, 0, 3]):
            close(
                jax.tree.map(lambda leaf, i=index: leaf[i], batch),
                explain(example(3)[index], target=target),
            )

    @every_method
    def test_pair_is_a_difference(self, method, explain):
        pair = explain(example(), target=(1, 2))
        one, two = (explain(example(), target=target) for target in (1, 2))
        near(pair.output, one.output - two.output)
        if method.complete or method.name in ("saliency-signed", "input_x_gradient"):
            np.testing.assert_allclose(
                pair.scores, one.scores - two.scores, rtol=1e-4, atol=1e-5
            )

    @every_method
    def test_callable(self, method, explain):
        mine = explain(example(), target=lambda logits: logits[1])
        close(mine, explain(example(), target=1))

    @every_method
    def test_class_blind_methods_ignore_it(self, method, explain):
        one, two = (explain(example(), target=target).scores for target in (1, 2))
        assert np.array_equal(one, two) == method.class_blind

    @every_method
    def test_a_traced_class_outside_the_logits_is_not_a_number(self, method, explain):
        for target in (CLASSES, -1):
            outside = jax.jit(lambda x, t: explain(x, target=t))(example(), target)
            assert np.isnan(outside.output)

    @pytest.mark.parametrize(
        ("target", "said"),
        [
            (CLASSES, "from 0 to 3, got 4"),
            (-1, "from 0 to 3, got -1"),
            (1.0, "None, an integer, a pair of integers or a callable, got 1.0"),
            (True, "got True"),
            ("cat", "got 'cat'"),
            ((1, 2, 3), "got 3 entries"),
            ((0, 9), "from 0 to 3, got 9"),
            (np.array([0, 1]), r"got shape \(2,\); use `jax.vmap`"),
            (np.array(0.5), "an integer"),
            (lambda logits: logits, r"returns one float, got \(4,\)"),
            (lambda logits: jnp.argmax(logits), "returns one float, got int32"),
        ],
    )
    @every_method
    def test_wrong_ones_are_refused(self, method, explain, target, said):
        with pytest.raises(ValueError, match=said):
            explain(example(), target=target)


class TestInputs:
    @every_method
    def test_batched_models_are_refused(self, method):
        def batched(x):
            return jax.vmap(model)(x[None])

        with pytest.raises(ValueError, match=r"got \(1, 4\); use `xv.single`"):
            method.make(batched)(example())
        single = method.make(xv.single(jax.vmap(model)))
        close(single(example()), method.make(model)(example()))

    @every_method
    def test_models_must_return_one_float_array(self, method):
        with pytest.raises(ValueError, match="one array of logits, got tuple"):
            method.make(lambda x: (model(x), model(x)))(example())
        with pytest.raises(ValueError, match="floats, got int32"):
            method.make(lambda x: (9 * model(x)).astype(jnp.int32))(example())

    @gradient_methods
    def test_inputs_must_be_floats(self, method):
        with pytest.raises(ValueError, match=r"int32\[5, 8\]: it must look up"):
            method.make(lambda x: model(x.astype(jnp.float32)))(
                jnp.ones((LENGTH, WIDTH), jnp.int32)
            )
        with pytest.raises(ValueError, match="must be a float array, got bool"):
            method.make(lambda x: model(example()))(jnp.ones(3, bool))
        with pytest.raises(ValueError, match="no arrays"):
            method.make(lambda x: model(example()))(())

    @gradient_methods
    def test_argnums_must_exist(self, method):
        with pytest.raises(ValueError, match="`argnums` is 3, but 1 positional"):
            method.make(model, argnums=3)(example())

    @gradient_methods
    def test_several_arguments_at_once(self, method):
        both = method.make(lambda a, b: model(a + b), argnums=(0, 1))
        left, right = both(example(), 0.5 * example(), target=1).scores
        alone = method.make(lambda a: model(a + 0.5 * example()))
        if not method.complete:
            close(left, alone(example(), target=1).scores)
        assert left.shape == right.shape == (LENGTH, WIDTH)

    @gradient_methods
    def test_pytrees(self, method):
        mapped = method.make(lambda x: model(x["left"] + x["right"]))
        half = 0.5 * example()
        scores = mapped({"left": half, "right": half}, target=2).scores
        whole = method.make(model)(example(), target=2).scores
        if method.complete or method.name == "input_x_gradient":
            close(scores["left"] + scores["right"], whole)
        else:
            close(scores["left"], whole)


class TestClosedForms:
    @linear_methods
    def test_linear(self, method):
        matrix = jax.random.normal(jax.random.key(1), (CLASSES, WIDTH))
        x = jax.random.normal(jax.random.key(2), (WIDTH,))
        scores = method.make(lambda x: matrix @ x)(x, target=2).scores
        np.testing.assert_allclose(scores, method.linear(x, matrix[2]), rtol=1e-5)

    @complete_methods
    def test_linear_from_a_baseline(self, method):
        matrix = jax.random.normal(jax.random.key(1), (CLASSES, WIDTH))
        x, start = jax.random.normal(jax.random.key(2), (2, WIDTH))
        for baseline in (start, lambda x: start):
            explain = method.make(lambda x: matrix @ x, baseline=baseline)
            attribution = explain(x, target=2)
            expected = matrix[2] * (x - start)
            np.testing.assert_allclose(
                attribution.scores, expected, rtol=2e-5, atol=1e-6
            )
        number = method.make(lambda x: matrix @ x, baseline=0.5)(x, target=2)
        np.testing.assert_allclose(
            number.scores, matrix[2] * (x - 0.5), rtol=2e-5, atol=1e-6
        )

    @complete_methods
    def test_quadratic(self, method):
        """The path integral of x'Qx from zero is x * Qx for a symmetric Q."""
        root = jax.random.normal(jax.random.key(4), (WIDTH, WIDTH))
        matrix = root + root.T
        x = jax.random.normal(jax.random.key(5), (WIDTH,))
        attribution = method.make(lambda x: (x @ matrix @ x)[None])(x, target=0)
        error = 2e-3 if "left" in method.name or "right" in method.name else 1e-5
        expected = x * (matrix @ x)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(attribution.scores, expected, atol=error * scale)

    @gradient_methods
    def test_a_constant_gives_zeros(self, method):
        attribution = method.make(lambda x: jnp.array([3.0, 4.0]))(example())
        assert not np.any(attribution.scores)
        assert attribution.output == 4
        for name, value in attribution.diagnostics.items():
            assert np.all(np.isfinite(value)), name
        if method.complete:
            assert attribution.diagnostics["completeness_gap"] == 0
            assert attribution.diagnostics["converged"]

    @complete_methods
    def test_completeness(self, method, explain):
        attribution = explain(example(), target=1)
        change = model(example())[1] - model(jnp.zeros_like(example()))[1]
        gap = abs(float(attribution.scores.sum() - change))
        coarse = "left" in method.name or "right" in method.name
        assert gap < (5e-3 if coarse else 5e-4) * abs(change)
        diagnostics = attribution.diagnostics
        np.testing.assert_allclose(diagnostics["absolute_gap"], gap, atol=1e-6)
        np.testing.assert_allclose(
            diagnostics["completeness_gap"], gap / abs(change), atol=1e-5
        )
        near(attribution.output, model(example())[1])
        assert diagnostics["converged"]
