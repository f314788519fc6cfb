"""What the rollouts share: a stack of attention layers and its residual connection."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from xviz_jax.kernels.attention_col_product.api import IMPLEMENTATIONS as _COLUMNS
from xviz_jax.kernels.attention_fused_quantile.api import quantile
from xviz_jax.kernels.attention_map import (
    ArrayLike,
    AttentionMap,
    attention_map,
    drop_unused_queries,
)
from xviz_jax.kernels.dispatch import Implementation, check, run

Residual = Literal["half", "add", "normalize", "none"] | float
Stack = ArrayLike | Sequence[ArrayLike]

_NAMED = ("half", "add", "normalize", "none")


def _kept_and_mixed(residual: Residual) -> tuple[float, float]:
    """The factors in kept * I + mixed * F."""
    if isinstance(residual, str) and residual in _NAMED:
        return {"add": (1.0, 1.0), "none": (0.0, 1.0)}.get(residual, (0.5, 0.5))
    number = isinstance(residual, int | float) and not isinstance(residual, bool)
    if not number or not 0 <= residual <= 1:
        raise ValueError(
            f"residual wants one of {_NAMED} or a weight from 0 to 1, got {residual!r}"
        )
    return float(residual), 1.0 - float(residual)


class Layers:
    """The layers of a model, first to last, each checked as it is taken.

    Layers of one shape come as arrays with a leading layer axis, and their loop is
    compiled once; others as sequences of arrays, and their loop is unrolled.
    """

    def __init__(
        self,
        qs: Stack,
        ks: Stack,
        *,
        residual: Residual,
        normalize: bool,
        discard_ratio: float,
        implementation: Implementation | None,
        per_layer: Sequence[Mapping[str, Any]] | None,
        stacks: Mapping[str, Stack | None],
        options: Mapping[str, Any],
    ):
        """Checks the arguments of `rollout_rows` that concern all layers at once."""
        check(implementation)
        self._kept, self._mixed = _kept_and_mixed(residual)
        self._normalize = bool(normalize) or residual == "normalize"
        if not 0 <= discard_ratio < 1:
            raise ValueError(
                f"discard_ratio wants to lie in [0, 1), got {discard_ratio!r}"
            )
        self.stacked = hasattr(qs, "ndim")
        self.count = len(qs)
        self._stacks = {"q": qs, "k": ks} | {
            name: stack for name, stack in stacks.items() if stack is not None
        }
        self._discard_ratio = discard_ratio
        self._implementation = implementation
        self._options = dict(options)
        self._per_layer = per_layer
        if self.count == 0:
            raise ValueError("qs holds no layer")
        for name, stack in self._stacks.items():
            if hasattr(stack, "ndim") != self.stacked or len(stack) != self.count:
                wanted = "an array" if self.stacked else "a sequence"
                got = "an array" if hasattr(stack, "ndim") else "a sequence"
                raise ValueError(
                    f"{name}s wants {wanted} of {self.count} layers, as qs is; got "
                    f"{got} of {len(stack)}"
                )
        if per_layer is not None and (self.stacked or len(per_layer) != self.count):
            raise ValueError(
                f"per_layer wants one mapping for each layer of a sequence; got "
                f"{len(per_layer)} for {self.count} layers"
                f"{' in one array' if self.stacked else ''}"
            )

    def __getitem__(self, layer: Any) -> AttentionMap:
        """The fused matrix of a layer, its discard threshold found."""
        options: dict[str, Any] = dict(self._options)
        for name, stack in self._stacks.items():
            if self.stacked:
                options[name] = jax.lax.dynamic_index_in_dim(
                    jnp.asarray(stack), layer, keepdims=False
                )
            else:
                options[name] = stack[layer]
        if self._per_layer is not None:
            options |= self._per_layer[layer]
        attention = attention_map(**options)
        if attention.q.shape[1] != attention.k.shape[1]:
            raise ValueError(
                f"a rollout wants as many queries as keys in every layer, got "
                f"{attention.q.shape[1]} and {attention.k.shape[1]}"
            )
        if self._discard_ratio > 0:
            threshold = quantile(
                attention, self._discard_ratio, self._plain_implementation, None
            )
            attention = attention.with_threshold(threshold)
        return attention

    def fold(
        self,
        step: Callable[[Any, AttentionMap], Any],
        carry: Any,
        order: range,
    ) -> Any:
        """`step` over the layers in `order`, in one compiled loop where possible."""
        if not self.stacked:
            for layer in order:
                carry = step(carry, self[layer])
            return carry
        body = lambda n, carry: step(carry, self[order.start + n * order.step])
        return jax.lax.fori_loop(0, len(order), body, carry)

    def add_residual(self, kept: jax.Array, mixed: jax.Array) -> jax.Array:
        """Adds what the residual connection keeps to what attention mixes."""
        return self._kept * kept + self._mixed * mixed

    def scale_rows(self, r: jax.Array, attention: AttentionMap) -> jax.Array:
        """`r` `[B, M, N]` over the row sums of a layer, if rows are normalised."""
        if not self._normalize:
            return r
        sums = self._row_sums(drop_unused_queries(r, attention))
        return r / self._total(sums)[:, None]

    def normalize_rows(self, rows: jax.Array, fused: jax.Array) -> jax.Array:
        """Rows `[..., N]` over their sums, if they are normalised.

        Args:
          rows: Rows of a product whose first factor is this layer.
          fused: The same rows of F.
        """
        if not self._normalize:
            return rows
        return rows / self._total(fused.sum(-1, keepdims=True))

    def _total(self, sums: jax.Array) -> jax.Array:
        total = self._kept + self._mixed * sums
        # A row of nothing stays one.
        return jnp.where(total == 0, 1, total)

    @property
    def _plain_implementation(self):
        # A backend of the row product may lack the operations beside it.
        return "reference" if self._implementation == "reference" else None

    def _row_sums(self, attention):
        b, _, _, n, _ = attention.shape
        known = attention.known_row_sums()
        if known is not None:
            return known
        ones = jnp.ones((b, 1, n), attention.dtype)
        sums = run(
            "attention_col_product",
            _COLUMNS,
            self._plain_implementation,
            ones,
            attention,
            config=None,
        )
        return sums[:, 0]
