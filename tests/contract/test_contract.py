"""What every method promises, whichever it is.

A method is compiled a few times only: for one input with a class and with a pair of
classes, for a batch, for a batch on four devices, and in half precision. Everything
that is about shapes, or about what is refused, is traced and not compiled.
"""

import collections
import functools
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
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
from xviz_jax.methods import methods

WEIGHTS = parameters()
ROWS = 4
# How often each method's program was traced so far.
TRACES = collections.Counter()
near = partial(np.testing.assert_allclose, rtol=5e-5, atol=1e-5)


@pytest.fixture
def weights(method: Method):
    """Two layers where they matter, one where they only take longer to compile."""
    return of(method)


@pytest.fixture
def model(weights):
    """The transformer with its weights closed over."""
    return partial(transformer, weights)


def of(method: Method):
    return WEIGHTS if method.inside else WEIGHTS[1:]


def close(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        near(a, b)


def row(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def over(rows):
    # Of the module, so that a method's tests follow each other, in one process.
    return pytest.mark.parametrize(
        "method", rows, ids=lambda method: method.name, scope="module"
    )


every_method = over(METHODS)
on_any_model = over([method for method in METHODS if not method.inside])


def make(method: Method, model, **options):
    explain = method.make(model, **options)
    return partial(explain, key=jax.random.key(0)) if method.random else explain


def of_parameters(method: Method):
    """Explains the transformer with its weights as an argument."""
    explain = make(method, transformer, **({"argnums": 1} if method.argnums else {}))
    return lambda weights, x, target: explain(weights, x, target=target)


@functools.cache
def one(name: str):
    """A method's explanation of one input, compiled; by name, as a row is a value."""
    explain = of_parameters(by_name(name))

    def counted(*args):
        TRACES[name] += 1
        return explain(*args)

    return jax.jit(counted)


def once(method: Method, x, target, weights=None):
    """The compiled explanation of one input."""
    weights = of(method) if weights is None else weights
    # A number would be another type, and another program, than an array.
    return one(method.name)(weights, x, jax.tree.map(jnp.int32, target))


@functools.cache
def many(name: str):
    """A method's explanations of a batch with a target for each, compiled."""
    return jax.jit(jax.vmap(of_parameters(by_name(name)), in_axes=(None, 0, 0)))


def by_name(name: str) -> Method:
    return next(method for method in METHODS if method.name == name)


def test_every_public_method_is_here_and_in_the_readme():
    """Those that names are taken from, and those that take another's explanation."""
    named = {method.name.partition("-")[0] for method in METHODS}
    assert named == {*methods(), "smooth", "special_tokens"}
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    _, _, table = readme.partition("## Which method?")
    table, _, _ = table.partition("\n- ")
    assert {*re.findall(r"^\| `(\w+)` \|", table, re.M)} == {*methods(), "smooth"}


@every_method
def test_scores_are_a_float32_pytree(method):
    attribution = once(method, example(), 1)
    assert isinstance(attribution, xv.Attribution)
    assert attribution.scores.dtype == jnp.float32
    expected = (LENGTH, WIDTH) if method.scores == "input" else (LENGTH,)
    assert attribution.scores.shape == expected
    assert attribution.output.shape == ()
    assert attribution.output.dtype == jnp.float32
    leaves, tree = jax.tree.flatten(attribution)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert isinstance(jax.tree.unflatten(tree, leaves), xv.Attribution)
    assert np.isfinite(attribution.scores).all()
    assert np.abs(attribution.scores).max() > 0


@every_method
def test_eager_equals_jit_and_the_default_is_the_predicted_class(
    method, model, weights
):
    """Eager, weights closed over, no target; jit, weights and class as arguments."""
    predicted = jnp.argmax(model(example()))
    eager = make(method, model)(example())
    close(eager, once(method, example(), predicted))
    near(eager.output, model(example()).max())


@every_method
def test_parameters_matter_and_one_trace_serves_all(method, weights):
    first = once(method, example(), 1)
    traced = TRACES[method.name]
    doubled = jax.tree.map(lambda leaf: 2 * leaf, weights)
    changed = once(method, example(), 1, doubled)
    assert not np.allclose(changed.scores, first.scores, rtol=1e-3)
    for seed in range(3):
        once(method, example() + seed, seed)
    assert TRACES[method.name] == traced > 0


@every_method
def test_a_batch_equals_a_loop_whatever_the_neighbours(method):
    targets = jnp.array([2, 0, 3, 1])
    batch = example(ROWS)
    stacked = many(method.name)(of(method), batch, targets)
    for index in range(ROWS):
        alone = once(method, batch[index], targets[index])
        close(row(stacked, index), alone)
    crowd = batch.at[2:].set(1e3)
    beside = many(method.name)(of(method), crowd, targets)
    for index in range(2):
        close(row(beside, index), row(stacked, index))


@over([method for method in METHODS if "-" not in method.name])
def test_sharded_equals_a_single_device(method):
    batch, targets = example(ROWS), jnp.arange(ROWS)
    function = jax.vmap(of_parameters(method), in_axes=(None, 0, 0))
    expected = many(method.name)(of(method), batch, targets)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("batch",), axis_types=(kind,))
        spec = NamedSharding(mesh, PartitionSpec("batch"))
        placed = jax.device_put((batch, targets), spec)
        with jax.set_mesh(mesh):
            if kind is AxisType.Auto:
                close(jax.jit(function)(of(method), *placed), expected)
            else:
                scores = jax.eval_shape(jax.jit(function), of(method), *placed).scores
                assert scores.sharding.spec[0] == "batch"


@over([method for method in METHODS if "-" not in method.name])
def test_shard_map_is_traced(method, weights):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("batch")
    function = partial(of_parameters(method), weights)
    mapped = jax.shard_map(
        jax.vmap(function),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=False,
    )
    scores = jax.eval_shape(mapped, example(ROWS), jnp.arange(ROWS)).scores
    assert scores.shape[0] == ROWS


@every_method
def test_bfloat16_gives_float32_scores(method, weights):
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)
    half = once(method, example().astype(jnp.bfloat16), 1, halved).scores
    assert half.dtype == jnp.float32
    full = once(method, example(), 1).scores
    assert np.corrcoef(half.ravel(), full.ravel())[0, 1] > method.bfloat16


@over([m for m in METHODS if m.padding and "-" not in m.name])
def test_padding_changes_nothing(method, weights):
    """Of a text that is explained at its tokens; padding is another token."""
    table = jax.random.normal(jax.random.key(5), (7, WIDTH))
    model = lambda tokens, mask: transformer(weights, table[tokens], mask)
    explain = partial(make(method, model), target=1)
    tokens, mask = jnp.array([5, 1, 4, 1, 2]), jnp.ones(LENGTH, bool)
    rest = (0, 3)

    @jax.jit
    def both(tokens, mask):
        longer = jnp.pad(tokens, rest, constant_values=3), jnp.pad(mask, rest)
        return explain(tokens, mask), explain(*longer)

    alone, padded = both(tokens, mask)
    near(padded.output, alone.output)
    near(padded.scores[:LENGTH], alone.scores)
    near(padded.scores[LENGTH:], 0)


class TestTargets:
    @every_method
    def test_every_class(self, method, model):
        logits = model(example())
        found = [once(method, example(), c) for c in range(CLASSES)]
        near(jnp.stack([each.output for each in found]), logits)
        first, second = found[1].scores, found[2].scores
        assert np.array_equal(first, second) == method.class_blind

    @every_method
    def test_pair_is_a_difference(self, method):
        pair = once(method, example(), (1, 2))
        first, second = (once(method, example(), c) for c in (1, 2))
        near(pair.output, first.output - second.output)
        if method.additive:
            difference = first.scores - second.scores
            np.testing.assert_allclose(pair.scores, difference, rtol=1e-4, atol=2e-5)

    @every_method
    def test_callable(self, method, model):
        """A function of the logits that looks at all of them; traced only."""
        seen = []

        def target(logits):
            seen.append(logits.shape)
            return jnp.sum(logits)

        found = jax.eval_shape(partial(make(method, model), target=target), example())
        assert set(seen) == {(CLASSES,)}
        assert found.output.shape == ()

    @every_method
    def test_a_traced_class_outside_the_logits_is_not_a_number(self, method):
        for target in (CLASSES, -1):
            assert np.isnan(once(method, example(), target).output)

    @every_method
    def test_wrong_ones_are_refused(self, method, model):
        explain = make(method, model)
        for target, said in [
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
        ]:
            with pytest.raises(ValueError, match=said):
                jax.eval_shape(partial(explain, target=target), example())


class TestInputs:
    @every_method
    def test_batched_models_are_refused(self, method, model):
        def batched(x):
            return jax.vmap(model)(x[None])

        with pytest.raises(ValueError, match=r"got \(1, 4\); use `xv.single`"):
            jax.eval_shape(make(method, batched), example())
        single = make(method, xv.single(jax.vmap(model)))
        if method.inside:
            expected = once(method, example(), 1)
            found = jax.jit(partial(single, target=1))(example())
            near(found.scores.reshape(expected.scores.shape), expected.scores)
        else:
            jax.eval_shape(single, example())

    @every_method
    def test_models_must_return_one_float_array(self, method, model):
        twice = make(method, lambda x: (model(x), x))
        with pytest.raises(ValueError, match="one array of logits, got tuple"):
            jax.eval_shape(twice, example())
        whole = make(method, lambda x: (9 * model(x)).astype(jnp.int32))
        with pytest.raises(ValueError, match="floats, got int32"):
            jax.eval_shape(whole, example())

    @on_any_model
    def test_inputs_must_be_floats(self, method, model):
        cast = make(method, lambda x: model(x.astype(jnp.float32)))
        with pytest.raises(ValueError, match=r"int32\[5, 8\]: it must look up"):
            jax.eval_shape(cast, jnp.ones((LENGTH, WIDTH), jnp.int32))
        fixed = make(method, lambda x: model(example()))
        with pytest.raises(ValueError, match="must be a float array, got bool"):
            jax.eval_shape(fixed, jnp.ones(3, bool))
        with pytest.raises(ValueError, match="no arrays"):
            fixed(())

    @on_any_model
    def test_argnums_must_exist(self, method, model):
        with pytest.raises(ValueError, match="`argnums` is 3, but 1 positional"):
            jax.eval_shape(make(method, model, argnums=3), example())

    @over([method for method in METHODS if method.many])
    def test_several_arguments_at_once(self, method, model):
        both = make(method, lambda a, b: model(a + b), argnums=(0, 1))
        left, right = jax.eval_shape(both, example(), example()).scores
        assert left.shape == right.shape == (LENGTH, WIDTH)

    @over([method for method in METHODS if method.halves])
    def test_pytrees(self, method, model):
        mapped = make(method, lambda x: model(x["left"] + x["right"]))
        half = 0.5 * example()
        inputs = {"left": half, "right": half}
        scores = jax.jit(partial(mapped, target=2))(inputs).scores
        whole = once(method, example(), 2).scores
        both = scores["left"] + scores["right"]
        close(both if method.halves == "sum" else scores["left"], whole)

    @over([method for method in METHODS if method.random])
    def test_a_random_method_needs_a_key_and_obeys_it(self, method, model):
        explain = method.make(model)
        with pytest.raises(ValueError, match="is random: pass `key="):
            jax.eval_shape(explain, example())


MATRIX = jax.random.normal(jax.random.key(1), (CLASSES, WIDTH))
POINT, START = jax.random.normal(jax.random.key(2), (2, WIDTH))


class TestClosedForms:
    @over([method for method in METHODS if method.linear is not None])
    def test_linear(self, method):
        explain = make(method, lambda x: MATRIX @ x)
        scores = jax.jit(partial(explain, target=2))(POINT).scores
        expected = method.linear(POINT, MATRIX[2])
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)

    @over([method for method in METHODS if method.from_baseline])
    def test_linear_from_a_baseline(self, method):
        """A number, an array, one that is traced, and a function of the input."""

        def explain(x, traced):
            makes = (0.5, START, traced, lambda x: traced)
            given = [make(method, lambda x: MATRIX @ x, baseline=b) for b in makes]
            return [each(x, target=2).scores for each in given]

        found = jax.jit(explain)(POINT, START)
        for scores, start in zip(found, (0.5, START, START, START), strict=True):
            expected = MATRIX[2] * (POINT - start)
            np.testing.assert_allclose(scores, expected, rtol=5e-5, atol=2e-6)

    @over([method for method in METHODS if method.quadratic])
    def test_quadratic(self, method):
        """From zero, x'Qx gives x * Qx for a symmetric Q."""
        root = jax.random.normal(jax.random.key(4), (WIDTH, WIDTH))
        matrix = root + root.T
        explain = make(method, lambda x: (x @ matrix @ x)[None])
        scores = jax.jit(partial(explain, target=0))(POINT).scores
        expected = POINT * (matrix @ POINT)
        np.testing.assert_allclose(scores, expected, atol=1e-5 * np.abs(expected).max())

    @on_any_model
    def test_a_constant_gives_zeros(self, method):
        explain = make(method, lambda x: jnp.array([3.0, 4.0]))
        attribution = jax.jit(explain)(example())
        assert not np.any(attribution.scores) or not method.zero
        assert attribution.output == 4
        for name, value in attribution.diagnostics.items():
            assert np.all(np.isfinite(value)), name
        if method.complete is not None:
            assert attribution.diagnostics["completeness_gap"] == 0
            assert attribution.diagnostics.get("converged", True)

    @over([method for method in METHODS if method.complete is not None])
    def test_completeness(self, method, model):
        attribution = once(method, example(), 1)
        diagnostics = attribution.diagnostics
        change = attribution.output - diagnostics["baseline_output"]
        gap = abs(float(attribution.scores.sum() - change))
        assert gap < method.complete * abs(change)
        near(diagnostics["absolute_gap"], gap, atol=5e-6)
        near(diagnostics["completeness_gap"], gap / abs(change), atol=2e-5)
        if method.from_baseline:
            near(diagnostics["baseline_output"], model(jnp.zeros_like(example()))[1])
