"""Which sequence each attention site of a model reads, and which it writes."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import partial

from xviz_jax.tracing import Site, reordering
from xviz_jax.tracing.program import Program
from xviz_jax.tracing.sequences import Place, Run, Sequences
from xviz_jax.tracing.site import positions

_SIDES = ("query", "key")
_MANY = {"query": "queries", "key": "keys"}
# Of each attention site, by its name: the sequences of its queries and of its keys.
Naming = Mapping[str, tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Streams:
    """The sequences that a model's attention runs over.

    Attributes:
      of: Of each site, by its name: the sequences of its queries and of its keys.
      lengths: Positions of each sequence, in the order in which they first attend.
      read: Those that the model's output is read from.
      runs: Of each site and side, how far back its operand was made.
    """

    of: dict[str, tuple[str, str]]
    lengths: dict[str, int]
    read: tuple[str, ...]
    runs: dict[tuple[str, str], Run]

    def check(
        self,
        given: Mapping[str, object],
        option: str,
        known: Collection[str] | None = None,
    ) -> None:
        """Refuses an option that names what is no sequence, or none of some.

        Raises:
          ValueError: If it does.
        """
        known = list(self.lengths if known is None else known)
        if not set(given) <= set(known):
            raise ValueError(
                f"`{option}` is a dict by the sequences {known}, got {list(given)}"
            )

    @property
    def keys(self) -> dict[str, str]:
        """Of each site, by its name, the sequence of its keys."""
        return {name: key for name, (_, key) in self.of.items()}

    def by_queries(self, sites: Sequence[Site]) -> dict[str, list[Site]]:
        """Of each sequence that queries run over, their sites."""
        found: dict[str, list[Site]] = {}
        for site in sites:
            query, _ = self.of[site.joins or site.name]
            found.setdefault(query, []).append(site)
        return found


def crossing(sequences: Sequences, sites: Sequence[Site]) -> Site | None:
    """The first site whose queries and keys surely run over two sequences."""
    for site in sites:
        query, key = (sequences.run(site.name, side) for side in _SIDES)
        # Chunks of queries are slices of one sequence.
        chunked = site.turns[-1:] == ("queries",)
        if chunked or query.cut or key.cut or not (query.origins and key.origins):
            continue
        if not (query.origins <= key.origins or key.origins <= query.origins):
            return site
    return None


def is_one(sequences: Sequences, sites: Sequence[Site]) -> bool:
    """Whether all sites seem to run over one sequence: nothing tells them apart."""
    if crossing(sequences, sites) is not None:
        return False
    runs = [
        sequences.run(site.name, "query")
        for site in sites
        if site.turns[-1:] != ("queries",)
    ]
    whole = [run.origins for run in runs if run.origins and not run.cut]
    return all(whole[0] & origins for origins in whole[1:])


def check_positions(sequences: Sequences, sites: Sequence[Site]) -> None:
    """Refuses models whose scores would be of the wrong positions.

    Raises:
      ValueError: If attention is over positions in another order than before, or if
        the keys of a site are of one sequence and its values of another.
    """
    sites = [site for site in sites if site.turns[-1:] != ("queries",)]
    node = reordering.find(sequences, [site.name for site in sites])
    if node is not None:
        where = f" in {node.scope!r}" if node.scope else ""
        raise ValueError(
            f"{node.primitive!r}{where} puts positions of attention into another "
            "order, and scores would be of the wrong ones; if they are then another "
            "sequence, name it in `streams`"
        )
    for site in sites:
        key, value = (sequences.run(site.name, side) for side in ("key", "value"))
        told = all(run.origins and not run.cut for run in (key, value))
        if told and not key.origins & value.origins and _are_apart(sequences, site):
            raise ValueError(
                f"the keys of {site.name!r} are of one sequence and its values of "
                "another; this method gives to keys what is of values. If they are of "
                "one, name it in `streams`"
            )


def _are_apart(sequences: Sequences, site: Site) -> bool:
    """Whether nothing has a part in both keys and values of a site.

    Constants are of any sequence: values, or keys of constant queries.
    """
    constant = partial(sequences.is_constant, site.name)
    if constant("value") or (constant("key") and constant("query")):
        return False
    key, value = (sequences.made_from(site.name, side) for side in ("key", "value"))
    return key.isdisjoint(value)


def several(
    program: Program, sites: Sequence[Site], given: Naming | None
) -> Streams | None:
    """The sequences of a model that has more than one; None where there is one.

    Raises:
      ValueError: As `find`.
    """
    sequences = Sequences(program)
    if given is None:
        check_positions(sequences, sites)
    lengths = {length for site in sites for length in positions(site)}
    if given is None and len(lengths) == 1 and is_one(sequences, sites):
        return None
    found = find(sequences, sites, given)
    return found if len(found.lengths) > 1 else None


def find(sequences: Sequences, sites: Sequence[Site], given: Naming | None) -> Streams:
    """Tells the sequences of a model apart, by tracing or as they are given.

    Args:
      sequences: Of the traced model.
      sites: Its attention.
      given: Names of sequences, if they are not to be traced.

    Raises:
      ValueError: If they cannot be told apart, with the name of the site; if a site
        has no name among those given.
    """
    sites = [site for site in sites if not site.joins]
    runs = {
        (s.name, side): sequences.run(s.name, side) for s in sites for side in _SIDES
    }
    of = _named(sequences, sites, runs) if given is None else _given(sites, given)
    lengths: dict[str, int] = {}
    for site in sites:
        for stream, length in zip(of[site.name], positions(site), strict=True):
            if lengths.setdefault(stream, length) != length:
                raise ValueError(
                    f"the sequence {stream!r} has {lengths[stream]} positions, but "
                    f"{length} in {site.name!r}"
                )
    read = {of[name][0] for name in sequences.read() if name in of}
    return Streams(of, lengths, tuple(s for s in lengths if s in read), runs)


def _given(sites: Sequence[Site], given: Naming) -> dict[str, tuple[str, str]]:
    known = {site.name for site in sites}
    if set(given) != known:
        raise ValueError(
            f"`streams` names two sequences for each of {sorted(known)}, got names "
            f"for {sorted(given)}"
        )
    for name, pair in given.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(
                f"`streams` of {name!r} are those of its queries and of its keys, got "
                f"{pair!r}"
            )
    return {name: (query, key) for name, (query, key) in given.items()}


def _named(
    sequences: Sequences, sites: Sequence[Site], runs: dict[tuple[str, str], Run]
) -> dict[str, tuple[str, str]]:
    """Each sequence bears the name of the first site whose queries run over it."""
    for (name, side), run in runs.items():
        if not run.origins or run.cut:
            what = "selected or joined from others" if run.cut else "made of no input"
            raise ValueError(
                f"which sequence the {_MANY[side]} of {name!r} belong to cannot be "
                f"told, for its positions are {what}; name it in `streams`"
            )
    whole = [
        run.origins
        for run in runs.values()
        if not any(run.origins < other.origins for other in runs.values())
    ]
    found: dict[tuple[str, str], frozenset[Place]] = {}
    for place, run in runs.items():
        holding = {origins for origins in whole if run.origins <= origins}
        (origins, *others) = holding
        # What belongs to one sequence grows with each layer, and in one way.
        within = [other.origins for other in runs.values() if other.origins <= origins]
        branches = any(not (a <= run.origins or run.origins <= a) for a in within)
        if others or branches:
            raise ValueError(
                f"which sequence the {_MANY[place[1]]} of {place[0]!r} belong to "
                "cannot be told, for several were added; name it in `streams`"
            )
        found[place] = origins
    for place, run in runs.items():
        # As keys that are mixed, or selected, of all positions, once and for all.
        begun = not (run.now or run.earlier)
        for origins in whole:
            atoms = {atom for atom, _ in origins} - {a for a, _ in found[place]}
            if begun and atoms and sequences.made_of(*place, atoms):
                raise ValueError(
                    f"the {_MANY[place[1]]} of {place[0]!r} are made of other "
                    "positions than their own; name their sequence in `streams`"
                )
    names: dict[frozenset[Place], str] = {}
    for side, ending in (("query", ""), ("key", "/key")):
        for site in sites:
            names.setdefault(found[site.name, side], site.name + ending)
    return {
        site.name: (names[found[site.name, "query"]], names[found[site.name, "key"]])
        for site in sites
    }
