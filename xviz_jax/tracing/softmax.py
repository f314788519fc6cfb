"""One exponential and what becomes of it."""

import dataclasses

from xviz_jax.tracing import axes as axis_maps
from xviz_jax.tracing.axes import AxisMap, Piece, axes_of
from xviz_jax.tracing.graph import Atom, Body, Node


@dataclasses.dataclass(frozen=True, eq=False)
class Combine:
    """A place where exponentials or probabilities are summed against values.

    Attributes:
      kind: `probability`, or `exponential` when the division comes after.
      node: A `dot_general`, or the `reduce_sum` of a product.
      operand: Which operand of `node` holds the weights.
      axes: The weights' axes, with respect to the softmax.
      value: What is weighed.
    """

    kind: str
    node: Node
    operand: int
    axes: AxisMap
    value: Atom

    def summed(self) -> set[int]:
        """Axes of the softmax that are summed over."""
        if self.node.primitive == "dot_general":
            dims = self.node.params["dimension_numbers"][0][self.operand]
        else:
            dims = self.node.params["axes"]
        return set().union(*[axes_of(self.axes[int(dim)]) for dim in dims])


@dataclasses.dataclass(frozen=True, eq=False)
class Deferred:
    """A division that comes after the product with the values.

    Attributes:
      combine: The product.
      quotient: What the division returns.
      axes: The quotient's axes, with respect to the product's result.
      by: What it is divided by, or, if `inverse`, multiplied by.
      by_axes: That value's axes, with respect to the softmax.
      inverse: Whether it is multiplied.
    """

    combine: Combine
    quotient: Atom
    axes: AxisMap
    by: Atom
    by_axes: AxisMap
    inverse: bool


@dataclasses.dataclass(eq=False)
class Softmax:
    """One exponential and what becomes of it.

    Axes are numbered as the exponential's own; `refined` cuts them as finely as a
    product's.
    """

    node: Node
    body: Body
    shape: tuple[int, ...]
    scores: dict[Node, AxisMap]
    # The exponential's own axes; more than one piece each once they are cut.
    axes: AxisMap = ()
    keys: frozenset[int] = frozenset()
    total: Atom = None
    total_axes: AxisMap = ()
    probability: Atom = None
    probability_axes: AxisMap = ()
    combines: list[Combine] = dataclasses.field(default_factory=list)
    # The exponentials are multiplied by a mask, or the normaliser is more than their
    # sum (sinks, plus one).
    modified: bool = False
    # By what exponentials are selected: the mask of their scores, as a rule.
    selections: list[Atom] = dataclasses.field(default_factory=list)
    # Whether what leaves it is changed before it weighs values.
    changed: bool = False
    deferred: "Deferred | None" = None

    @property
    def exponential(self) -> Atom:
        """The value `exp` returns."""
        return self.node.outs[0]

    def refined(self, product: Node) -> "Softmax":
        """The same with each axis cut where the axes of a product meet.

        Rows of several heads or examples may be flattened before the softmax; cut
        again, each axis has one role.
        """
        cuts: dict[int, list[Piece]] = {}
        for axis, size in enumerate(self.shape):
            stride, cuts[axis] = size, []
            for piece in self.scores[product][axis] or (Piece(0, 1, size),):
                stride //= piece.size
                number = sum(map(len, cuts.values()))
                cuts[axis].append(Piece(number, stride, piece.size))
            if len(cuts[axis]) == 1:
                cuts[axis] = [dataclasses.replace(cuts[axis][0], stride=1, size=size)]
            elif stride != 1:
                return self
        if all(len(cut) == 1 for cut in cuts.values()):
            return self
        shape = tuple(piece.size for cut in cuts.values() for piece in cut)

        def refine(axes: AxisMap) -> AxisMap:
            refined = axis_maps.refine(axes, cuts)
            if refined is None:
                raise _UnevenError
            return refined

        def view(axes: AxisMap) -> AxisMap:
            split = axis_maps.reshape(axes, shape)
            if split is None:
                raise _UnevenError
            return split

        try:
            combines = [
                dataclasses.replace(each, axes=refine(each.axes))
                for each in self.combines
            ]
            deferred = self.deferred
            if deferred is not None:
                place = self.combines.index(deferred.combine)
                deferred = dataclasses.replace(
                    deferred,
                    combine=combines[place],
                    by_axes=refine(deferred.by_axes),
                )
            return dataclasses.replace(
                self,
                shape=shape,
                scores={product: view(self.scores[product])},
                axes=refine(self.axes),
                keys=frozenset(p.axis for axis in self.keys for p in cuts[axis]),
                total_axes=refine(self.total_axes),
                probability_axes=refine(self.probability_axes),
                combines=combines,
                deferred=deferred,
            )
        except _UnevenError:
            return self


class _UnevenError(Exception):
    """An axis cannot be cut where another meets it."""
