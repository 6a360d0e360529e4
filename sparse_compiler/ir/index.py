"""The one index format that every pattern lowers to, and what it means.

Rows come in blocks of ``block_q`` (M). Row block m ends at position ``e = q_offset + (m + 1) * M``,
a virtual end that may lie past the last row. A key ``j`` has distance ``x = e - j`` from that end;
x = 1 is the key at the block's last position. Three kinds of work cover a block's keys:

* **band**, stored once per head in distance space, so that it does not depend on the row:
  ``full`` lists tiles of exactly ``block_k`` (N) keys ``[e - x, e - x + N)`` that no causal or window
  test can cut (they start before every row of the block and end inside every row's window);
  ``edge`` lists tiles of 1..N keys whose pairs are tested by value;
* **columns**: single keys, ascending; a column that the band already covers for this block
  (``covered[x]``) counts once, as band;
* **blocks**: key blocks ``[n * N, (n + 1) * N)`` listed for each row block, ascending.

A head has either a band entry (tiles and columns) or a block entry, chosen by ``slots``; so no key
is covered twice. Every executor tests causality, window, key padding and the bounds of K by value
wherever a list does not promise that it need not.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

__all__ = [
    "AUTOMATIC",
    "INDEX_FIELDS",
    "AttentionIndex",
    "Geometry",
    "automatic_blocks",
    "capacity_blocks",
]

AUTOMATIC = -2
"""As a bound of block lists: what ``automatic_blocks`` says; ``AUTOMATIC - n``: n at the least."""


def automatic_blocks(num_k: Any, block_k: int) -> Any:
    """Key blocks that a row block may list where nobody set a bound: 768 keys and 1/32 of all.

    Args:
        num_k: Lk, an int or a SymInt.
    """
    return (768 + num_k // 32) // block_k


def capacity_blocks(limit: int, num_k: Any, block_k: int) -> Any:
    """Length of a row block's list of key blocks.

    Args:
        limit: a number of blocks, -1 for no bound, or from ``AUTOMATIC`` down.
        num_k: Lk, an int or a SymInt.
    """
    blocks = -(-num_k // block_k)
    if limit <= AUTOMATIC:
        wanted = torch.sym_max(automatic_blocks(num_k, block_k), AUTOMATIC - limit)
        return torch.sym_min(wanted, blocks)
    return blocks if limit < 0 else torch.sym_min(limit, blocks)


@dataclass(frozen=True)
class Geometry:
    """Which pairs the mask allows, and how rows and keys are blocked.

    Args:
        q_offset: position of query row 0 among the keys (Lk - Lq for chunked prefill).
        left: keys before a row's position that it sees; -1 is all of them.
        right: keys after a row's position that it sees; -1 is all, 0 is causal.
        block_q: rows that share one list of keys (M).
        block_k: keys in a tile (N).
    """

    q_offset: int
    left: int
    right: int
    block_q: int
    block_k: int

    def num_row_blocks(self, num_q: int) -> int:
        return -(-num_q // self.block_q)

    def num_key_blocks(self, num_k: int) -> int:
        return -(-num_k // self.block_k)

    def distance_size(self, num_q: int) -> int:
        """Size of distance space: one more than the largest x of any key >= 0."""
        return self.q_offset + self.num_row_blocks(num_q) * self.block_q + 1


@dataclass(frozen=True)
class AttentionIndex:
    """Keys to compute, per head and row block; see the module's text for the meaning.

    S band slots and T block slots; every count may be zero and every list is padded past its
    count with values that must not be read. All int32 and contiguous unless said.

    Args:
        full: [B, S, F] distances x of whole tiles, ascending.  num_full: [B, S].
        edge: [B, S, E] distances x of tested tiles, ascending.  edge_len: [B, S, E] keys in each, 1..N.
        num_edge: [B, S].
        columns: [B, S, C] key positions, ascending, distinct.  num_columns: [B, S].
        covered: [B, S, X] uint8, 1 where distance x belongs to the band.
        blocks: [B, T, num_row_blocks, K] key block numbers, ascending, distinct.
        num_blocks: [B, T, num_row_blocks].
        slots: [Hq, 2] (band slot or -1, block slot or -1) of each query head.
    """

    full: torch.Tensor
    num_full: torch.Tensor
    edge: torch.Tensor
    edge_len: torch.Tensor
    num_edge: torch.Tensor
    columns: torch.Tensor
    num_columns: torch.Tensor
    covered: torch.Tensor
    blocks: torch.Tensor
    num_blocks: torch.Tensor
    slots: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, name) for name in INDEX_FIELDS)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())


INDEX_FIELDS = tuple(field.name for field in fields(AttentionIndex))
