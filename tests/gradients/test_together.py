"""Several explanations, and several targets, in one pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xviz_jax as xv
from tests.contract.table import CLASSES, example, parameters, transformer
from xviz_jax.gradients.sharing import shared

WEIGHTS = parameters()[1:]
KEY = jax.random.key(0)
ZEROS = xv.baselines.zeros()


def model(x):
    return transformer(WEIGHTS, x)


def scanned(x):
    """The same in one loop over layers."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *WEIGHTS[:-1])

    def layer(x, weights):
        mixed = jnp.tanh(x @ weights["up"]) @ weights["down"]
        return x + jax.nn.relu(x @ weights["query"]) + mixed, None

    return jax.lax.scan(layer, x, stacked)[0][0] @ WEIGHTS[-1]["head"]


def products(function, *args):
    """Matrix products that a program runs, each as often as its loop turns."""

    def count(jaxpr, turns):
        found = 0
        for eqn in jaxpr.eqns:
            found += turns * (eqn.primitive.name == "dot_general")
            inner = turns * eqn.params.get("length", 1)
            for value in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
            ):
                each = getattr(value, "jaxpr", value)
                if hasattr(each, "eqns"):
                    found += count(each, inner)
        return found

    return count(jax.make_jaxpr(function)(*args).jaxpr, 1)


def flops(function, *args):
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def explainers(model):
    return {
        "saliency": xv.saliency(model),
        "input_x_gradient": xv.input_x_gradient(model),
        "integrated_gradients": xv.integrated_gradients(model, steps=4, chunk=4),
        "feature_ablation": xv.feature_ablation(
            model, groups=lambda x: xv.patches(x.shape, (1,)), chunk=5
        ),
    }


def bits(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("net", [model, scanned])
def test_equal_to_separate_runs(net):
    """To the bit, adaptive paths and paths that are shared too."""
    each = {
        **explainers(net),
        "adaptive": xv.integrated_gradients(net),
        "adaptive, again": xv.integrated_gradients(net, baseline=ZEROS),
        "again": xv.integrated_gradients(net, baseline=ZEROS, steps=4, chunk=4),
    }
    if net is model:
        each["attention_rollout"] = xv.attention_rollout(net)
        each["grad_cam"] = xv.grad_cam(net)
    both = jax.jit(xv.together(*each.values()))(example(), key=KEY)
    for (name, explain), found in zip(each.items(), both, strict=True):
        alone = jax.jit(explain)(example(), key=KEY)
        if name == "attention_rollout":
            # XLA of JAX 0.10.0 fuses a forward pass otherwise where it is alone.
            np.testing.assert_allclose(found.output, alone.output, rtol=1e-6)
            alone = dataclasses.replace(alone, output=found.output)
        bits(alone, found)


@pytest.mark.parametrize("net", [model, scanned])
@pytest.mark.parametrize("options", [{}, {"steps": 8, "chunk": 4}])
def test_a_path_that_two_methods_walk_is_walked_once(net, options):
    """A node is evaluated once for both, whether a rule or the path asks for it."""
    x = example()
    first = xv.integrated_gradients(net, **options)
    second = xv.integrated_gradients(net, baseline=ZEROS, **options)
    assert products(xv.together(first, second), x) == products(first, x)


def test_gradients_along_a_path_serve_two_methods():
    x, options = example(), {"at": "stream", "steps": 4, "chunk": 4}
    conductance = xv.conductance(model, **options)
    influence = xv.internal_influence(model, **options)
    both = products(xv.together(conductance, influence), x)
    # The sum over nodes is all that the other one adds.
    assert both == products(xv.together(conductance), x) + 1


def test_one_gradient_serves_two_methods_and_one_forward_the_rest():
    """Counted before the compiler sees it, and after."""
    x, each = example(), explainers(model)
    pair = xv.together(each["saliency"], each["input_x_gradient"])
    assert products(pair, x) == products(each["saliency"], x)
    np.testing.assert_allclose(flops(pair, x), flops(each["saliency"], x), rtol=0.03)

    forward = products(model, x)
    whole = products(xv.together(*each.values()), x)
    apart = sum(products(explain, x) for explain in each.values())
    # A gradient less, and the forward at the input once and not three times.
    assert whole == apart - products(each["saliency"], x) - 2 * forward


def test_rollout_rides_on_the_gradients_forward():
    x = example()
    rollout, saliency = xv.attention_rollout(model), xv.saliency(model)
    whole = products(xv.together(saliency, rollout), x)
    assert whole <= products(saliency, x) + products(rollout, x) - products(model, x)


def test_loops_that_are_equal_are_shared():
    x, each = example(), explainers(scanned)
    pair = xv.together(each["saliency"], each["input_x_gradient"])
    assert products(pair, x) == products(each["saliency"], x)


def test_batches_targets_and_parameters():
    both = xv.together(
        xv.saliency(transformer, argnums=1), xv.input_x_gradient(transformer, argnums=1)
    )
    batch, targets = example(2), jnp.array([2, 0])
    explain = jax.vmap(lambda x, t: both(WEIGHTS, x, target=t))
    first, second = jax.jit(explain)(batch, targets)
    for index in range(2):
        single = xv.saliency(model)(batch[index], target=int(targets[index]))
        np.testing.assert_allclose(first.scores[index], single.scores, rtol=1e-4)
    np.testing.assert_allclose(
        np.abs(second.scores), np.abs(batch) * first.scores, rtol=1e-5
    )
    named, _ = xv.together(xv.saliency(model), xv.input_x_gradient(model))(
        example(), target=lambda logits: logits[1]
    )
    near = xv.saliency(model)(example(), target=1)
    np.testing.assert_allclose(named.scores, near.scores, rtol=1e-5)
    with pytest.raises(ValueError, match="at least one"):
        xv.together()


def test_what_only_looks_equal_is_not_shared():
    def program(x):
        key = jax.random.key(0)
        other = jax.random.key(1)
        same = jax.random.normal(key) - jax.random.normal(key)
        return jnp.sin(x) - jnp.sin(x + 0), same, jax.random.normal(other), x * 2, x * 3

    for a, b in zip(program(1.5), shared(program)(1.5), strict=True):
        assert a == b


class TestManyTargets:
    explain = staticmethod(xv.many_targets(xv.saliency(model, signed=True)))

    def test_every_class(self):
        found = jax.jit(self.explain)(example())
        assert found.scores.shape == (CLASSES, *example().shape)
        expected = jax.jacrev(model)(example())
        np.testing.assert_allclose(found.scores, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.output, model(example()), rtol=1e-5)

    def test_one_forward_and_one_batched_backward(self):
        x = example()
        one = products(xv.saliency(model), x)
        assert products(self.explain, x) == one
        forward, backward = flops(model, x), flops(xv.saliency(model), x)
        backward -= forward
        assert flops(self.explain, x) < forward + 1.1 * CLASSES * backward

    def test_classes_pairs_and_functions(self):
        targets = [1, (1, 2), lambda logits: logits[3] ** 2]
        found = xv.many_targets(xv.saliency(model), targets)(example())
        for index, target in enumerate(targets):
            single = xv.saliency(model)(example(), target=target)
            np.testing.assert_allclose(found.scores[index], single.scores, rtol=1e-4)
            np.testing.assert_allclose(found.output[index], single.output, rtol=1e-5)

    def test_any_method(self):
        explain = xv.integrated_gradients(model, steps=4)
        found = xv.many_targets(explain, [0, 3])(example())
        single = explain(example(), target=3)
        np.testing.assert_allclose(found.scores[1], single.scores, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("targets", [[], [None]])
    def test_wrong_targets(self, targets):
        with pytest.raises(ValueError, match="`targets` are classes"):
            xv.many_targets(xv.saliency(model), targets)

    def test_a_class_outside_the_logits_is_refused(self):
        with pytest.raises(ValueError, match="from 0 to 3, got 4"):
            xv.many_targets(xv.saliency(model), [4])(example())
