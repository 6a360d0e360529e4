"""Block retrieval: it finds a block, looks at nothing later, and stays within its limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.fidelity.retrieval_memory import BlockRetrieval, register
from sparse_compiler.ir.index import Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import SelectRequest
from sparse_compiler.runtime.select import default_rows
from sparse_compiler.testing import random_qkv, sparse_attention

SIZE = 2048


def chosen(
    q: Tensor,
    k: Tensor,
    first: int,
    second: int,
    geometry: Geometry,
    key_mask: Tensor | None = None,
) -> Tensor:
    """bool [B, Hq, row blocks, key blocks]."""
    heads = torch.arange(q.shape[1])
    pattern = BlockRetrieval()
    limits = pattern.limits(
        HeadPattern(pattern.name, first, second), geometry.block_q, geometry.block_k
    )
    rows = default_rows(
        q.shape[0], q.shape[2], k.shape[2], geometry.q_offset, key_mask, torch.device("cpu")
    )
    request = SelectRequest(
        q=q,
        k=k,
        summary=k.new_zeros(1, 1, 0, q.shape[3]),
        heads=heads,
        first=torch.full_like(heads, first),
        second=torch.full_like(heads, second),
        geometry=geometry,
        rows=rows,
        key_mask=key_mask,
        scale=1.0,
        limits=limits,
        probe=lambda *_: pytest.fail("it probes nothing"),
    )
    blocks = pattern.choose(request).blocks
    assert int(blocks.sum(-1).max()) <= limits.blocks
    return blocks


def planted(size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Queries and keys of two heads over one; the last 64 rows ask for key 700."""
    torch.manual_seed(0)
    q, k = 0.1 * torch.randn(1, 2, size, 32), 0.1 * torch.randn(1, 1, size, 32)
    k[0, 0, 700] = 0.0
    k[0, 0, 700, 0] = 8.0
    # It is looked at soon after it stands there, which makes it a representative.
    q[0, :, 700:720, 0] = 1.0
    q[0, :, -64:, 0] = 4.0
    return q, k


@pytest.mark.parametrize(("block_q", "block_k"), [(64, 64), (256, 64), (64, 128)])
def test_the_block_that_is_asked_for_is_found(block_q: int, block_k: int) -> None:
    q, k = planted()
    blocks = chosen(q, k, 2, 256, Geometry(0, -1, 0, block_q, block_k))
    assert blocks[0, :, -1, 700 // block_k].all()


def test_sinks_window_and_count() -> None:
    q, k = planted()
    blocks = chosen(q, k, 3, 256, Geometry(0, -1, 0, 64, 64))
    last = blocks[0, 0, 31].nonzero()[:, 0].tolist()
    # Two blocks of sinks, own block and the 256 tokens before it, three retrieved ones.
    assert last[:2] == [0, 1] and last[-5:] == [27, 28, 29, 30, 31] and len(last) == 2 + 3 + 5
    assert not blocks[0, 0].triu(1).any()


def test_a_choice_depends_on_nothing_later() -> None:
    q, k = planted()
    geometry = Geometry(0, -1, 0, 64, 64)
    before = chosen(q, k, 3, 64, geometry)
    q[:, :, 1024:], k[:, :, 1024:] = torch.randn(1, 2, 1024, 32), torch.randn(1, 1, 1024, 32)
    after = chosen(q, k, 3, 64, geometry)
    assert torch.equal(before[:, :, :16], after[:, :, :16])
    assert not torch.equal(before[:, :, 16:], after[:, :, 16:])


def test_padding_is_never_a_representative() -> None:
    q, k = planted()
    mask = torch.ones(1, SIZE, dtype=torch.bool)
    mask[:, :300] = False
    k[:, :, :300] = 100.0
    blocks = chosen(q, k, 2, 128, Geometry(0, -1, 0, 64, 64), mask)
    assert not blocks[..., :4].any()
    # Sinks begin where the keys do.
    assert blocks[0, 0, -1, 4:7].all()


def test_chunked_prefill_takes_queries_at_their_positions() -> None:
    q, k = planted()
    blocks = chosen(q[:, :, -512:], k, 2, 128, Geometry(SIZE - 512, -1, 0, 64, 64))
    assert blocks.shape == (1, 2, 8, 32)
    assert blocks[0, 0, -1, 30:].all() and not blocks[0, 0, 0, 25:].any()


def test_it_runs_through_the_operators_and_registers_twice() -> None:
    register()
    register()
    assert registry.get("block_retrieval").number == 1201
    q, k, v = random_qkv(0, num_q=512, num_k=512)
    heads = [HeadPattern("block_retrieval", 8, 64)] * q.shape[1]
    out, _, _ = sparse_attention(q, k, v, heads, Geometry(0, -1, 0, 64, 64), executor="cpu")
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    # Eight blocks are all that there are.
    torch.testing.assert_close(out, dense, atol=1e-4, rtol=1e-4)
    head = BlockRetrieval().from_budget(0.25, 32768, 64)
    assert 0.1 < BlockRetrieval().density(head, 32768, 64) < 0.4
