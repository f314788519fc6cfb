"""Layer-wise relevance propagation as edits of a program's gradient.

Relevance is an array times its gradient, so that linear operations need no rule:
their ordinary derivative is the epsilon rule without epsilon. What remains is edited
where a traced program has it (Achtibat et al., 2024, arXiv 2402.05602; the form with
gradients is of Arras et al., 2025, arXiv 2502.15886):

- an elementwise function f of one array has the slope f(x) / x;
- a norm's divisor is a constant;
- a product of two arrays halves the gradient, for each gets half of the relevance;
- a softmax keeps its derivative, or, conservatively, is a constant; so is a gate;
- a known kernel of attention keeps its own, edited at query, key and value.

LRP is patented for commercial use in some countries; see the methods' docstrings.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax.attention import relevance_kernels
from xviz_jax.tracing import compat, interpreter
from xviz_jax.tracing.compat import Literal
from xviz_jax.tracing.graph import Atom, Body, Node
from xviz_jax.tracing.interpreter import Plan
from xviz_jax.tracing.origins import same_result
from xviz_jax.tracing.program import Program, trace

_CURVED = (
    "abs atan cbrt clamp cos erf erf_inv erfc exp exp2 expm1 integer_pow log log1p "
    "logistic pow rsqrt sin sqrt square tanh"
).split()
_SHAPING = (
    "broadcast_in_dim convert_element_type copy expand_dims name optimization_barrier "
    "reduce_precision reshape sharding_constraint squeeze transpose"
).split()
# The gradient at the greatest of several is theirs alone, as its relevance is.
_LINEAR = (
    "add add_any all_gather concatenate cumsum dynamic_slice dynamic_update_slice "
    "gather max min mul neg pad pbroadcast pmax psum psum_invariant pvary reduce_max "
    "reduce_min reduce_sum reduce_window_sum rev scatter scatter-add select_n slice "
    "split sub div"
).split()
_ELEMENTWISE = (
    "add convert_element_type copy div max min mul name neg reduce_precision select_n "
    "sub"
).split()
_POWERS = ("pow", "rsqrt", "sqrt")
_STATISTIC = "abs add clamp div integer_pow max mul select_n square sub".split()
_NAME = "relevance"
_LONGEST_WALK = 40


def propagating(
    function: Callable[[Any], Any], x: Any, *, conservative: bool
) -> Callable[[Any], Any]:
    """The same function, with a gradient that times its input is relevance.

    Args:
      function: Of one pytree of float arrays.
      x: One such; only shapes and dtypes matter.
      conservative: Whether softmaxes and gates are constants.

    Raises:
      ValueError: If an operation on the way has no rule, with its name.
    """
    program = trace(function, (x,), {})
    plan = _Edits(program, conservative).plan()

    def run(other: Any) -> Any:
        outs, _ = interpreter.run(plan, jax.tree.leaves(other), {})
        return program.rebuild(outs)

    return run


@jax.custom_jvp
def _proportional(y: jax.Array, x: jax.Array) -> jax.Array:
    del x
    return y


@_proportional.defjvp
def _(primals: Any, tangents: Any) -> Any:
    y, x = primals
    slope = jnp.where(x == 0, 0, y / jnp.where(x == 0, 1, x))
    return y, (slope * tangents[1]).astype(y.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _shared(x: jax.Array, share: float) -> jax.Array:
    del share
    return x


@_shared.defjvp
def _(share: float, primals: Any, tangents: Any) -> Any:
    return primals[0], share * tangents[0]


class _Edits:
    """What depends on the input, what the output needs, and what is edited there."""

    def __init__(self, program: Program, conservative: bool):
        self.graph = graph = program.graph
        self.conservative = conservative
        self.kernels = dict(relevance_kernels.find(program))
        self.live: set[int] = {a for a in graph.root.ins if self._is_float(a)}
        # Of which array a value is an elementwise function, and whether that bends.
        self.roots: dict[int, tuple[int, bool]] = {}
        self.needed: set[int] = set()
        self.ordinary: set[int] = set()
        self.halved: dict[int, Body] = {}
        self.bent: dict[int, tuple[Body, int]] = {}
        self.shares: dict[tuple[Node, int], tuple[Body, float]] = {}
        self._spread(graph.root)
        self._need(graph.root, graph.root.outs)

    def plan(self) -> Plan:
        """All edits, for the interpreter."""
        plan = Plan(self.graph)
        for atom, body in self.halved.items():
            plan.reach(body, _NAME)
            plan.rewrite(atom, _NAME, lambda value, *_: _shared(value, 0.5))
        for atom, (body, root) in self.bent.items():
            plan.reach(body, _NAME)
            plan.want(root)
            plan.rewrite(
                atom,
                _NAME,
                lambda value, get, _, root=root: _proportional(
                    value, get(root).astype(value.dtype)
                ),
            )
        for (node, operand), (body, share) in self.shares.items():
            plan.reach(body, _NAME)
            part = lambda value, *_, share=share: (
                _shared(value, share) if share else jax.lax.stop_gradient(value)
            )
            plan.rewrite_operand(node, operand, _NAME, part)
        return plan

    def _is_float(self, atom: Atom) -> bool:
        dtype = getattr(self.graph.aval(atom), "dtype", None)
        return dtype is not None and jnp.issubdtype(dtype, jnp.floating)

    def _is_live(self, atom: Atom) -> bool:
        return not isinstance(atom, Literal) and atom in self.live

    # What depends on the input, from its first operation to its last.

    def _spread(self, body: Body) -> None:
        for node in body.leaves:
            if not any(map(self._is_live, node.ins)):
                continue
            if node.bodies and node.kind != "while":
                self._enter(node)
            elif node.primitive != "stop_gradient":
                self.live |= {out for out in node.outs if self._is_float(out)}
                if node not in self.kernels:
                    self._find_root(node)

    def _enter(self, node: Node) -> None:
        entering = node.ins[1:] if node.kind == "cond" else node.ins
        for inner in node.bodies:
            pairs = list(zip(entering, inner.ins, strict=True))
            self.live |= {own for atom, own in pairs if self._is_live(atom)}
            self._spread(inner)
            while self._carry(node, inner, self.live, backward=False):
                self._spread(inner)
            for own, out in zip(inner.outs, node.outs, strict=True):
                if self._is_live(own):
                    self.live.add(out)

    @staticmethod
    def _carry(node: Node, inner: Body, marked: set[int], *, backward: bool) -> bool:
        """Passes a mark on to a loop's next turn; whether that changed anything."""
        if node.kind != "scan":
            return False
        constants, carried = compat.scan_sizes(node.params)
        begins = inner.ins[constants : constants + carried]
        pairs = list(zip(inner.outs[:carried], begins, strict=True))
        if backward:
            pairs = [(begin, end) for end, begin in pairs]
        new = {
            there
            for here, there in pairs
            if not isinstance(here, Literal)
            and not isinstance(there, Literal)
            and here in marked
            and there not in marked
        }
        marked |= new
        return bool(new)

    def _find_root(self, node: Node) -> None:
        name, out = node.primitive, node.outs[0]
        if name not in (*_CURVED, *_ELEMENTWISE):
            return
        if name == "exp" and self._log_softmax(node.ins[0]):
            return
        live = [atom for atom in node.ins if self._is_live(atom)]
        others = [atom for atom in node.ins if not self._is_live(atom)]
        if name == "select_n":
            # Which is chosen does not matter, nor what stands in for the others.
            others = []
        roots = {self.roots.get(atom, (atom, False))[0] for atom in live}
        shapes = {self.graph.shape(atom) for atom in (*live, out)}
        if len(roots) > 1 or len(shapes) > 1 or not all(map(self._is_scalar, others)):
            return
        bends = (
            name in _CURVED
            or any(self.roots.get(atom, (0, False))[1] for atom in live)
            or (name == "mul" and len(live) > 1)
            or (name == "div" and self._is_live(node.ins[1]))
            or (name in ("add", "sub", "max", "min") and not all(map(_is_zero, others)))
        )
        self.roots[out] = (roots.pop(), bends)

    def _is_scalar(self, atom: Atom) -> bool:
        for _ in range(_LONGEST_WALK):
            if self.graph.shape(atom) == ():
                return True
            node = self.graph.source(atom)
            if node is None or node.primitive not in _SHAPING:
                return False
            atom = node.ins[0]
        return False

    # What the output needs, from its last operation to its first.

    def _need(self, body: Body, outs: list[Atom]) -> None:
        self.needed |= {atom for atom in outs if self._is_live(atom)}
        for node in reversed(body.leaves):
            kernel = self.kernels.get(node)
            outs = node.outs if kernel is None else kernel.call.outs
            if not any(out in self.needed for out in outs if self._is_live(out)):
                continue
            if kernel is not None:
                self._attend(body, kernel)
            elif node.bodies and node.kind != "while":
                self._leave(node)
            else:
                self.needed |= {a for a in self._rule(body, node) if self._is_live(a)}

    def _leave(self, node: Node) -> None:
        entering = node.ins[1:] if node.kind == "cond" else node.ins
        for inner in node.bodies:
            pairs = list(zip(inner.outs, node.outs, strict=True))
            wanted = [own for own, out in pairs if out in self.needed]
            self._need(inner, wanted)
            while self._carry(node, inner, self.needed, backward=True):
                self._need(inner, [])
            for atom, own in zip(entering, inner.ins, strict=True):
                if own in self.needed and self._is_live(atom):
                    self.needed.add(atom)

    def _attend(self, body: Body, kernel: relevance_kernels.Kernel) -> None:
        shares = kernel.shares(self._is_live, conservative=self.conservative)
        for operand, share in shares.items():
            self.shares[kernel.call, operand] = (body, share)
            if share:
                self.needed.add(kernel.call.ins[operand])

    def _rule(self, body: Body, node: Node) -> list[Atom]:
        """Edits one operation, and says which operands the gradient goes on to."""
        name, out = node.primitive, node.outs[0]
        live = [i for i, atom in enumerate(node.ins) if self._is_live(atom)]
        if out in self.ordinary:
            return node.ins
        root, bends = self.roots.get(out, (0, False))
        if bends:
            self.bent[out] = (body, root)
            return [root]
        if name == "exp":
            self.ordinary |= self._log_softmax(node.ins[0])
            return node.ins
        if name == "div" and 1 in live and 0 in live:
            return self._quotient(body, node)
        products = ("mul", "dot_general", "conv_general_dilated")
        if name in products and len(live) > 1:
            return self._product(body, node)
        if name in (*_LINEAR, *_SHAPING, *products):
            return node.ins
        where = f" in {node.scope!r}" if node.scope else ""
        raise ValueError(
            f"relevance has no rule for {name!r}{where}, which the output depends on"
        )

    def _quotient(self, body: Body, node: Node) -> list[Atom]:
        above, below = node.ins
        exponentials = self._softmax(above, below)
        if exponentials:
            self.ordinary |= exponentials
            return node.ins
        if self._is_norm(below):
            self.shares[node, 1] = (body, 0.0)
            return [above]
        where = f" in {node.scope!r}" if node.scope else ""
        raise ValueError(
            f"relevance has no rule for a quotient of two arrays{where} that is "
            "neither a softmax nor a norm"
        )

    def _product(self, body: Body, node: Node) -> list[Atom]:
        softmax = self._inverted_softmax(node)
        if softmax:
            self.ordinary |= softmax
            return node.ins
        is_mul = node.primitive == "mul"
        # What a norm scales may itself look like a gate.
        constant = [n for n in (0, 1) if is_mul and self._is_norm(node.ins[n])]
        if self.conservative and not constant:
            constant = [n for n in (0, 1) if self._is_gate(node, node.ins[n])]
        if constant:
            self.shares[node, constant[0]] = (body, 0.0)
            return [node.ins[1 - constant[0]]]
        self.halved[node.outs[0]] = body
        return node.ins

    def _is_gate(self, node: Node, atom: Atom) -> bool:
        bends = node.primitive != "dot_general" and self.roots.get(atom, (0, False))[1]
        return bends or self._is_probability(atom)

    def _inverted_softmax(self, node: Node) -> set[int]:
        """What a softmax is made of that multiplies by one over its sum; or nothing."""
        if node.primitive != "mul":
            return set()
        for above, below in (node.ins, node.ins[::-1]):
            passed = set()
            while (source := self.graph.source(below)) and source.primitive in _SHAPING:
                below = source.ins[0]
            if source is None:
                continue
            if source.primitive == "div" and not self._is_live(source.ins[0]):
                passed, below = set(source.outs), source.ins[1]
            elif source.primitive == "integer_pow" and source.params["y"] == -1:
                passed, below = set(source.outs), source.ins[0]
            exponentials = self._softmax(above, below) if passed else set()
            if exponentials:
                return exponentials | passed
        return set()

    def _log_softmax(self, atom: Atom) -> set[int]:
        """What the logarithm of a softmax is made of; nothing of anything else."""
        source = self.graph.source(atom)
        while source is not None and source.primitive in _SHAPING:
            source = self.graph.source(source.ins[0])
        if source is None or source.primitive != "sub":
            return set()
        scores, below = self._unshifted(source.ins[0]), source.ins[1]
        passed: set[int] = set()
        names = set[str]()
        for _ in range(_LONGEST_WALK):
            source = self.graph.source(below)
            if source is None:
                return set()
            live = [each for each in source.ins if self._is_live(each)]
            if source.primitive == "exp":
                same = self._unshifted(source.ins[0]) == scores
                whole = same and {"log", "reduce_sum"} <= names
                return passed | set(source.outs) if whole else set()
            names.add(source.primitive)
            if source.primitive in ("abs", "log"):
                passed |= set(source.outs)
            elif source.primitive not in (*_SHAPING, "add", "reduce_sum"):
                return set()
            if len(live) != 1:
                return set()
            below = live[0]
        return set()

    def _unshifted(self, atom: Atom) -> Atom:
        """Scores before what no relevance flows through was subtracted."""
        for _ in range(_LONGEST_WALK):
            source = self.graph.source(atom)
            if source is None or source.primitive not in (*_SHAPING, "sub"):
                break
            if source.primitive == "sub" and self._is_live(source.ins[1]):
                break
            atom = source.ins[0]
        return atom

    def _softmax(self, above: Atom, below: Atom) -> set[int]:
        """The exponentials that a quotient normalises, by whatever names; or none."""
        for _ in range(_LONGEST_WALK):
            source = self.graph.source(below)
            if source is None:
                return set()
            below = source.ins[0]
            if source.primitive == "reduce_sum":
                break
            if source.primitive not in (*_SHAPING, "add", "max"):
                return set()
        # Sums of 16-bit numbers are made in 32.
        summed = {below}
        while (source := self.graph.source(below)) and source.primitive in _SHAPING:
            below = source.ins[0]
            summed.add(below)
        passed = {above}
        for _ in range(_LONGEST_WALK):
            source = self.graph.source(above)
            if source is None:
                return set()
            if source.primitive == "exp":
                return passed | summed if self._is_same(source, summed) else set()
            live = [atom for atom in source.ins if self._is_live(atom)]
            shaping = (*_SHAPING, "mul", "select_n")
            if source.primitive not in shaping or len(live) != 1:
                return set()
            above = live[0]
            passed.add(above)
        return set()

    def _is_same(self, exponential: Node, summed: set[int]) -> bool:
        """Whether an exponential is what is summed, or is written there once more."""
        sources = map(self.graph.source, summed)
        return any(
            source is not None and same_result(self.graph, source, exponential)
            for source in sources
        )

    def _is_norm(self, atom: Atom) -> bool:
        """Whether a value is a power of sums over features, but for constants."""
        for _ in range(_LONGEST_WALK):
            node = self.graph.source(atom)
            if node is None:
                return False
            live = [each for each in node.ins if self._is_live(each)]
            if len(live) != 1:
                return False
            if node.primitive in _POWERS:
                return self._is_statistic(live[0])
            if node.primitive not in (*_SHAPING, *_STATISTIC):
                return False
            atom = live[0]
        return False

    def _is_statistic(self, atom: Atom) -> bool:
        """Whether all of a value that depends on the input comes from sums."""
        waiting, steps = [atom], 0
        while waiting and steps < _LONGEST_WALK:
            node, steps = self.graph.source(waiting.pop()), steps + 1
            if node is None:
                return False
            if node.primitive == "dot_general" and node.ins[0] == node.ins[1]:
                # A sum of squares.
                continue
            if node.primitive not in (*_SHAPING, *_STATISTIC, "reduce_sum"):
                return False
            if node.primitive != "reduce_sum":
                waiting += [each for each in node.ins if self._is_live(each)]
        return not waiting

    def _is_probability(self, atom: Atom) -> bool:
        for _ in range(_LONGEST_WALK):
            node = self.graph.source(atom)
            if node is None:
                return False
            live = [each for each in node.ins if self._is_live(each)]
            if node.primitive == "div" and len(live) == 2:
                return bool(self._softmax(*node.ins))
            if node.primitive == "mul" and len(live) == 2:
                return bool(self._inverted_softmax(node))
            if node.primitive == "exp":
                return bool(self._log_softmax(node.ins[0]))
            passing = (*_SHAPING, "mul", "select_n", "slice")
            if node.primitive not in passing or len(live) != 1:
                return False
            atom = live[0]
        return False


def _is_zero(atom: Atom) -> bool:
    return isinstance(atom, Literal) and not np.any(np.asarray(atom.val))
