"""What a pattern is: two numbers a head, an estimator, a cost, and how it lowers to the index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparse_compiler.errors import PatternInvalid
from sparse_compiler.ir.index import AUTOMATIC, Geometry
from sparse_compiler.ir.pattern import HeadPattern

__all__ = [
    "WHOLE_BLOCKS",
    "BandChoice",
    "BandRule",
    "BlockChoice",
    "BlockRule",
    "Limits",
    "Pattern",
    "Scored",
    "SelectRequest",
    "keep_best",
]

WHOLE_BLOCKS = -1

Probe = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
KeepBest = Callable[[Tensor, Tensor, int], Tensor]


def keep_best(scores: Tensor, wanted: Tensor, most: int) -> Tensor:
    """Mark the largest scores of each slot; ties go to the lowest place, NaN ranks with -inf.

    Args:
        scores: float32 [B, S, X].
        wanted: int64 [S], how many to mark; all where there are not so many.
        most: the most that any slot may mark, -1 for no limit.
    Returns:
        bool [B, S, X].
    """
    size = scores.shape[-1]
    count = size if most < 0 else min(most, size)
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    scores = torch.where(scores.isnan(), float("-inf"), scores)
    wanted = wanted.clamp(max=count)[:, None]
    best = torch.topk(scores, count, dim=-1, sorted=True).values
    last = best.gather(-1, (wanted - 1).clamp(min=0).expand(*scores.shape[:2], 1))
    above, tie = scores > last, scores == last
    ties = wanted - above.sum(-1, keepdim=True)
    return (above | (tie & (tie.cumsum(-1) <= ties))) & (wanted > 0)


@dataclass(frozen=True)
class BandRule:
    """What a band pattern chooses, as data, so that an executor may do it in its own kernels.

    Args:
        number: of the pattern.
        kind: ``best`` columns and distances of a probe of the last rows that see keys; ``nearest``:
            the ``first`` first visible keys and the ``second`` nearest distances; ``all`` distances.
        probe_rows: of kind ``best``.
        least_columns, least_distances: of kind ``best``, the first visible keys and the nearest
            distances that are always kept and counted.
    """

    number: int
    kind: Literal["best", "nearest", "all"]
    probe_rows: int = 0
    least_columns: int = 0
    least_distances: int = 0


@dataclass(frozen=True)
class BlockRule:
    """What a block pattern chooses, as data, so that an executor may do it in its own kernels.

    Each row is scored by itself, as ``row_scores`` says, against what ``operands`` gives.

    Args:
        number: of the pattern.
        every: a row's normaliser is estimated from every so many-th group of a key block, and from
            the best group of each key block; a power of two.
        operands: what is scored.
        group: keys of a group, or ``WHOLE_BLOCKS``, for predicted costs.
        rank: directions of 16 bits that take as long as those that are scored, 0 for the whole head,
            for predicted costs.
        recall: ``first`` is per mille of the mass to keep (``ranking.wanted_for_share``), not what a
            single group must hold.
    """

    number: int
    every: int
    operands: Callable[[SelectRequest], Scored]
    group: int = 1
    rank: int = 0
    recall: bool = False

    def flops(self, pairs: float, head_dim: int, block_k: int) -> float:
        """Arithmetic of scoring ``pairs`` pairs of a row and a key."""
        directions = min(self.rank or head_dim, head_dim)
        return 2.0 * directions * pairs / (block_k if self.group == WHOLE_BLOCKS else self.group)


@dataclass(frozen=True)
class Limits:
    """The most that one head may put into each list; -1 is no limit.

    Args:
        columns: single keys.
        distances: distances from the diagonal.
        blocks: key blocks per row block; from ``AUTOMATIC`` down it grows with the length
            (``ir.index.capacity_blocks``).
    """

    columns: int = 0
    distances: int = 0
    blocks: int = 0

    def join(self, other: Limits) -> Limits:
        """The smallest limits that serve both."""

        def most(a: int, b: int) -> int:
            return -1 if a < 0 or b < 0 else max(a, b)

        return Limits(
            most(self.columns, other.columns),
            most(self.distances, other.distances),
            _most_blocks(self.blocks, other.blocks),
        )


def _most_blocks(a: int, b: int) -> int:
    if -1 in (a, b):
        return -1
    if min(a, b) >= 0:
        return max(a, b)
    least = [AUTOMATIC - n if n <= AUTOMATIC else n for n in (a, b)]
    return AUTOMATIC - max(least)


@dataclass(frozen=True)
class SelectRequest:
    """Everything an estimator may look at, for the S heads that hold slots of its component.

    Args:
        q: [B, Hq, Lq, D].  k: [B, Hkv, Lk, D].
        summary: [B, Hkv, groups, D] mean of the visible keys of each group of ``group`` keys; 0
            where a group has none. No groups where no pattern of the layer reads them.
        heads: int64 [S], the query head of each slot.
        first, second: int64 [S], the patterns' numbers.
        geometry: band of the mask and blocking.
        rows: int32 [B, 5] (q_start, q_len, q_offset, kv_start, kv_len).
        key_mask: bool [B, Lk] or None.
        scale: of the scores.
        limits: host-side bounds of what may be listed.
        bounds: int32 [B, Lq, 2] or None, the keys between which each row sees; as in ``ops``.
        bias: added to the logits, of rank 4 or 2, or None; as in ``ops``.
        probe: ``(heads, first_row, num_rows) -> (columns, distances)``, see ``Executor.probe``.
        keep_best: as the function of that name.
        group: keys of a group of ``summary``; divides ``geometry.block_k``.
    """

    q: Tensor
    k: Tensor
    summary: Tensor
    heads: Tensor
    first: Tensor
    second: Tensor
    geometry: Geometry
    rows: Tensor
    key_mask: Tensor | None
    scale: float
    limits: Limits
    probe: Probe
    keep_best: KeepBest = keep_best
    bounds: Tensor | None = None
    bias: Tensor | None = None
    group: int = 0


@dataclass(frozen=True)
class Scored:
    """Queries and groups of keys whose products stand for logits.

    Args:
        queries: [B, Hq, Lq, R].
        keys: [B, H, groups, R], all finite; H is Hkv, or Hq where each query head has its own.
        broken: bool [B, H, groups], where a NaN or inf was.
        group: keys of a group, a power of two that divides the key block.
        scale: positive; logit = scale * query . key, up to a constant for each row.
    """

    queries: Tensor
    keys: Tensor
    broken: Tensor
    group: int
    scale: float


@dataclass(frozen=True)
class BandChoice:
    """Columns and distances to keep.

    Args:
        columns: bool [B, S, Lk], keys kept as columns.
        distances: bool [B, S, X], distances position - key kept.
    """

    columns: Tensor
    distances: Tensor


@dataclass(frozen=True)
class BlockChoice:
    """Key blocks to keep, bool [B, T, row blocks, key blocks]."""

    blocks: Tensor


class Pattern(ABC):
    """The plug-in unit: one subclass, one file, one test.

    Attributes:
        name: unique; the value of the option ``pattern``.
        config_name: its name in the published per-head format, or None.
        number: id stored in the parameter tensor; unique among registered patterns.
        component: ``band`` or ``blocks``, the part of the index that it fills for causal masks.
            The band is stored by distance from a row's position and is causal, so for every other
            mask a pattern fills blocks.
        needs_causal: True if it makes sense for causal masks only: no ``choose_two_sided``.
        summary_keys: how many neighbouring keys share one mean in the summary that it reads, a
            power of two; 0 if it reads none, ``WHOLE_BLOCKS`` for a mean of each key block.
        rule: what ``choose`` does, where a rule can say it; an executor may take it instead. A
            ``BandRule`` of component ``band``, a ``BlockRule`` of component ``blocks``.
    """

    name: str
    config_name: str | None = None
    number: int
    component: Literal["band", "blocks"]
    needs_causal: bool = True
    summary_keys: int = 0
    rule: BandRule | BlockRule | None = None

    @abstractmethod
    def default(self) -> HeadPattern:
        """Numbers for a head about which nothing is known."""

    def component_for(self, causal: bool) -> Literal["band", "blocks"]:
        """The part of the index that it fills under a mask that is causal, or is not."""
        return self.component if causal else "blocks"

    @abstractmethod
    def limits(self, head: HeadPattern, block_q: int, block_k: int, causal: bool = True) -> Limits:
        """Host-side bounds for one head with these numbers and this blocking.

        ``causal``: the mask is; where it is not, ``columns`` and ``distances`` bound what the head
        may rank, and nothing of the index but ``blocks`` is filled.
        """

    @abstractmethod
    def from_budget(
        self, budget: float, num_keys: int, block_q: int, causal: bool = True
    ) -> HeadPattern:
        """Numbers whose computed pairs come near ``budget`` of the allowed pairs of ``num_keys``.

        ``block_q``: rows of a row block, which share what any of them keeps.
        ``causal``: the mask is; else every row sees every key.
        """

    def from_recall(self, recall: float) -> HeadPattern | None:
        """Numbers that keep a share ``recall`` of every row's mass, as far as the estimate knows it.

        None where the pattern's numbers cannot say that; ``0 < recall <= 1``.
        """
        return None

    @abstractmethod
    def choose(self, request: SelectRequest) -> BandChoice | BlockChoice:
        """Estimate what matters; no host synchronisation, fixed shapes."""

    def choose_two_sided(self, request: SelectRequest) -> BlockChoice:
        """What ``choose`` says, as key blocks, under a mask that may show keys on both sides.

        Every row block keeps the blocks of its own positions (``block_relation``).

        Raises:
            PatternInvalid: the pattern knows causal masks only.
        """
        if self.component == "blocks":
            choice = self.choose(request)
            assert isinstance(choice, BlockChoice)
            return choice
        raise PatternInvalid(
            f"the mask of a head with pattern {self.name!r}",
            "causal, since the pattern defines no choice on both sides",
            f"left={request.geometry.left}, right={request.geometry.right}",
            fix="Implement choose_two_sided, or choose another pattern.",
        )

    @abstractmethod
    def density(self, head: HeadPattern, num_keys: int, block_q: int) -> float:
        """Expected share of the causal pairs computed for ``num_keys`` tokens, an upper bound."""
