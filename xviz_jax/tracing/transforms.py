"""Read, perturb and replace what happens inside a model.

Each takes a function and returns a function, like `jax.grad`. They compose with
`jit`, `grad`, `vmap` and `shard_map` in any order; called outside `jit`, they trace
the model anew each time.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax.tracing import interpreter, loops
from xviz_jax.tracing.interpreter import Plan
from xviz_jax.tracing.program import Located, Program, trace
from xviz_jax.tracing.site import Selection, Site, select
from xviz_jax.tracing.values import AttentionValues

# What to keep of a site's values, of one turn of a loop; by name.
Keep = Callable[[dict[str, jax.Array]], dict[str, jax.Array]]
VALUES = (
    "query",
    "key",
    "value",
    "bias",
    "mask",
    "remaining_mask",
    "logsumexp",
    "probabilities",
    "output",
    "activation",
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
      values: Among `query, key, value, bias, mask, remaining_mask, logsumexp,
        probabilities, output, activation`. Probabilities are
        `[*loops, batch, head, query, key]`; query, key, value and output
        `[*loops, batch, length, head, dim]`; logsumexp is float32
        `[*loops, batch, head, query]`; bias and mask are laid out like the
        probabilities, with size 1 where they do not vary. The remaining mask is what
        the site's `causal` and `window` leave unsaid.
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
        return read(program, dict.fromkeys(_names(program, sites), values))

    return captured


def read(
    program: Program,
    values: Mapping[str, Sequence[str]],
    *,
    once: bool = False,
    keep: Mapping[str, Keep] | None = None,
):
    """Runs a traced program and reads `values` of each site that is named.

    Args:
      program: A traced model.
      values: Which values of which site.
      once: Where a value is the same at every turn of a loop, give it once: the
        loop's axis then has size 1.
      keep: By site, what to make of its values, and to read instead of them. What a
        loop stacks is as small as that.

    Returns:
      As a `capture`d model.
    """
    plan = Plan(program.graph)
    for located in program.located:
        name = located.site.name
        if keep and name in keep:
            _read_together(plan, located, values[name], keep[name])
        else:
            _read(plan, located, values.get(name, ()), once)
    outs, found = interpreter.run(plan, program.inputs, {})
    return program.rebuild(outs), _in_order(program, found)


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
            plan.reach(chosen[name].body, name)
            chosen[name].values.rewrite(plan, name, _add)
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
            plan.reach(located.body, located.site.name)
            change = functools.partial(_replaced, rule, located.site)
            located.values.rewrite(plan, located.site.name, change)
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
        names = _names(program, sites)
        return read_cotangents(program, scalar, dict.fromkeys(names, values))

    return cotangents


def read_cotangents(
    program: Program,
    scalar: Callable[[Any], jax.Array],
    values: Mapping[str, Sequence[str]],
    *,
    once: bool = False,
    keep: Mapping[str, Keep] | None = None,
):
    """Runs a traced program forward and backward, and reads what is named.

    Args:
      program: A traced model.
      scalar: As for `attention_cotangents`.
      values: Which values of which site.
      once: As for `read`.
      keep: By site, what to make of its `probabilities` and `probabilities_cotangent`,
        float32, and to read instead of its values. It is made on the way backward,
        where both are at hand.

    Returns:
      As `attention_cotangents`.
    """
    plan = Plan(program.graph)
    keep = keep or {}
    apart = {name: each for name, each in values.items() if name not in keep}
    zeros, place = add_zeros(plan, program, apart, once)
    kept = {
        located.site.name: _tap(plan, located, keep[located.site.name])
        for located in program.located
        if located.site.name in keep
    }

    def explained(added):
        outs, found = interpreter.run(plan, program.inputs, added)
        output = program.rebuild(outs)
        return scalar(output), (output, found)

    gradient = jax.grad(explained, has_aux=True)
    gradients, (output, found) = gradient({**zeros, **kept})
    for name, each in gradients.items():
        own = each if name in kept else {f"{place[name]}_cotangent": each}
        found.setdefault(name, {}).update(own)
    return output, _in_order(program, found)


def _tap(plan: Plan, located: Located, keep: Keep) -> dict[str, jax.Array]:
    """Plans what is made of probabilities and their gradient.

    Returns:
      Zeros, whose "gradient" it is.
    """
    site = located.site
    if not isinstance(located.values, AttentionValues):
        raise NotImplementedError(f"{site.name!r} keeps its probabilities to itself")

    def made(value: jax.Array, cotangent: jax.Array) -> dict[str, jax.Array]:
        return keep({"probabilities": value, "probabilities_cotangent": cotangent})

    def tapped(value: jax.Array, sink: Any, canonical: Callable) -> jax.Array:
        if sink is None:
            return value

        @jax.custom_vjp
        def same(value: jax.Array, sink: dict[str, jax.Array]) -> jax.Array:
            del sink
            return value

        def forward(value: jax.Array, sink: Any) -> tuple[jax.Array, jax.Array]:
            del sink
            return value, value

        def backward(value: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, Any]:
            return cotangent, made(canonical(value), canonical(cotangent))

        same.defvjp(forward, backward)
        return same(value, sink)

    plan.reach(located.body, site.name)
    located.values.tap(plan, site.name, tapped)
    one = jax.ShapeDtypeStruct(site.shape[len(site.loops) :], jnp.float32)
    return {
        name: jnp.zeros((*site.loops, *each.shape), each.dtype)
        for name, each in jax.eval_shape(made, one, one).items()
    }


def add_zeros(
    plan: Plan, program: Program, values: Mapping[str, Sequence[str]], once: bool
) -> tuple[dict[str, jax.Array], dict[str, str]]:
    """Plans zeros at sites, to differentiate by, and reads what is named beside them.

    Returns:
      The zeros by site, and whether they are added to its `output` or `probabilities`.
    """
    zeros: dict[str, jax.Array] = {}
    place: dict[str, str] = {}
    for located in program.located:
        name, site = located.site.name, located.site
        if name not in values:
            continue
        plan.reach(located.body, name)
        shape = located.values.add_to_output(plan, name)
        if shape is not None:
            place[name], shape = "output", (*site.loops, *shape)
            _read(plan, located, values[name], once)
        else:
            place[name], shape = "probabilities", site.shape
            located.values.rewrite(plan, name, _add)
            names = (*values[name], "probabilities")
            _read(plan, located, names, once)
        zeros[name] = jnp.zeros(shape, jnp.float32)
    return zeros, place


def _names(program: Program, wanted: Selection) -> list[str]:
    return [located.site.name for located in _chosen(program, wanted)]


def _chosen(program: Program, wanted: Selection) -> tuple[Located, ...]:
    chosen = {site.name for site in select(program.sites, wanted)}
    for site in program.sites:
        if site.name in chosen and site.kind == "unknown":
            raise ValueError(f"{site.name!r} is not understood: {site.why}")
    return tuple(each for each in program.located if each.site.name in chosen)


def _in_order(program: Program, found: dict) -> dict:
    return {site.name: found[site.name] for site in program.sites if site.name in found}


def _read(
    plan: Plan, located: Located, names: Sequence[str], once: bool = False
) -> None:
    site, body = located.site, located.body
    for name in names:
        if name in site.values:
            atoms, read = located.values.readers()[name]()
            plan.read(body, site.name, name, atoms, read)
            if once:
                for each in loops.constant_in(plan.graph, body, atoms):
                    plan.once.setdefault(each, set()).add((site.name, name))


def _read_together(
    plan: Plan, located: Located, names: Sequence[str], keep: Keep
) -> None:
    site, readers = located.site, located.values.readers()
    found = {name: readers[name]() for name in names if name in site.values}
    atoms = [atom for each, _ in found.values() for atom in each]
    values = lambda get: {name: read(get) for name, (_, read) in found.items()}
    plan.keep(located.body, site.name, atoms, lambda get: keep(values(get)))


def _replaced(rule: Callable, site: Site, value: jax.Array, _: Any) -> jax.Array:
    changed = rule(site, value)
    if jnp.shape(changed) != value.shape:
        raise ValueError(
            f"the rule must return an array of {value.shape} for {site.name!r}, got "
            f"{jnp.shape(changed)}"
        )
    return changed


def _add(value: jax.Array, given: Any) -> jax.Array:
    return value if given is None else value + jnp.asarray(given).astype(value.dtype)
