"""What can be read inside a model, as a name and a few static facts."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

ATTENTION_LIKE = ("attention", "inverted", "pooling", "router")


@dataclasses.dataclass(frozen=True)
class Site:
    """A place in a model whose values can be captured, perturbed or replaced.

    Attributes:
      name: Stable across runs: the name scopes (or the path of the parameters) it
        lies in, and its number where several share them.
      kind: `attention`; `inverted`, normalised over queries; `pooling`, without a
        query-key product; `router`, gates of experts; `embedding`, a table looked
        up by an integer input; `named`, marked by `checkpoint_name`; `block`, the
        input of a layer; `convolution`, the output of one, its bias included;
        `unknown`, seen but not understood.
      loops: Lengths of the loops it lies in, outermost first.
      turns: What each loop around attention runs over: `layers`; `reversed`, layers
        with the last one first; `queries`, contiguous chunks of them; `parallel`,
        anything else, as heads or shards.
      shape: Shape of its probabilities `[*loops, batch, head, query, key]`, or of
        its activation.
      causal: Whether its mask lets a query see earlier keys only, with the last
        query at the last key; None where that cannot be told before the program
        runs. Chunks of queries are counted as the one sequence they are.
      window: How far a query sees `(left, right)`, where that is provable.
      scale: What the query-key product is multiplied by; None where the way from
        the product to the softmax is not understood.
      softcap: `c` of `c * tanh(scores / c)`.
      values: What `capture` can read of it.
      channel_axis: For a convolution, which axis holds its channels, counted from
        the last.
      inputs: For an embedding, which array arguments are looked up, counted flat.
      order: Where in the program it runs: positions of the loops around it, then
        its own.
      joins: The site before it, if one product weighs values by the probabilities of
        both, as in differential attention.
      beside: The site before it, if that does not feed this one, as in branches that
        run side by side.
      why: What was not understood, as a sentence.
    """

    name: str
    kind: str
    loops: tuple[int, ...] = ()
    turns: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    causal: bool | None = None
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    values: tuple[str, ...] = ()
    channel_axis: int | None = None
    inputs: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    joins: str = ""
    beside: str = ""
    why: str = ""


def positions(site: Site) -> tuple[int, int]:
    """How many queries and keys attention has, all chunks of queries together."""
    query, key = site.shape[-2:]
    return (query * site.loops[-1] if site.turns[-1:] == ("queries",) else query), key


# None (every attention-like site), names or sites, or a predicate.
Selection = Iterable[str | Site] | Callable[[Site], bool] | None


def select(sites: Sequence[Site], wanted: Selection) -> tuple[Site, ...]:
    """Picks sites; by default all that weigh values by a softmax.

    Raises:
      ValueError: If a name is not among the sites.
    """
    if wanted is None:
        return tuple(site for site in sites if site.kind in ATTENTION_LIKE)
    if callable(wanted):
        return tuple(site for site in sites if wanted(site))
    if isinstance(wanted, str):
        wanted = (wanted,)
    names = [each.name if isinstance(each, Site) else each for each in wanted]
    known = {site.name: site for site in sites}
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"no site is named {missing}; there are {sorted(known)}")
    return tuple(known[name] for name in names)
