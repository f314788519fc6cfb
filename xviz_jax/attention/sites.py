"""The sites of attention that a method can use, and why it cannot."""

from collections.abc import Sequence

from xviz_jax.attention.stack import is_chunked
from xviz_jax.attention.streams import check_positions, crossing
from xviz_jax.tracing import Site
from xviz_jax.tracing.program import Program
from xviz_jax.tracing.sequences import Sequences
from xviz_jax.tracing.site import positions


def of_one_sequence(program: Program) -> tuple[Site, ...]:
    """As `self_attention`, of a program that has no other sequence either.

    Raises:
      ValueError: As there; and if a site attends from one sequence to another.
    """
    sites = self_attention(program.sites)
    sequences = Sequences(program)
    check_positions(sequences, sites)
    other = crossing(sequences, sites)
    if other is not None:
        raise ValueError(
            f"{other.name!r} attends from one sequence to another of as many "
            "positions; this method takes self-attention over one sequence"
        )
    return sites


def self_attention(sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites that an attention method for one sequence can use.

    Raises:
      ValueError: If the model has none, if something in it looks like attention but
        is not understood, or if the sites do not belong to one sequence.
    """
    found = readable(sites)
    length = found[0].shape[-1]
    for site in found:
        _check_length(site, length)
    return found


def readable(sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites of attention, over whichever sequences.

    Raises:
      ValueError: If the model has none, or if something in it looks like attention
        but is not understood.
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
    lengths = {length for site in found for length in positions(site)}
    for site in sites:
        if site.kind in ("inverted", "pooling") and {*positions(site)} <= lengths:
            _check_left_out(site)
    for site in found:
        _check(site)
    return found


def _check_left_out(site: Site) -> None:
    """Refuses what mixes positions and is no attention: it must not be passed over."""
    if site.kind == "inverted":
        raise ValueError(
            f"the softmax of {site.name!r} is over queries, not over keys; this method "
            "does not see what it mixes"
        )
    if site.kind == "pooling" and site.shape[-2] > 1:
        raise ValueError(
            f"the scores of {site.name!r} are no product of queries and keys; this "
            "method does not see what it mixes"
        )


def named(sites: Sequence[Site], name: str) -> Site:
    """The site of attention of that name.

    Raises:
      ValueError: As `readable`; and if there is none.
    """
    found = {site.name: site for site in readable(sites)}
    if name not in found:
        raise ValueError(f"no attention is named {name!r}; there are {list(found)}")
    return found[name]


def _check(site: Site) -> None:
    if "probabilities" not in site.values and site.scale is None:
        raise ValueError(
            f"the probabilities of {site.name!r} cannot be read: {site.why}"
        )
    around = site.turns[:-1] if is_chunked(site) else site.turns
    if not set(around) <= {"layers", "reversed"}:
        raise ValueError(
            f"{site.name!r} lies in a loop over something else than layers, as heads, "
            "shards or examples; use `jax.vmap` there"
        )
    batch = site.shape[len(site.loops)]
    if batch != 1:
        raise ValueError(
            f"{site.name!r} has a batch of {batch}; a model takes one example "
            "here: use `xv.single`, and `jax.vmap` for a batch"
        )


def _check_length(site: Site, length: int) -> None:
    if site.beside:
        raise ValueError(
            f"{site.name!r} runs beside {site.beside!r} and not after it; this method "
            "takes layers one after another"
        )
    query, key = positions(site)
    if query != key or key != length:
        raise ValueError(
            f"{site.name!r} has {query} queries and {key} keys; this method takes "
            f"self-attention over one sequence, here of {length}"
        )
