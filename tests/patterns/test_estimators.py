"""What the estimators of key blocks promise, what each of them finds, and what each of them misses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import Limits, SelectRequest
from sparse_compiler.patterns.ranking import edge_blocks
from sparse_compiler.patterns.relation import request_relation
from sparse_compiler.patterns.switching import SHARE, divergence
from sparse_compiler.runtime import recorder
from sparse_compiler.runtime.reference import allowed_pairs, covered_pairs
from sparse_compiler.runtime.select import default_rows, select_index, summarize
from sparse_compiler.testing import parameters, random_qkv, sparse_attention

GROUPS = HeadPattern("key_groups", 30_000, 2)
TRI = HeadPattern("tri_shape", 20, 10)
ADAPTIVE = HeadPattern("adaptive", 800, 2)
MEANS = HeadPattern("key_means", 30_000, 2)
ANTI = HeadPattern("antidiagonal", 700, 2)
SWITCH = HeadPattern("switching", 300, 2)
ALL = (GROUPS, TRI, ADAPTIVE, MEANS, ANTI, SWITCH)
ESTIMATED = (GROUPS, ADAPTIVE, MEANS, ANTI, SWITCH)
SMALL = Geometry(0, -1, 0, 32, 16)
CAUSAL = (GROUPS, TRI, ADAPTIVE, MEANS, ANTI)
"""Those whose choice for a row block depends on no contents after it."""


def named(head: HeadPattern) -> str:
    return head.name


@dataclass(frozen=True)
class Call:
    """One selection; every head has a block slot."""

    heads: tuple[HeadPattern, ...]
    num_q: int = 300
    num_k: int = 300
    geometry: Geometry = SMALL
    seed: int = 0
    batch: int = 1
    hidden: tuple[int, int, int] = (0, 0, 0)
    documents: int = 0
    budget: float = -1.0

    def qkv(self, strength: float = 2.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return random_qkv(
            self.seed,
            batch=self.batch,
            heads=len(self.heads),
            num_q=self.num_q,
            num_k=self.num_k,
            dim=16,
            strength=strength,
        )

    def empty(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv()
        return torch.zeros_like(q), torch.zeros_like(k), v

    def key_mask(self) -> torch.Tensor | None:
        """Padding on the left, on the right, and every n-th key, in every second batch entry."""
        left, right, step = self.hidden
        if not any(self.hidden):
            return None
        mask = torch.ones(self.batch, self.num_k, dtype=torch.bool)
        for b in range(self.batch - 1, -1, -2):
            mask[b, :left] = False
            mask[b, self.num_k - right :] = False
            if step:
                mask[b, ::step] = False
        return mask

    def bounds(self) -> torch.Tensor | None:
        """Rows share ``documents`` spans of the keys in order."""
        if not self.documents:
            return None
        size = -(-self.num_k // self.documents)
        low = torch.arange(self.num_q) * self.num_k // self.num_q // size * size
        return torch.stack([low, low + size - 1], -1).int()[None].expand(self.batch, -1, -1)

    def index(self, *qkv: torch.Tensor, **options: object) -> AttentionIndex:
        return sparse_attention(
            *(qkv or self.qkv()),
            self.heads,
            self.geometry,
            budget=self.budget,
            **{"key_mask": self.key_mask(), "bounds": self.bounds()} | options,  # type: ignore[arg-type]
        )[2]

    def covered(self, *qkv: torch.Tensor, **options: object) -> torch.Tensor:
        """int32 [B, H, Lq, Lk]."""
        return covered_pairs(self.index(*qkv, **options), self.geometry, self.num_q, self.num_k)

    def allowed(self) -> torch.Tensor:
        """bool [B, 1, Lq, Lk]."""
        return allowed_pairs(
            *(self.batch, self.num_q, self.num_k, self.geometry),
            key_mask=self.key_mask(),
            bounds=self.bounds(),
        )[:, None]

    def request(self) -> SelectRequest:
        """What the laws need of it: masks and sizes."""
        q, k, _ = self.qkv()
        heads = torch.arange(len(self.heads))
        rows = default_rows(
            *(self.batch, self.num_q, self.num_k, self.geometry.q_offset, self.key_mask()),
            torch.device("cpu"),
        )
        second = torch.tensor([head.second for head in self.heads])
        return SelectRequest(
            *(q, k, k[:, :, :0], heads, heads, second, self.geometry, rows, self.key_mask()),
            scale=0.25,
            limits=Limits(blocks=-1),
            probe=lambda *_: (heads, heads),
            bounds=self.bounds(),
        )


@st.composite
def calls(draw: st.DrawFn) -> Call:
    num_q = draw(st.sampled_from([2, 33, 90, 130]))
    offset = draw(st.sampled_from([0, 0, 1, 30, 64]))
    geometry = Geometry(
        offset,
        draw(st.sampled_from([-1, -1, 0, 40])),
        draw(st.sampled_from([0, -1, 5])),
        draw(st.sampled_from([32, 64])),
        draw(st.sampled_from([16, 32, 64])),
    )
    # Keys after the last row: a static cache whose end is not filled yet.
    num_k = num_q + offset + draw(st.sampled_from([0, 0, 9, 70]))
    hidden = draw(st.sampled_from([(0, 0, 0), (0, 0, 0), (7, 0, 0), (0, 12, 0), (3, 3, 2)]))
    chosen = draw(st.lists(st.sampled_from(ALL), min_size=2, max_size=2, unique=True))
    numbers = draw(st.sampled_from([(0, 0), (1, 1), (500, 2), (20_000, 1), (900, 0)]))
    return Call(
        tuple(replace(head, first=numbers[0], second=numbers[1]) for head in chosen),
        num_q,
        num_k,
        geometry,
        draw(st.integers(0, 10**6)),
        draw(st.integers(1, 2)),
        tuple(min(n, max(0, num_k - 1) // 2) for n in hidden),
        draw(st.sampled_from([0, 0, 1, 3])),
        draw(st.sampled_from([-1.0, -1.0, -1.0, 0.3])),
    )


# ---- laws of every index -----------------------------------------------------------------------


@given(call=calls())
def test_listed_blocks_ascend_are_distinct_and_visible(call: Call) -> None:
    index = call.index()
    visible, _ = request_relation(call.request())
    listed = torch.zeros(call.batch, 2, *visible.shape[1:], dtype=torch.int32)
    for place in torch.cartesian_prod(*map(torch.arange, index.num_blocks.shape)).tolist():
        count = int(index.num_blocks[tuple(place)])
        assert 0 <= count <= index.blocks.shape[-1]
        blocks = index.blocks[tuple(place)][:count].long()
        assert (blocks.diff() > 0).all()
        listed[tuple(place)][blocks] = 1
    assert not ((listed > 0) & ~visible[:, None]).any()


@given(call=calls())
def test_every_row_keeps_its_own_position(call: Call) -> None:
    position = torch.arange(call.num_q)[:, None] + call.geometry.q_offset
    own = (position == torch.arange(call.num_k)) & call.allowed()
    assert not (own & (call.covered() == 0)).any()


@given(call=calls())
def test_no_more_blocks_than_asked_for_beside_those_always_kept(call: Call) -> None:
    call = replace(call, budget=-1.0)
    request, size = call.request(), call.geometry.block_k
    visible, own = request_relation(request)
    always = ((own | edge_blocks(request)) & visible).sum(-1)
    counts = call.index().num_blocks
    for slot, head in enumerate(call.heads):
        if head.name != "tri_shape" and head.second:
            most = always.clamp(min=-(-head.second * 64 // size))
            assert (counts[:, slot] <= most).all(), head.name


@given(call=calls())
def test_budget_one_covers_every_allowed_pair_once(call: Call) -> None:
    covered = replace(call, budget=1.0).covered()
    assert covered.max() <= 1
    assert not (call.allowed() & (covered == 0)).any()


@given(call=calls())
def test_a_batch_entry_chooses_as_if_it_were_alone(call: Call) -> None:
    call = replace(call, batch=2)
    q, k, v = call.qkv()
    mask, bounds = call.key_mask(), call.bounds()
    together = call.covered(q, k, v)
    for b in range(2):
        one = slice(b, b + 1)
        alone = call.index(
            *(t[one] for t in (q, k, v)),
            key_mask=None if mask is None else mask[one],
            bounds=None if bounds is None else bounds[one],
        )
        assert torch.equal(
            covered_pairs(alone, call.geometry, call.num_q, call.num_k)[0], together[b]
        )


@pytest.mark.parametrize("right", [0, -1])
@pytest.mark.parametrize("head", ALL, ids=named)
def test_a_head_chooses_the_same_whatever_its_neighbours_read(
    head: HeadPattern, right: int
) -> None:
    """Means of 8 keys in the summary serve those who want means of blocks."""
    geometry = Geometry(0, -1, right, 32, 16)
    mixed = Call((GROUPS, HeadPattern("block_sparse", 2), head, TRI), geometry=geometry)
    q, k, v = mixed.qkv()
    alone = replace(mixed, heads=(head,)).covered(q[:, 2:3], k, v)
    assert torch.equal(mixed.covered(q, k, v)[:, 2], alone[:, 0])


@pytest.mark.parametrize("right", [0, -1])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_what_is_chosen(side: str, right: int) -> None:
    pad, call = 64, Call(ALL, 256, 256, Geometry(0, -1, right, 32, 16), seed=5)
    plain = call.covered()
    ends = (pad, 0) if side == "left" else (0, pad)
    # Padding tokens are real embeddings: they must not count.
    padded = [torch.nn.functional.pad(t, (0, 0, *ends), value=3.0) for t in call.qkv()]
    mask = torch.nn.functional.pad(torch.ones(1, 256, dtype=torch.bool), ends)
    start = torch.tensor([[ends[0], 256, 0, ends[0], 256]], dtype=torch.int32)
    longer, real = replace(call, num_q=320, num_k=320), slice(ends[0], ends[0] + 256)
    covered = longer.covered(*padded, key_mask=mask, rows=start)[..., real, real]
    assert torch.equal(covered, plain)


@pytest.mark.parametrize("right", [0, -1])
@pytest.mark.parametrize("documents", [0, 2])
@pytest.mark.parametrize("head", ESTIMATED, ids=named)
def test_a_nan_key_is_never_skipped(head: HeadPattern, documents: int, right: int) -> None:
    call = Call((head,), geometry=Geometry(0, -1, right, 32, 16), documents=documents)
    for wrong in (float("nan"), float("inf"), float("-inf")):
        q, k, v = call.qkv()
        k[:, :, 140, 3] = wrong
        seen = call.allowed()[0, 0, :, 140]
        assert (call.covered(q, k, v)[0, 0, seen, 140] == 1).all()


@pytest.mark.parametrize("form", ["full", "one for all", "keys", "table"])
@pytest.mark.parametrize("head", ESTIMATED, ids=named)
def test_a_bias_draws_the_choice_to_the_keys_that_it_favours(head: HeadPattern, form: str) -> None:
    # Eight blocks hold what the table favours for a row block, beside four that are always kept.
    head = replace(head, first=1000 if head in (ADAPTIVE, ANTI) else head.first, second=3)
    call = Call((head, head), 512, 512, Geometry(0, -1, -1, 32, 16))
    wanted = torch.zeros(512, 512, dtype=torch.bool)
    if form == "table":
        bias = torch.zeros(2, 1023)
        bias[:, 511 + 180 : 511 + 260] = 30.0
        wanted[100, 320] = True
    else:
        shape = {"full": (1, 2, 512, 512), "one for all": (1, 1, 512, 512)}
        bias = torch.zeros(shape.get(form, (1, 2, 1, 512)))
        bias[..., 320:336] = 30.0
        bias[..., 325] = float("-inf")
        wanted[:, 330] = True
    assert (call.covered(bias=bias)[0, :, wanted] == 1).all()


@pytest.mark.parametrize(
    ("bias_shape", "right"), [(None, 0), ((1, 6, 300, 300), 0), ((6, 599), -1)]
)
def test_nothing_waits_for_the_device(bias_shape: tuple[int, ...] | None, right: int) -> None:
    """Fake tensors have no values: whoever asks for one, or for a shape that depends on one, fails."""
    call = Call(ALL, geometry=Geometry(0, -1, right, 64, 16), documents=3)
    params, real, spans = parameters(ALL, causal=right == 0), call.request(), call.bounds()
    assert spans is not None
    numbers = [registry.get(head.name).number for head in ALL]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        q, k, bounds = (mode.from_tensor(t) for t in (real.q, real.k, spans))
        rows, none = torch.zeros(1, 5, dtype=torch.int32), torch.zeros(0, dtype=torch.int64)
        mask = torch.ones(1, 300, dtype=torch.bool)
        request = SelectRequest(
            *(q, k, summarize(k, rows, mask, 8), none, none, none, call.geometry, rows, mask),
            scale=0.25,
            limits=Limits(blocks=9),
            probe=lambda *_: (none, none),
            bounds=bounds,
            bias=None if bias_shape is None else torch.zeros(bias_shape),
            group=8,
        )
        index = select_index(request, mode.from_tensor(params), numbers, [0, 6], [0, 0, 9], -1.0)
    assert index.blocks.shape == (1, 6, 5, 9)


# ---- what depends on what ----------------------------------------------------------------------


@given(
    heads=st.lists(st.sampled_from(CAUSAL), min_size=2, max_size=2, unique=True),
    seed=st.integers(0, 10**6),
    offset=st.sampled_from([0, 5, 32, 100]),
    block=st.integers(1, 3),
    block_k=st.sampled_from([16, 32, 64]),
    left=st.sampled_from([-1, 60]),
    hidden=st.sampled_from([(0, 0, 0), (9, 0, 0)]),
    documents=st.sampled_from([0, 0, 3]),
    numbers=st.sampled_from([(800, 1), (800, 0), (1000, 2), (20_000, 1), (0, 1)]),
    later=st.sampled_from([100.0, float("nan")]),
    with_bias=st.booleans(),
)
def test_a_row_block_depends_on_no_contents_after_it(
    heads: list[HeadPattern],
    seed: int,
    offset: int,
    block: int,
    block_k: int,
    left: int,
    hidden: tuple[int, int, int],
    documents: int,
    numbers: tuple[int, int],
    later: float,
    with_bias: bool,
) -> None:
    call = Call(
        tuple(replace(head, first=numbers[0], second=numbers[1]) for head in heads),
        *(140, 140 + offset, Geometry(offset, left, 0, 32, block_k)),
        seed=seed,
        hidden=hidden,
        documents=documents,
    )
    q, k, v = call.qkv()
    bias = torch.randn(1, 1, call.num_q, call.num_k) if with_bias else None
    before = call.covered(q, k, v, bias=bias)
    last = block * 32
    q[:, :, last:] = later * torch.randn_like(q[:, :, last:])
    k[:, :, last + offset :] = later * torch.randn_like(k[:, :, last + offset :])
    if bias is not None:
        bias[:, :, :, last + offset :] = (
            5 * torch.randn(1, 1, call.num_q, call.num_k)[..., last + offset :]
        )
        bias[:, :, last:] = 0.0
    after = call.covered(q, k, v, bias=bias)
    visible = call.allowed()
    assert torch.equal((before * visible)[:, :, :last], (after * visible)[:, :, :last])


@given(head=st.sampled_from([GROUPS, ADAPTIVE, MEANS, ANTI]), seed=st.integers(0, 10**6))
def test_a_longer_prompt_keeps_the_lists_of_its_first_row_blocks(
    head: HeadPattern, seed: int
) -> None:
    long = Call((head,), 160, 160, seed=seed)
    short = replace(long, num_q=96, num_k=96)
    q, k, v = long.qkv()
    first = short.covered(*(t[:, :, :96] for t in (q, k, v)))
    causal = short.allowed()
    assert torch.equal(long.covered(q, k, v)[:, :, :96, :96] * causal, first * causal)


def test_switching_asks_the_last_rows_by_design() -> None:
    """Early rows change with later ones: the column that only the last rows want is everyone's."""
    call = Call((HeadPattern("switching", 0, 5),), 640, 640, Geometry(0, -1, 0, 64, 64))
    q, k, v = call.empty()
    q[..., 0] = 10.0
    k[:, :, 150, 0] = 10.0
    wanted = call.covered(q, k, v)
    q[:, :, -64:, 0] = -10.0
    unwanted = call.covered(q, k, v)
    assert (wanted[0, 0, 320:384, 150] == 1).all()
    assert (unwanted[0, 0, 320:384, 150] == 0).all()


# ---- what they keep, by definition -------------------------------------------------------------


def fewest(mass: torch.Tensor, share: float, forced: set[int]) -> list[int]:
    """Forced blocks, then the best ones until the share is reached."""
    order = sorted(range(len(mass)), key=lambda n: (n not in forced, -float(mass[n])))
    kept, total, held = [], float(mass.sum()), 0.0
    for n in order:
        if n not in forced and held >= share * total:
            break
        kept.append(n)
        held += float(mass[n])
    return sorted(kept)


@given(seed=st.integers(0, 10**6), share=st.sampled_from([300, 600, 900, 990]))
def test_adaptive_keeps_the_fewest_blocks_with_the_pooled_mass(seed: int, share: int) -> None:
    call = Call((HeadPattern("adaptive", share, 0),), 320, 320, Geometry(0, -1, 0, 64, 32), seed)
    q, k, v = call.qkv()
    index = call.index(q, k, v)
    for m in range(5):
        query = q[0, 0, m * 64 : (m + 1) * 64].double().mean(0)
        blocks = [k[0, 0, n * 32 : (n + 1) * 32].double().mean(0) for n in range(2 * m + 2)]
        mass = torch.stack([query @ block / 4 for block in blocks]).softmax(0)
        wanted = fewest(mass, share / 1000, {0, 2 * m, 2 * m + 1})
        assert index.blocks[0, 0, m, : int(index.num_blocks[0, 0, m])].tolist() == wanted


@given(seed=st.integers(0, 10**6), share=st.sampled_from([300, 600, 900, 990]))
def test_antidiagonal_keeps_the_fewest_blocks_with_the_mass_of_tiles(seed: int, share: int) -> None:
    call = Call(
        (HeadPattern("antidiagonal", share, 0),), 320, 320, Geometry(0, -1, 0, 64, 32), seed
    )
    q, k, v = call.qkv()
    index = call.index(q, k, v)
    logits = q[0, 0].double() @ k[0, 0].double().T / 4
    tiles = logits.unflatten(1, (20, 16)).unflatten(0, (20, 16)).flip(1)
    tiles = tiles.diagonal(dim1=1, dim2=3).mean(-1)
    seen = torch.ones(20, 20, dtype=torch.bool).tril()
    mass = tiles.masked_fill(~seen, float("-inf")).softmax(-1)
    mass = mass.unflatten(1, (10, 2)).sum(2).unflatten(0, (5, 4)).sum(1)
    for m in range(5):
        wanted = fewest(mass[m, : 2 * m + 2], share / 1000, {0, 2 * m, 2 * m + 1})
        assert index.blocks[0, 0, m, : int(index.num_blocks[0, 0, m])].tolist() == wanted


@given(
    local=st.integers(0, 90),
    last=st.sampled_from([0, 1, 40, 64, 500]),
    offset=st.sampled_from([0, 17]),
    padding=st.sampled_from([0, 11]),
    right=st.sampled_from([0, -1]),
)
def test_tri_shape_keeps_sinks_window_and_last_rows_and_little_more(
    local: int, last: int, offset: int, padding: int, right: int
) -> None:
    call = Call(
        (HeadPattern("tri_shape", local, last),),
        *(500, 500 + offset, Geometry(offset, -1, right, 32, 16)),
        hidden=(0, padding, 0),
    )
    covered, allowed = call.covered()[0, 0] > 0, call.allowed()[0, 0]
    key = torch.arange(call.num_k)
    row = torch.arange(500)[:, None]
    distance = (row + offset - key).abs()
    real = 500 - padding
    wanted = (key < 128) | (distance < local) | (row >= real - last)
    assert not (wanted & allowed & (row < real) & ~covered).any()
    room = 32 + 16
    most = (key < 128 + 16) | (distance < max(1, local) + room) | (row >= real - last - 32)
    assert not (covered & allowed & ~most).any()


def test_switching_is_adaptive_where_means_agree_and_vertical_slash_where_not() -> None:
    call = Call((HeadPattern("switching", 1000, 4),), 640, 640, Geometry(0, -1, 0, 64, 64))
    q, k, v = call.qkv()
    pooled = replace(call, heads=(HeadPattern("adaptive", SHARE, 4),)).covered(q, k, v)
    assert torch.equal(call.covered(q, k, v), pooled)
    slash = replace(call, heads=(HeadPattern("switching", 0, 4),)).covered(q, k, v)
    assert not torch.equal(slash, pooled)
    # Whole blocks that all rows want alike: means are exact, and decide from a small number on.
    q, k, v = call.empty()
    q[..., 0], k[:, :, 128:192, 0] = 5.0, 5.0
    agreeing = replace(call, heads=(HeadPattern("switching", 100, 0),)).covered(q, k, v)
    pooled = replace(call, heads=(HeadPattern("adaptive", SHARE, 0),)).covered(q, k, v)
    assert torch.equal(agreeing, pooled)
    # A single column: the mean has a 64th of its logit, and the last rows' columns decide.
    q, k, v = call.empty()
    q[..., 0], k[:, :, 150, 0] = 10.0, 10.0
    heads = (HeadPattern("switching", 100, 0), HeadPattern("switching", 0, 0))
    either, slash = (replace(call, heads=(head,)).covered(q, k, v) for head in heads)
    assert torch.equal(either, slash)
    assert (slash[0, 0, 150:, 150] == 1).all()
    # Beside its own, the first and the column's block: the diagonals on which last rows see it.
    assert slash[0, 0, 500].sum() <= 5 * 64


def test_divergence_lies_between_none_and_the_root_of_log_two() -> None:
    one = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert float(divergence(one, 3 * one)) == pytest.approx(0.0, abs=1e-4)
    assert float(divergence(one, one.flip(-1))) == pytest.approx(torch.tensor(2.0).log().sqrt())
    expected = 0.5 * (0.5 * torch.tensor(2 / 3).log() + 0.5 * torch.tensor(2.0).log())
    expected += 0.5 * torch.tensor(4 / 3).log()
    some = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert float(divergence(one, some)) == pytest.approx(float(expected.sqrt()), rel=1e-4)
    assert divergence(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0.0, 0.0]


# ---- recall ------------------------------------------------------------------------------------


def recall(call: Call, *qkv: torch.Tensor) -> float:
    """Share of dense attention's weights on what is kept, mean over rows."""
    q, k, _ = qkv
    scores = (q[0, 0].double() @ k[0, 0].double().T) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~call.allowed()[0, 0], float("-inf")).softmax(-1)
    return float((weights * (call.covered(*qkv)[0, 0] > 0)).sum(-1).mean())


def structured(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sinks, a local window, slashes and heavy keys under noise, and needles of single rows."""
    q, k, v = call.qkv(strength=3.0)
    draw = torch.Generator().manual_seed(call.seed)
    for row in torch.randint(call.num_q // 2, call.num_q, (8,), generator=draw).tolist():
        key = int(torch.randint(0, row, (1,), generator=draw))
        q[:, :, row] += 1.5 * k[:, :1, key]
    return q, k, v


@pytest.mark.parametrize("right", [0, -1])
@pytest.mark.parametrize("head", ALL, ids=named)
def test_recall_rises_with_the_number_of_blocks(head: HeadPattern, right: int) -> None:
    call = Call((head,), 512, 512, Geometry(0, -1, right, 64, 64), seed=3)
    inputs = structured(call)
    found = []
    for most in (1, 2, 4, 8):
        first = {"key_groups": 1, "key_means": 1, "switching": 0}.get(head.name, 1000)
        numbers = (64 * most, 20 * most) if head.name == "tri_shape" else (first, most)
        asked = HeadPattern(head.name, *numbers)
        found.append(recall(replace(call, heads=(asked,)), *inputs))
    assert all(less <= more + 1e-9 for less, more in pairwise(found)), found
    assert found[-1] > found[0] + 0.05
    # The fewest columns and bins that hold a share are all that switching may ever keep.
    assert found[-1] > (0.9 if head.name == "switching" else 0.999)


@pytest.mark.parametrize("right", [0, -1])
@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("adaptive", (100, 500, 900, 1000)),
        ("antidiagonal", (100, 500, 900, 1000)),
        ("key_groups", (300_000, 100_000, 20_000, 1)),
        ("key_means", (300_000, 100_000, 20_000, 1)),
    ],
)
def test_recall_rises_with_the_share_or_falls_with_the_threshold(
    name: str, numbers: tuple[int, ...], right: int
) -> None:
    call = Call((GROUPS,), 512, 512, Geometry(0, -1, right, 64, 64), seed=4)
    inputs = structured(call)
    asked = [HeadPattern(name, first, 100) for first in numbers]
    found = [recall(replace(call, heads=(head,)), *inputs) for head in asked]
    assert all(less <= more + 1e-9 for less, more in pairwise(found)), found
    assert found[-1] > found[0] + 0.02
    assert found[-1] > 0.999


# ---- what each finds and misses ----------------------------------------------------------------

WIDE = Call((GROUPS,), 640, 640, Geometry(0, -1, 0, 64, 64))
ROW = 600


def finds(head: HeadPattern, key: int, *qkv: torch.Tensor) -> bool:
    return bool(replace(WIDE, heads=(head,)).covered(*qkv)[0, 0, ROW, key] == 1)


def needle(key: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row 600 wants one key, logit 100; three blocks are as a whole a little like it, logit 5."""
    q, k, v = WIDE.empty()
    q[:, :, ROW, 0], k[:, :, key, 0] = 20.0, 20.0
    k[:, :, 256:448, 0] = 1.0
    return q, k, v


def test_key_groups_find_one_key_that_one_row_wants_and_means_do_not() -> None:
    inputs = needle(100)
    assert finds(HeadPattern("key_groups", 1, 4), 100, *inputs)
    for name, first in (("key_means", 1), ("adaptive", 1000), ("antidiagonal", 1000)):
        assert not finds(HeadPattern(name, first, 4), 100, *inputs), name


def test_key_groups_miss_a_key_that_its_neighbours_hide() -> None:
    q, k, v = needle(100)
    k[:, :, 96:104, 0] = -3.0
    k[:, :, 100, 0] = 20.0
    # The key has logit 100, its group of 8 has -0.6: less than every other group.
    assert not finds(HeadPattern("key_groups", 1, 4), 100, q, k, v)


def test_antidiagonal_finds_a_needle_only_where_its_antidiagonal_passes() -> None:
    # Rows and keys of a tile add up to 15 on it: row 600 is 8, key 103 is 7.
    assert finds(HeadPattern("antidiagonal", 1000, 4), 103, *needle(103))
    assert not finds(HeadPattern("antidiagonal", 1000, 4), 104, *needle(104))


def test_antidiagonal_finds_a_column_that_all_rows_share() -> None:
    q, k, v = WIDE.empty()
    q[..., 0], k[:, :, 150, 0] = 20.0, 20.0
    assert finds(HeadPattern("antidiagonal", 900, 3), 150, q, k, v)


@pytest.mark.parametrize(("distance", "found"), [(201, True), (200, False)])
def test_antidiagonal_finds_slashes_at_odd_distances_alone(distance: int, found: bool) -> None:
    """On an antidiagonal of 16 the row and the key of a pair differ by an odd number."""
    _, _, v = WIDE.empty()
    k = 40.0 * torch.eye(640, 641)[None, None]
    q = torch.zeros_like(k)
    q[:, :, distance:] = k[:, :, :-distance]
    # Three blocks are as a whole a little like all rows.
    q[..., 640], k[:, :, 128:320, 640] = 5.0, 5.0
    assert finds(HeadPattern("antidiagonal", 1000, 4), ROW - distance, q, k, v) == found
    assert finds(HeadPattern("key_groups", 5000, 4), ROW - distance, q, k, v)


def two_interests() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row 600 wants the block from 128 on, its neighbours want the one from 320 on."""
    q, k, v = WIDE.empty()
    q[:, :, 576:640, 1], k[:, :, 320:384, 1] = 8.0, 8.0
    q[:, :, ROW] = 0.0
    q[:, :, ROW, 0], k[:, :, 128:192, 0] = 8.0, 8.0
    return q, k, v


def test_adaptive_finds_what_a_row_block_wants_and_misses_what_one_of_its_rows_wants() -> None:
    inputs = two_interests()
    assert finds(HeadPattern("adaptive", 900, 0), 330, *inputs)
    assert not finds(HeadPattern("adaptive", 900, 0), 130, *inputs)
    for name in ("key_means", "key_groups"):
        assert finds(HeadPattern(name, 5000, 4), 330, *inputs)
        assert finds(HeadPattern(name, 5000, 4), 130, *inputs)


def test_tri_shape_finds_everything_for_the_last_rows_and_nothing_between_for_others() -> None:
    head = HeadPattern("tri_shape", 64, 64)
    covered = replace(WIDE, heads=(head,)).covered(*needle(300))[0, 0]
    assert (covered[576:, 300] == 1).all()
    assert (covered[500:576, 300] == 0).all()


def test_switching_misses_a_column_that_only_earlier_rows_want() -> None:
    q, k, v = WIDE.empty()
    q[:, :, 384:448, 0], k[:, :, 150, 0] = 20.0, 20.0
    q[:, :, 576:, 1], k[:, :, 20, 1] = 20.0, 20.0
    for head, found in ((HeadPattern("switching", 0, 3), 0), (HeadPattern("key_groups", 1, 3), 1)):
        covered = replace(WIDE, heads=(head,)).covered(q, k, v)[0, 0]
        assert (covered[384:448, 150] == found).all(), head.name


# ---- numbers -----------------------------------------------------------------------------------


def exact_density(head: HeadPattern, length: int, block_q: int) -> float:
    call = Call((head,), length, length, Geometry(0, -1, 0, block_q, 64), seed=1)
    rows = torch.tensor([[0, length, 0, 0, length]], dtype=torch.int32)
    return float(recorder.density(call.index(), call.geometry, rows, length, length)[0])


@given(
    head=st.sampled_from(ALL),
    first=st.sampled_from([1, 64, 300, 1000]),
    second=st.sampled_from([0, 1, 3, 9]),
    length=st.sampled_from([128, 512, 1024]),
    block_q=st.sampled_from([32, 64]),
)
def test_expected_density_is_an_upper_bound(
    head: HeadPattern, first: int, second: int, length: int, block_q: int
) -> None:
    head = replace(head, first=first, second=second)
    bound = registry.get(head.name).density(head, length, block_q)
    assert 0 <= bound <= 1 + 1e-6
    assert exact_density(head, length, block_q) <= bound + 1e-5


@pytest.mark.parametrize("head", ALL, ids=named)
@pytest.mark.parametrize("budget", [0.3, 0.6])
def test_numbers_from_a_budget_come_near_it(head: HeadPattern, budget: float) -> None:
    asked = registry.get(head.name).from_budget(budget, 2048, 64)
    assert asked.name == head.name
    assert 0.5 * budget <= exact_density(asked, 2048, 64) <= 1.5 * budget


@pytest.mark.parametrize("head", ALL, ids=named)
def test_numbers_limits_and_names_fit_together(head: HeadPattern) -> None:
    pattern = registry.get(head.name)
    assert registry.by_number(pattern.number) is pattern
    assert pattern.component_for(causal=True) == pattern.component_for(causal=False) == "blocks"
    assert not pattern.needs_causal
    for length in (1, 64, 1000, 100_000):
        for causal in (True, False):
            numbers = [pattern.from_budget(b / 20, length, 64, causal) for b in range(1, 21)]
            for less, more in pairwise(numbers):
                assert less.first <= more.first
                assert less.second <= more.second
    limits = pattern.limits(pattern.default(), 64, 64)
    assert limits.columns == limits.distances == 0
    assert limits.blocks < 0
    if head.name != "tri_shape":
        assert pattern.limits(replace(head, second=50), 64, 64).blocks == 50
        assert pattern.limits(replace(head, second=50), 64, 32).blocks == 100
