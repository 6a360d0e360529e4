"""Layers of heads scored row by row, and whether an executor lists what the PyTorch path lists."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from sparse_compiler.ir.index import Geometry, capacity_blocks
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import Limits, Scored, SelectRequest
from sparse_compiler.patterns.low_rank import LowRank, sketches
from sparse_compiler.patterns.ranking import edge_blocks
from sparse_compiler.patterns.relation import request_relation
from sparse_compiler.patterns.row_scores import RowScored, broken_blocks, score_blocks
from sparse_compiler.runtime.executor import Executor
from sparse_compiler.runtime.select import default_rows, select_index, summarize
from sparse_compiler.testing import parameters

#: Products are added up in another order.
TOLERANCE = 0.03
#: Scores of 16 bits have 11 digits; they are rounded when they are added up, and when they are kept.
ROUNDING = 2**-10
#: Behind a sweep: the best groups are known to a 32nd of log2, and sums of weights, which are straight
#: lines between powers of two, to some 6 in a hundred.
MARKS = 0.09


@dataclass(frozen=True)
class Case:
    """One layer.

    Args:
        numbers: threshold in millionths and most blocks, one pair for each KV head.
        real: the lines of ``rows``, one for each batch entry; empty for all rows and keys.
        sink: size of a key that every row looks at; 0 for none.
    """

    seed: int
    num_q: int
    num_k: int
    offset: int = 0
    left: int = -1
    right: int = 0
    block_q: int = 32
    block_k: int = 16
    batch: int = 1
    groups: int = 2
    dim: int = 16
    numbers: tuple[tuple[int, int], ...] = ((20_000, 0),)
    padding: bool = False
    real: tuple[tuple[int, ...], ...] = ()
    sink: float = 0.0
    broken: float = 0.0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    name: str = "key_groups"

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.offset, self.left, self.right, self.block_q, self.block_k)

    @property
    def pattern(self) -> RowScored:
        found = registry.get(self.name)
        assert isinstance(found, RowScored)
        return found

    @property
    def heads(self) -> list[HeadPattern]:
        return [HeadPattern(self.name, *n) for n in self.numbers for _ in range(self.groups)]

    def request(self) -> SelectRequest:
        draw = torch.Generator().manual_seed(self.seed)
        kv = len(self.numbers)
        q = torch.randn(self.batch, kv * self.groups, self.num_q, self.dim, generator=draw)
        k = torch.randn(self.batch, kv, self.num_k, self.dim, generator=draw)
        # A few keys that some rows look for.
        for _ in range(4):
            row, key = (int(torch.randint(n, (), generator=draw)) for n in (self.num_q, self.num_k))
            q[:, :, row] = 4 * k.repeat_interleave(self.groups, 1)[:, :, key]
        if self.sink:
            k[:, :, 5] = self.sink * self.dim**-0.5
            q = q + 3 * self.dim**-0.5
        mask = None
        if self.padding:
            mask = torch.rand(self.batch, self.num_k, generator=draw) > 0.1
            mask[0, : self.num_k // 4] = False
        if self.broken:
            k[-1, 0, self.num_k // 2, 3] = self.broken
        q, k = (t.to(self.dtype).to(self.device) for t in (q, k))
        mask = None if mask is None else mask.to(self.device)
        rows = default_rows(self.batch, self.num_q, self.num_k, self.offset, mask, k.device)
        if self.real:
            rows = torch.tensor(self.real, dtype=rows.dtype, device=k.device)
        group = registry.summary_group([self.pattern], self.block_k)
        none = torch.zeros(0, dtype=torch.int64, device=k.device)
        limits = Limits()
        for head in self.heads:
            limits = limits.join(
                self.pattern.limits(head, self.block_q, self.block_k, self.right == 0)
            )
        return SelectRequest(
            *(
                q,
                k,
                summarize(k, rows, mask, group or self.block_k),
                none,
                none,
                none,
                self.geometry,
                rows,
                mask,
            ),
            scale=0.5,
            limits=limits,
            probe=lambda *_: (none, none),
            group=group,
        )


cases = st.builds(
    Case,
    seed=st.integers(0, 10_000),
    num_q=st.integers(1, 150),
    num_k=st.integers(1, 200),
    offset=st.integers(0, 90),
    left=st.sampled_from([-1, -1, 0, 50]),
    right=st.sampled_from([0, 0, -1, 20]),
    block_q=st.sampled_from([16, 32, 64]),
    block_k=st.sampled_from([16, 32]),
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    numbers=st.lists(
        st.tuples(st.sampled_from([1, 5_000, 200_000]), st.integers(0, 4)), min_size=1, max_size=2
    ).map(tuple),
    padding=st.booleans(),
    name=st.sampled_from(["key_groups", "low_rank"]),
    dim=st.sampled_from([16, 24, 32]),
    broken=st.sampled_from([0.0, 0.0, 0.0, math.nan, math.inf]),
)


def assert_agrees(case: Case, executor: Executor, blurred: float = TOLERANCE) -> None:
    """The executor's lists are those of the PyTorch path, but for scores at the very cut."""
    request, heads, pattern = case.request(), case.heads, case.pattern
    params = parameters(heads, causal=False).to(case.device)
    limits = [request.limits.columns, request.limits.distances, request.limits.blocks]
    want = select_index(request, params, [pattern.number], [0, len(heads)], limits, -1.0)
    capacity = int(capacity_blocks(limits[2], case.num_k, case.block_k))
    found = executor.select_blocks(request, params, pattern.rule, capacity, len(heads))
    assert found is not None
    got, expected = (
        marked(*pair, case.geometry.num_key_blocks(case.num_k))
        for pair in (found, (want.blocks, want.num_blocks))
    )
    for slot, head in enumerate(heads):
        asked = case_request(request, slot, head)
        scored = pattern.rule.operands(asked)
        scores = score_blocks(asked, 0, scored, pattern.rule.every)
        tolerance = blurred + ROUNDING * _largest(scored, slot)
        threshold = math.log(max(1, head.first) / 1e6)
        visible, own = request_relation(asked)
        always = (own | edge_blocks(asked)) & visible
        always = always | broken_blocks(asked, 0, scored)
        kept = scores.masked_fill(~expected[:, slot] | always, math.inf).amin(-1, keepdim=True)
        cut = kept.clamp(min=threshold)
        differ = got[:, slot] != expected[:, slot]
        close = (scores - cut).abs() <= tolerance
        close |= (scores - threshold).abs() <= tolerance
        # Equal scores at the cut: any of them will do.
        assert not (differ & ~close).any(), (
            f"{case}: slot {slot}, {int((differ & ~close).sum())} blocks differ"
        )


def _largest(scored: Scored, head: int) -> float:
    """The largest score of a head in 16 bits, in natural logarithms; 0 for other types."""
    if scored.queries.dtype == torch.float32:
        return 0.0
    sharing = scored.queries.shape[1] // scored.keys.shape[1]
    queries, keys = scored.queries[:, head].float(), scored.keys[:, head // sharing].float()
    return float((queries @ keys.transpose(-1, -2)).abs().amax() * scored.scale)


def in_eight(request: SelectRequest) -> Scored:
    """The sketches of ``low_rank`` in 8 bits: both sides balanced, products in units of log2.

    What ``triton_sketch`` does, with PyTorch's directions, and statistics of all keys.
    """
    scored = sketches(request)
    queries, keys = scored.queries.float(), scored.keys.float()
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    broken = scored.broken.repeat_interleave(keys.shape[1] // scored.broken.shape[1], 1)
    size = keys.square().mean(2, keepdim=True).sqrt()
    size = torch.maximum(size, 2**-12 * size.amax(-1, keepdim=True)).clamp(min=1e-30)
    factor = math.sqrt(scored.scale / math.log(2))
    queries, keys = queries * size.sqrt() * factor, keys / size.sqrt() * factor
    queries, keys = (t.clamp(-448, 448).to(torch.float8_e4m3fn) for t in (queries, keys))
    return Scored(queries, keys, broken, scored.group, math.log(2))


def use_eight_bits() -> Callable[[], None]:
    """``low_rank`` scores what ``in_eight`` rounds, here and in the executor; undone by what returns."""
    before = LowRank.rule
    LowRank.rule = replace(before, operands=in_eight)

    def undo() -> None:
        LowRank.rule = before

    return undo


def case_request(request: SelectRequest, slot: int, head: HeadPattern) -> SelectRequest:
    number = torch.tensor([slot], device=request.q.device)
    first, second = (torch.full_like(number, n) for n in (head.first, head.second))
    return replace(request, heads=number, first=first, second=second)


def marked(blocks: torch.Tensor, counts: torch.Tensor, size: int) -> torch.Tensor:
    """bool [B, T, row blocks, key blocks] of lists; checks that they ascend."""
    place = torch.arange(blocks.shape[-1], device=blocks.device)
    listed = place < counts[..., None]
    assert (counts <= blocks.shape[-1]).all()
    ascending = (blocks[..., 1:] > blocks[..., :-1]) | ~listed[..., 1:]
    assert ascending.all()
    out = torch.zeros(*counts.shape, size + 1, dtype=torch.bool, device=blocks.device)
    return out.scatter_(-1, torch.where(listed, blocks, size).long(), True)[..., :size]
