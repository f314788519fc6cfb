"""Read, perturb and replace what happens inside a model.

Each takes a function and returns a function, like `jax.grad`. They compose with
`jit`, `grad`, `vmap` and `shard_map` in any order; called outside `jit`, they trace
the model anew each time.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax.tracing import axes as axis_maps
from xviz_jax.tracing import interpreter
from xviz_jax.tracing.interpreter import Plan
from xviz_jax.tracing.program import Located, Program, trace
from xviz_jax.tracing.site import Selection, Site, select

VALUES = (
    "query",
    "key",
    "value",
    "bias",
    "mask",
    "logsumexp",
    "probabilities",
    "output",
    "activation",
)

# What leaves probabilities as they are, but for their shape and dtype.
_KEEPING = (
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "copy_p",
    "device_put",
    "expand_dims",
    "layout_constraint",
    "name",
    "optimization_barrier",
    "pvary",
    "reduce_precision",
    "reshape",
    "reshard",
    "sharding_constraint",
    "squeeze",
    "transpose",
)


def sites(model: Callable, *args: Any, **kwargs: Any) -> tuple[Site, ...]:
    """Names what can be read inside a model.

    Nothing is run: arguments may be arrays or `jax.ShapeDtypeStruct`s.

    Args:
      model: Any JAX function.
      *args: Its arguments.
      **kwargs: Its keyword arguments.

    Returns:
      The sites, in program order.
    """
    return trace(model, args, kwargs).sites


def capture(
    model: Callable,
    values: Sequence[str] = ("probabilities",),
    sites: Selection = None,
) -> Callable:
    """Returns values from inside a model together with its output.

    The output is the model's own, bit for bit. What a site does not have is left
    out: a `bias` where none is added, say.

    Args:
      model: Any JAX function.
      values: Among `query, key, value, bias, mask, logsumexp, probabilities,
        output, activation`. Probabilities are `[*loops, batch, head, query, key]`;
        query, key, value and output `[*loops, batch, length, head, dim]`;
        logsumexp is float32 `[*loops, batch, head, query]`; bias and mask are laid
        out like the probabilities, with size 1 where they do not vary.
      sites: Which sites: names or `Site`s, a predicate, or by default all that
        weigh values by a softmax.

    Returns:
      A function of the model's arguments that returns
      `(output, {site name: {value name: array}})`.

    Raises:
      ValueError: If a value or a site has no such name.
    """
    values = (values,) if isinstance(values, str) else tuple(values)
    unknown = [value for value in values if value not in VALUES]
    if unknown:
        raise ValueError(f"`values` are among {VALUES}, got {unknown}")

    @functools.wraps(model)
    def captured(*args: Any, **kwargs: Any):
        program = trace(model, args, kwargs)
        plan = Plan(program.graph)
        for located in _chosen(program, sites):
            _read(plan, located, values)
        outs, found = interpreter.run(plan, program.inputs, {})
        return program.rebuild(outs), _in_order(program, found)

    return captured


def perturb(model: Callable, sites: Selection = None) -> Callable:
    """Adds arrays to the probabilities inside a model.

    Differentiable with respect to what is added, also inside `scan`, `remat` and
    `cond`: the gradient at zero is the gradient of the model's output with respect
    to its attention.

    Args:
      model: Any JAX function.
      sites: As for `capture`.

    Returns:
      A function of `({site name: array}, *args)` that returns the model's output.
      Each array is laid out like the site's probabilities; sites that are not
      named stay as they are.

    Raises:
      ValueError: If a name or a shape is wrong.
    """

    @functools.wraps(model)
    def perturbed(added: dict[str, Any], *args: Any, **kwargs: Any):
        program = trace(model, args, kwargs)
        chosen = {located.site.name: located for located in _chosen(program, sites)}
        plan = Plan(program.graph)
        for name, array in added.items():
            if name not in chosen:
                raise ValueError(f"no site is named {name!r}; there are {list(chosen)}")
            wanted, got = chosen[name].site.shape, jnp.shape(array)
            if wanted != got:
                raise ValueError(f"{name!r} takes an array of {wanted}, got {got}")
            _rewrite(plan, chosen[name], lambda value, extra: value + extra)
        outs, _ = interpreter.run(plan, program.inputs, dict(added))
        return program.rebuild(outs)

    return perturbed


def replace(
    model: Callable,
    rule: Callable[[Site, jax.Array], jax.Array],
    sites: Selection = None,
) -> Callable:
    """Computes the probabilities inside a model by a rule.

    Args:
      model: Any JAX function.
      rule: Maps a site and its probabilities `[batch, head, query, key]` (of one
        turn, inside a loop) to what takes their place.
      sites: As for `capture`.

    Returns:
      A function of the model's arguments.
    """

    @functools.wraps(model)
    def replaced(*args: Any, **kwargs: Any):
        program = trace(model, args, kwargs)
        plan = Plan(program.graph)
        for located in _chosen(program, sites):
            site = located.site
            _rewrite(plan, located, lambda value, _, site=site: rule(site, value))
        outs, _ = interpreter.run(plan, program.inputs, {})
        return program.rebuild(outs)

    return replaced


def attention_cotangents(
    model: Callable,
    scalar: Callable[[Any], jax.Array],
    sites: Selection = None,
    values: Sequence[str] = ("query", "key", "value", "output"),
) -> Callable:
    """Reads attention together with the gradient at its output.

    One forward and one backward pass. With output O = A V, the gradient at the
    probabilities is dL/dA = dL/dO Vᵀ, so no array of queries by keys is made. A
    site whose output is not that product (heads mixed after the softmax, dropout)
    has `probabilities` and `probabilities_cotangent` instead.

    Args:
      model: Any JAX function.
      scalar: Maps the model's output to the scalar that is explained.
      sites: As for `capture`.
      values: What to read besides, as for `capture`.

    Returns:
      A function of the model's arguments that returns
      `(output, {site name: {value name: array}})`, with `output_cotangent` among
      the values, laid out like `output`.
    """

    @functools.wraps(model)
    def cotangents(*args: Any, **kwargs: Any):
        program = trace(model, args, kwargs)
        plan = Plan(program.graph)
        zeros: dict[str, jax.Array] = {}
        place: dict[str, str] = {}
        for located in _chosen(program, sites):
            site = located.site
            direct = "output" in site.values and _is_direct(program, located)
            place[site.name] = "output" if direct else "probabilities"
            wanted = values if direct else (*values, "probabilities")
            _read(plan, located, wanted)
            if direct:
                zeros[site.name] = _add_to_output(plan, located)
            else:
                _rewrite(plan, located, lambda value, extra: value + extra)
                zeros[site.name] = jnp.zeros(site.shape, jnp.float32)

        def explained(added):
            outs, found = interpreter.run(plan, program.inputs, added)
            output = program.rebuild(outs)
            return scalar(output), (output, found)

        gradients, (output, found) = jax.grad(explained, has_aux=True)(zeros)
        for name, gradient in gradients.items():
            found.setdefault(name, {})[f"{place[name]}_cotangent"] = gradient
        return output, _in_order(program, found)

    return cotangents


def _chosen(program: Program, wanted: Selection) -> tuple[Located, ...]:
    chosen = {site.name for site in select(program.sites, wanted)}
    return tuple(each for each in program.located if each.site.name in chosen)


def _in_order(program: Program, found: dict) -> dict:
    return {site.name: found[site.name] for site in program.sites if site.name in found}


def _read(plan: Plan, located: Located, names: Sequence[str]) -> None:
    values, site = located.values, located.site
    for name in names:
        if name not in site.values:
            continue
        if name == "probabilities":
            atoms, read = values.probabilities()
        elif name in ("query", "key", "value"):
            atoms, read = values.operand(name)
        else:
            atoms, read = getattr(values, name)()
        plan.read(located.body, site.name, name, atoms, read)


def _rewrite(plan: Plan, located: Located, change: Callable) -> None:
    """Applies `change(probabilities, given)` to a site's probabilities."""
    values, reading = located.values, located.values.reading
    name = located.site.name
    plan.reach(located.body, name)
    if reading.deferred:
        _rewrite_deferred(plan, located, change)
        return

    def rewritten(value, get, given):
        native = axis_maps.from_view(value, reading.axes, reading.shape)
        canonical = values.canonical(native)
        changed = change(canonical, _cast(given, canonical.dtype))
        back = values.native(changed.astype(value.dtype))
        return axis_maps.to_view(back, reading.axes, reading.shape)

    plan.rewrite(reading.probability, name, rewritten)


def _rewrite_deferred(plan: Plan, located: Located, change: Callable) -> None:
    """Changes exponentials by what the change of probabilities comes to.

    The sum of the exponentials stays as it is, and so does the program when
    nothing is changed.
    """
    values, reading = located.values, located.values.reading
    softmax, combine = reading.softmax, reading.combine
    plan.want(softmax.exponential)
    keys = tuple(sorted(softmax.keys))

    def rewritten(value, get, given):
        exponential = values.exponential(get)
        # Summed here, because the program may do so only after the product.
        total = jnp.sum(exponential, axis=keys, keepdims=True, dtype=jnp.float32)
        total = total.astype(exponential.dtype)
        native = exponential / total
        canonical = values.canonical(native)
        changed = change(canonical, _cast(given, canonical.dtype))
        moved = values.native(changed.astype(native.dtype)) - native
        extra = axis_maps.to_view(moved * total, combine.axes, softmax.shape)
        return value + extra.astype(value.dtype)

    name = located.site.name
    plan.rewrite_operand(combine.node, combine.operand, name, rewritten)


def _add_to_output(plan: Plan, located: Located) -> jax.Array:
    """Lets an array be added to a site's output; returns zeros of its shape."""
    values, name = located.values, located.site.name
    atom, axes = values.output_place()
    aval = plan.graph.aval(atom)
    shape = jax.eval_shape(lambda x: values.canonical_output(x, axes), aval).shape
    plan.reach(located.body, name)

    def rewritten(value, get, given):
        del get
        if given is None:
            return value
        return value + values.native_output(given.astype(value.dtype), axes)

    plan.rewrite(atom, name, rewritten)
    return jnp.zeros((*located.site.loops, *shape), jnp.float32)


def _is_direct(program: Program, located: Located) -> bool:
    """Whether the output is the probabilities times the values, nothing between."""
    reading, graph = located.values.reading, program.graph
    if reading.kind not in ("attention", "pooling", "inverted", "router"):
        return False
    if "value" not in located.site.values:
        return False
    start = reading.softmax.exponential if reading.deferred else reading.probability
    atom = reading.combine.node.ins[reading.combine.operand]
    if reading.combine.node.primitive != "dot_general":
        product = graph.source(atom)
        if product is None:
            return False
        atom = next(each for each in product.ins if each != reading.combine.value)
    while atom != start:
        node = graph.source(atom)
        if node is None or node.primitive not in _KEEPING:
            return False
        atom = node.ins[node.outs.index(atom)]
    return True


def _cast(given, dtype):
    return None if given is None else jnp.asarray(given).astype(dtype)
