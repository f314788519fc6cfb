"""Relevance through attention inside one kernel, by edits at its operands.

A kernel that tracing knows keeps the derivative it comes with, which is attention's.
Each of its two products halves the gradient, so that query and key get a quarter of
it and value a half; conservatively value gets all of it (Arras et al., 2025, arXiv
2502.15886, section 3). Neither its scale nor its mask need be known.
"""

import dataclasses
from collections.abc import Callable, Iterator

from xviz_jax.tracing.fused import Fused, FusedValues
from xviz_jax.tracing.graph import CUSTOM_RULE, Atom, Node
from xviz_jax.tracing.program import Program


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel of attention with a derivative of its own.

    Attributes:
      call: The call that has the derivative.
      fused: What tracing read of it.
    """

    call: Node
    fused: Fused

    def shares(
        self, is_live: Callable[[Atom], bool], *, conservative: bool
    ) -> dict[int, float]:
        """The part of its gradient that each operand of the call gets, by position.

        Args:
          is_live: Whether a value depends on the input; what does not gets no part.
          conservative: Whether the map is a constant.

        Raises:
          ValueError: If more than query, key and value depends on the input.
        """
        others = {i: atom for i, atom in enumerate(self.call.ins) if is_live(atom)}
        found = []
        for operand in self.fused.operands:
            found.append(next((i for i in others if others[i] == operand), None))
            others.pop(found[-1], None)
        query, key, value = found
        if conservative and value is not None:
            constant = [i for i in (query, key, *others) if i is not None]
            return {value: 1.0} | dict.fromkeys(constant, 0.0)
        if others:
            where = f" in {self.call.scope!r}" if self.call.scope else ""
            raise ValueError(
                f"relevance has no rule for a kernel of attention{where} of which more "
                "than query, key and value depends on the input, as a bias may"
            )
        scores = [i for i in (query, key) if i is not None]
        share = 0.5 if scores and value is not None else 1.0
        parts = dict.fromkeys(scores, share / max(len(scores), 1))
        return parts if value is None else parts | {value: share}


def find(program: Program) -> Iterator[tuple[Node, Kernel]]:
    """Every operation inside a known kernel's call, with the kernel."""
    for located in program.located:
        if isinstance(located.values, FusedValues):
            fused = located.values.fused
            around = (each for each in fused.node.path if _is_custom(each))
            call = next(around, fused.node)
            if any(map(_is_custom, _all(call))):
                kernel = Kernel(call, fused)
                yield from ((leaf, kernel) for leaf in _all(call) if not leaf.children)


def _is_custom(node: Node) -> bool:
    return node.primitive in CUSTOM_RULE


def _all(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _all(child)
