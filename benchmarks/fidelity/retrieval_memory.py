"""A pattern: block retrieval from a memory of representative keys, as in InfLLM (Xiao et al., 2024).

Training-free and strictly causal: a key's weight as a representative counts queries up to ``_REACH``
after it, and a block is ranked only for rows that all come later than that (its window hides it else).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compiler.plugins import (
    BlockChoice,
    HeadPattern,
    Limits,
    Pattern,
    SelectRequest,
    request_relation,
)
from sparse_compiler.plugins import pattern as registered

__all__ = ["BlockRetrieval", "register"]

_BLOCK = 64
"""Tokens that ``first`` counts in."""
_SINKS = 128
_REPRESENTATIVES = 4
_REACH = 64
"""Queries after a key that say how well it represents its block."""


class BlockRetrieval(Pattern):
    """Sinks, a window, and for each row block the best key blocks by their representative keys.

    ``first`` retrieved blocks of 64 tokens; ``second`` tokens of the window (at least 64), in whole
    key blocks. A block's representatives are its 4 keys with the largest mean score over the next 64
    queries; its relevance to a row block is the mean score of these rows on them. Published: one
    choice for all heads of a layer, blocks of 128; here every query head chooses for itself.
    """

    name = "block_retrieval"
    number = 1201
    component = "blocks"

    def default(self) -> HeadPattern:
        return HeadPattern(self.name, 32, 2048)

    def limits(self, head: HeadPattern, block_q: int, block_k: int, causal: bool = True) -> Limits:
        kept = head.first * _BLOCK + max(head.second, _REACH) + _SINKS + block_q
        # Sinks, window and the row block's own keys may each straddle one block more.
        return Limits(blocks=-(-kept // block_k) + 4)

    def from_budget(
        self, budget: float, num_keys: int, block_q: int, causal: bool = True
    ) -> HeadPattern:
        # A row of a causal mask sees half of the keys: half of its share for each number.
        tokens = max(2 * _BLOCK, round(budget * num_keys / (2 if causal else 1)))
        return HeadPattern(self.name, max(1, tokens // 2 // _BLOCK), tokens // 2)

    def choose(self, request: SelectRequest) -> BlockChoice:
        geometry, visible = request.geometry, request_relation(request)[0]
        key = torch.arange(visible.shape[2], device=visible.device) * geometry.block_k
        row = torch.arange(visible.shape[1], device=visible.device) * geometry.block_q
        position = row[:, None] + request.rows[:, 2].long()[:, None, None]
        start = request.rows[:, 3].long()[:, None, None]
        sinks = (key < start + _SINKS) & visible
        kept = []
        for slot in range(request.heads.shape[0]):
            window = request.second[slot].clamp(min=_REACH)
            near = (key + geometry.block_k > position - window) & visible
            scores = _relevance(request, slot).masked_fill(near | sinks | ~visible, float("-inf"))
            blocks = -(-request.first[slot] * _BLOCK // geometry.block_k)
            most = request.limits.blocks
            found = request.keep_best(scores, blocks.expand(scores.shape[1]), most)
            kept.append((found & visible) | near | sinks)
        return BlockChoice(torch.stack(kept, 1))

    def density(self, head: HeadPattern, num_keys: int, block_q: int) -> float:
        kept = head.first * _BLOCK + max(head.second, _REACH) + _SINKS + block_q
        return min(1.0, 2 * kept / num_keys)


def _relevance(request: SelectRequest, slot: int) -> Tensor:
    """Scores of key blocks for row blocks, float32 [B, row blocks, key blocks]."""
    head = request.heads[slot : slot + 1]
    groups = request.q.shape[1] // request.k.shape[1]
    queries = request.q.index_select(1, head)[:, 0].float()
    keys = request.k.index_select(1, head // groups)[:, 0].float()
    memory = _memory(queries, keys, request)
    size = request.geometry.block_q
    pad = -queries.shape[1] % size
    rows = torch.nn.functional.pad(queries, (0, 0, 0, pad)).unflatten(1, (-1, size)).sum(2)
    return rows @ memory.transpose(1, 2)


def _memory(queries: Tensor, keys: Tensor, request: SelectRequest) -> Tensor:
    """Sum of each key block's representatives, [B, key blocks, D]. queries: [B, Lq, D]; keys: [B, Lk, D]."""
    size, num_q, num_k = request.geometry.block_k, queries.shape[1], keys.shape[1]
    # The address of the query at a key's position; keys before the first query take the first ones.
    address = torch.arange(num_k, device=keys.device) - request.rows[:, 2].long()[:, None]
    low, high = address.clamp(0, num_q - 1), (address + _REACH).clamp(1, num_q)
    # float64: a float32 running sum of 100K queries would lose the digits of a difference of 64.
    total = torch.nn.functional.pad(queries.double().cumsum(1), (0, 0, 1, 0))
    ahead = [total.gather(1, at[..., None].expand(-1, -1, total.shape[2])) for at in (low, high)]
    mean = ((ahead[1] - ahead[0]) / (high - low).clamp(min=1)[..., None]).float()
    scores = (mean * keys).sum(-1)
    key = torch.arange(num_k, device=keys.device)
    start, length = request.rows[:, 3, None], request.rows[:, 4, None]
    seen = (key >= start) & (key < start + length)
    if request.key_mask is not None:
        seen = seen & request.key_mask
    pad = -num_k % size
    scores = torch.nn.functional.pad(scores.masked_fill(~seen, -1e30), (0, pad), value=-1e30)
    best = scores.unflatten(1, (-1, size)).topk(min(_REPRESENTATIVES, size), dim=2)
    blocks = torch.nn.functional.pad(keys, (0, 0, 0, pad)).unflatten(1, (-1, size))
    taken = blocks.gather(2, best.indices[..., None].expand(-1, -1, -1, keys.shape[2]))
    return torch.where((best.values > -1e29)[..., None], taken, 0.0).sum(2)


def register() -> None:
    """Make the pattern known to the backend; a second call changes nothing."""
    registered(BlockRetrieval)
