"""What a mask means: a band around the diagonal, met with the keys that are padding.

Positions: query row ``i`` and key ``j`` are addresses in their own tensors. A band compares them as
``-left <= j - (i + q_offset) <= right``, the convention of FlashAttention's ``window_size`` made
explicit about the offset. The sizes may be sympy expressions over the graph's own size symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch

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
    """A proved mask: ``band`` and, where ``key_padding`` is set, ``key_padding[b, j]`` too.

    Args:
        band: who sees whom by position.
        key_padding: name of the fx node of a bool (or castable: nonzero is visible) tensor [B, Lk],
            or None. ``key_padding_is_bool`` says whether a cast is needed before use.
    """

    band: Band
    key_padding: str | None = None
    key_padding_is_bool: bool = True

    @property
    def trivial(self) -> bool:
        """Nothing is hidden."""
        return self.band.full and self.key_padding is None

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
        if self.key_padding is not None:
            parts.append("key padding")
        return ", ".join(parts)

    def dense(
        self,
        shape: tuple[int, int, int],
        size: Callable[[Size], int] = int,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Materialise as bool [B, Lq, Lk]; for tests and the oracle only.

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
