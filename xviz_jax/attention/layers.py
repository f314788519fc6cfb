"""A model's self-attention as a list of layers, in the order they run."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from xviz_jax import tracing
from xviz_jax.tracing import Site


def self_attention_sites(sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites that an attention method for one sequence can use.

    Raises:
      ValueError: If the model has none, if something in it looks like attention but
        is not understood, or if the sites do not belong to one sequence.
    """
    unknown = [site for site in sites if site.kind == "unknown"]
    if unknown:
        listed = "; ".join(f"{site.name!r}: {site.why}" for site in unknown)
        raise ValueError(f"the model has attention that is not understood: {listed}")
    found = tuple(site for site in sites if site.kind == "attention")
    if not found:
        kinds = sorted({site.kind for site in sites}) or ["nothing"]
        raise ValueError(
            f"the model has no attention to explain; tracing found {', '.join(kinds)}"
        )
    for site in found:
        if "probabilities" not in site.values:
            raise ValueError(
                f"the probabilities of {site.name!r} cannot be read: {site.why}"
            )
        batch, _, query, key = site.shape[len(site.loops) :]
        if batch != 1:
            raise ValueError(
                f"{site.name!r} has a batch of {batch}; a model takes one example "
                "here: use `xv.single`, and `jax.vmap` for a batch"
            )
        if query != key or key != found[0].shape[-1]:
            raise ValueError(
                f"{site.name!r} has {query} queries and {key} keys; this method takes "
                f"self-attention over one sequence, here of {found[0].shape[-1]}"
            )
    return found


def in_order(sites: Sequence[Site], captured: dict[str, dict[str, Any]], value: str):
    """A value of each layer, in the order the layers run.

    A loop's layers are its turns; where several sites share a loop, turn by turn.

    Args:
      sites: Sites of one sequence.
      captured: As `tracing.capture` returns it.
      value: Which value of each site.

    Returns:
      A list with one array for each layer.
    """
    layers: list[tuple[tuple[int, ...], jax.Array]] = []
    for site in sites:
        array = captured[site.name][value]
        for turn in _turns(site.loops):
            layers.append((_place(site, turn), array[turn]))
    layers.sort(key=lambda layer: layer[0])
    return [array for _, array in layers]


def count(sites: Sequence[Site]) -> int:
    """How many layers the sites make."""
    return sum(len(_turns(site.loops)) for site in sites)


def _turns(loops: tuple[int, ...]) -> list[tuple[int, ...]]:
    turns: list[tuple[int, ...]] = [()]
    for length in loops:
        turns = [(*turn, index) for turn in turns for index in range(length)]
    return turns


def _place(site: Site, turn: tuple[int, ...]) -> tuple[int, ...]:
    """Sorts by loop, then by turn, then by position within it."""
    padded = (*(0,) * (len(site.order) - 1 - len(turn)), *turn, 0)
    pairs = zip(site.order, padded, strict=True)
    return tuple(number for pair in pairs for number in pair)


def capture(
    model: Callable, args: Sequence[Any], values: Sequence[str]
) -> tuple[jax.Array, tuple[Site, ...], dict[str, dict[str, Any]]]:
    """The model's output, its self-attention sites, and their values."""
    sites = self_attention_sites(tracing.sites(model, *args))
    output, captured = tracing.capture(model, values, sites)(*args)
    return output, sites, captured
