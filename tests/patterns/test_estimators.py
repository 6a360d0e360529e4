"""What the estimators of key blocks promise about every index, and their numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from estimator_cases import (
    ADAPTIVE,
    ALL,
    ANTI,
    CAUSAL,
    ESTIMATED,
    GROUPS,
    MEANS,
    TRI,
    Call,
    calls,
    named,
)
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_compiler.ir.index import Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import Limits, SelectRequest
from sparse_compiler.patterns.ranking import edge_blocks
from sparse_compiler.patterns.relation import request_relation
from sparse_compiler.runtime import recorder
from sparse_compiler.runtime.reference import covered_pairs
from sparse_compiler.runtime.select import select_index, summarize
from sparse_compiler.testing import parameters

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
