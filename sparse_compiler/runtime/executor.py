"""What an executor is: two primitives over the index, and what it can and cannot do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.ir.pattern import HeadPattern, LayerPatterns
from sparse_compiler.ir.shape import SiteShape, Tile
from sparse_compiler.patterns.base import BandRule, BlockRule, SelectRequest

__all__ = ["Executor", "Problem", "given"]


def given(**operands: Tensor | None) -> dict[str, Tensor]:
    """Only the operands that are there: an executor that does not know one refuses it by name."""
    return {name: tensor for name, tensor in operands.items() if tensor is not None}


@dataclass(frozen=True)
class Problem:
    """Static facts about one attention, enough to say whether an executor takes it.

    Args:
        device_type: ``cuda`` or ``cpu``.
        dtype: of q, k and v.
        head_dim, value_dim: D and Dv.
        groups: query heads per key head.
        softcap: 0 for none.
    """

    device_type: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    groups: int
    softcap: float = 0.0


class Executor(ABC):
    """Runs the two steps of sparse attention; stateless, registered by name.

    Attributes:
        name: the value of the option ``executor``.
        block_q, block_k: row and key blocks it wants an index for.
        min_tokens: length below which dense attention is expected to win, used by
            ``min_tokens="auto"``.
        min_queries: fewer query rows than this in one call stay dense.
        auto: the zero-config pattern of a causal head, as rich as this executor can afford: a
            scattered distance costs it ``block_q`` pairs a row block, a column one
            (docs/design/0005-zero-config.md).
    """

    name: str
    block_q: int
    block_k: int
    min_tokens: int
    min_queries: int
    auto: HeadPattern

    @abstractmethod
    def obstacles(self, problem: Problem) -> list[str]:
        """Every reason why this executor cannot take ``problem``; empty if it can."""

    def tile(self, shape: SiteShape | None, patterns: LayerPatterns) -> Tile:
        """The blocking for one site, chosen when its graph is compiled.

        Args:
            shape: of the call, or of a likely one where sizes are dynamic; None where nothing is
                known of it.
            patterns: of its heads.
        """
        return Tile(self.block_q, self.block_k, self.min_tokens)

    @abstractmethod
    def probe(
        self,
        q: Tensor,
        k: Tensor,
        heads: Tensor,
        first_row: Tensor,
        geometry: Geometry,
        *,
        scale: float,
        rows: Tensor,
        key_mask: Tensor | None,
        num_rows: int,
        bounds: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of a few query rows, summed by column and by distance.

        Args:
            q: [B, Hq, Lq, D].  k: [B, Hkv, Lk, D].
            heads: int64 [S] query heads to probe.
            first_row: int64 [B] address of the first of ``num_rows`` consecutive probe rows; rows
                outside the batch entry's q_start..q_start+q_len (or negative) count for nothing.
            geometry: the mask's band; ``rows`` int32 [B, 5] and ``key_mask`` as in ``ops``.
            num_rows: probe rows R (64).
            bounds: int32 [B, Lq, 2];  bias: of rank 4 or 2; as in ``ops``.
        Returns:
            float32 columns [B, S, Lk]: sum over the rows of softmax(scale * q kᵀ + bias) at each key, +inf
            at a visible key that holds a NaN or inf, since every weight beside it is NaN;
            float32 distances [B, S, X]: the same summed over pairs with position - key = distance,
            X = geometry.distance_size(Lq). Masked pairs are 0.
        Source: MInference 1.0, section 3.2.
        """

    def select_band(
        self,
        request: SelectRequest,
        params: Tensor,
        rules: Mapping[str, BandRule],
        numbers: Mapping[str, tuple[int, int]],
        sizes: tuple[int, int, int, int],
        num_slots: int,
    ) -> tuple[Tensor, ...] | None:
        """Choose and lower all band slots of a layer at once; None where PyTorch operations do.

        What it returns is what ``choose`` of the patterns and ``lowering.lower_band`` return for
        the same probe.

        Args:
            request: without ``heads``, ``first`` and ``second``; the mask is causal (right = 0).
            params: int32 [Hq, 5] as in ``ops``.
            rules: of the band patterns of the layer, by kind.
            numbers: by kind, (first, second) that take the place of the parameters'; may be empty.
            sizes: capacities (F, E, C, X).
            num_slots: S > 0.
        Returns:
            The tensors of the index's band in the order of ``INDEX_FIELDS``, then ``slots``.
        """
        return None

    def select_blocks(
        self,
        request: SelectRequest,
        params: Tensor,
        rule: BlockRule,
        capacity: int,
        num_slots: int,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Choose and list the key blocks of a pattern's block slots of a layer.

        What it returns is, rounding of scores aside, what the pattern's ``choose`` and
        ``lowering.lower_blocks`` return.

        Args:
            request: without ``heads``, ``first`` and ``second``.
            params: int32 [Hq, 5] as in ``ops``.
            rule: of the pattern.
            capacity: K, the length of a list.
            num_slots: T > 0.
            out: lists into which those of the pattern's slots are written; else the lists of other
                slots are undefined.
        Returns:
            (blocks, num_blocks) of the index; None where PyTorch operations do.
        """
        return None

    @abstractmethod
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: AttentionIndex,
        geometry: Geometry,
        *,
        scale: float,
        softcap: float,
        rows: Tensor,
        key_mask: Tensor | None,
        bounds: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention over the index; arguments and results as ``attend_reference``."""
