"""What a mask means: a band around the diagonal, an interval of keys for each row, keys that are
padding, and what is added to the logits.

Positions: query row ``i`` and key ``j`` are addresses in their own tensors. A band compares them as
``-left <= j - (i + q_offset) <= right``, the convention of FlashAttention's ``window_size`` made
explicit about the offset. The sizes may be sympy expressions over the graph's own size symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef

__all__ = ["Band", "MaskFact", "MaskProof", "Proved", "Refuted", "Unknown"]

Size = int | sympy.Expr


@dataclass(frozen=True)
class Band:
    """Keys ``j`` with ``i + q_offset - left <= j <= i + q_offset + right``; ``None`` is unbounded.

    ``Band(0, None, None)`` is full, ``Band(Lk - Lq, None, 0)`` causal (aligned to the last row) and
    ``Band(Lk - Lq, W - 1, 0)`` a causal sliding window of W keys, the row's own included.
    """

    q_offset: Size
    left: Size | None
    right: Size | None

    @property
    def full(self) -> bool:
        return self.left is None and self.right is None

    @property
    def causal(self) -> bool:
        """No row sees a key after its own position."""
        return self.right == 0


@dataclass(frozen=True)
class MaskFact:
    """A proved mask. Key k of row q of entry b is visible if, and only if,

    - it lies in ``band``, which holds for every entry and head and is the tightest there is,
    - ``low <= k <= high`` where they are set,
    - ``key_padding`` holds where it is set;

    and the terms of ``bias`` are added to its logit. Expressions are sympy's, over the symbols of
    the attention's axes and the graph's sizes; what the graph computes stands in them as
    uninterpreted reads, which `passes.grid` turns into nodes.

    Args:
        band: who sees whom by position. Its offset may hold a read of one number of the graph
            (``offset_is_read``), its other sides are ints or size expressions.
        key_padding: predicate over (b, k), or None. The older `MaskProver.prove` gives the name of
            a node [B, Lk] instead (nonzero is visible).
        key_padding_is_bool: whether that node needs no cast.
        low, high: first and last visible key of row q of entry b, or None where the band says it.
            They may lie outside of 0..Lk - 1; low > high is a row that sees nothing.
        bias: terms added to the logits (`passes.additive.Bias`).
        row_shift: something that is the same for all keys of a row was left out of ``bias``. It
            cancels in the softmax, but not in the log-sum-exp: not with sinks.
    """

    band: Band
    key_padding: Any = None
    key_padding_is_bool: bool = True
    low: sympy.Expr | None = None
    high: sympy.Expr | None = None
    bias: tuple[Any, ...] = ()
    row_shift: bool = False

    @property
    def trivial(self) -> bool:
        """Nothing is hidden and nothing added."""
        return self.band.full and self.key_padding is None and not self.bounded and not self.bias

    @property
    def bounded(self) -> bool:
        """Some row's keys are bounded by more than the band."""
        return self.low is not None or self.high is not None

    @property
    def banded(self) -> bool:
        """No row sees a later key, and the band says all that differs between rows."""
        return self.band.causal and not self.bounded

    @property
    def offset_is_read(self) -> bool:
        """The diagonal's place is computed by the graph and known only at run time."""
        return isinstance(self.band.q_offset, sympy.Expr) and self.band.q_offset.has(AppliedUndef)

    def describe(self) -> str:
        """Short text for reports, e.g. ``causal+4096, window 512, key padding``."""
        band, parts = self.band, []
        if band.full:
            parts.append("full")
        elif band.causal:
            parts.append("causal" if band.q_offset == 0 else f"causal+{band.q_offset}")
            if band.left is not None:
                parts.append(f"window {band.left + 1}")
        else:
            low = "-inf" if band.left is None else f"-{band.left}"
            high = "inf" if band.right is None else f"{band.right}"
            parts.append(f"band({low}, {high})+{band.q_offset}")
        if self.bounded:
            parts.append("rows bounded")
        if self.key_padding is not None:
            parts.append("key padding")
        if self.bias:
            parts.append("bias")
        return ", ".join(parts)

    def dense(
        self,
        shape: tuple[int, int, int],
        size: Callable[[Size], int] = int,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Materialise the band and the padding as bool [B, Lq, Lk]; for tests and the oracle only.

        Args:
            shape: (B, Lq, Lk).
            size: evaluates symbolic sizes.
            key_mask: bool [B, Lk], required where ``key_padding`` is set.
        """
        batch, num_q, num_k = shape
        rows = torch.arange(num_q)[:, None] + size(self.band.q_offset)
        keys = torch.arange(num_k)[None, :]
        mask = torch.ones(num_q, num_k, dtype=torch.bool)
        if self.band.left is not None:
            mask &= keys >= rows - size(self.band.left)
        if self.band.right is not None:
            mask &= keys <= rows + size(self.band.right)
        mask = mask.expand(batch, num_q, num_k)
        if self.key_padding is not None:
            if key_mask is None:
                raise ValueError("this mask has key padding: dense() needs key_mask [B, Lk]")
            mask = mask & key_mask.bool()[:, None, :]
        return mask


@dataclass(frozen=True)
class Proved:
    """The mask equals ``fact`` for every size that the graph allows."""

    fact: MaskFact


@dataclass(frozen=True)
class Refuted:
    """The mask was understood and is none of the supported kinds; ``witness`` shows it."""

    reason: str
    witness: str = ""


@dataclass(frozen=True)
class Unknown:
    """The mask was not understood; ``reason`` names the node and operation that stopped it."""

    reason: str


MaskProof = Proved | Refuted | Unknown
