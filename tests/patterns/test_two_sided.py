"""What each pattern keeps under masks that show keys on both sides of a row, with bounds and bias."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_compiler.ir.index import Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import Limits, SelectRequest
from sparse_compiler.patterns.relation import block_relation
from sparse_compiler.patterns.two_sided import spread_rows
from sparse_compiler.patterns.visible import bias_of_rows, row_intervals
from sparse_compiler.runtime import recorder
from sparse_compiler.runtime.merge import with_sinks
from sparse_compiler.runtime.probe import probe_torch
from sparse_compiler.runtime.reference import allowed_pairs, covered_pairs, pair_bias
from sparse_compiler.runtime.select import default_rows, select_index, summarize
from sparse_compiler.testing import parameters, random_qkv, sparse_attention

A_SHAPE = HeadPattern("a_shape", 5, 20)
SLASH = HeadPattern("vertical_slash", 36, 205)
BLOCKS = HeadPattern("block_sparse", 1)
DENSE = HeadPattern("dense")
ALL = (A_SHAPE, SLASH, BLOCKS, DENSE)
NOTHING = float("-inf")


@dataclass(frozen=True)
class Call:
    """One selection for one key head."""

    heads: tuple[HeadPattern, ...]
    num_q: int = 300
    num_k: int = 300
    offset: int = 0
    left: int = -1
    right: int = -1
    seed: int = 0
    block_q: int = 32
    block_k: int = 16
    documents: int = 0

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.offset, self.left, self.right, self.block_q, self.block_k)

    def qkv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sizes = {"num_q": self.num_q, "num_k": self.num_k}
        return random_qkv(self.seed, heads=len(self.heads), dim=16, **sizes)

    def bounds(self) -> torch.Tensor | None:
        """Rows share ``documents`` spans of the keys in order."""
        if not self.documents:
            return None
        size = -(-self.num_k // self.documents)
        low = torch.arange(self.num_q) * self.num_k // self.num_q // size * size
        return torch.stack([low, low + size - 1], -1).int()[None]

    def covered(self, *qkv: torch.Tensor, **options: object) -> torch.Tensor:
        index = sparse_attention(
            *(qkv or self.qkv()),
            self.heads,
            self.geometry,
            bounds=self.bounds(),
            causal=False,
            **options,  # type: ignore[arg-type]
        )[2]
        return covered_pairs(index, self.geometry, self.num_q, self.num_k)[0]

    def allowed(self) -> torch.Tensor:
        return allowed_pairs(1, self.num_q, self.num_k, self.geometry, bounds=self.bounds())[0]

    def distance(self) -> torch.Tensor:
        position = torch.arange(self.num_q)[:, None] + self.offset
        return torch.arange(self.num_k) - position


calls = st.builds(
    Call,
    heads=st.just(ALL),
    num_q=st.sampled_from([2, 33, 150, 300]),
    num_k=st.sampled_from([40, 150, 300]),
    offset=st.sampled_from([0, 17]),
    left=st.sampled_from([-1, 0, 30]),
    right=st.sampled_from([-1, 0, 9]),
    seed=st.integers(0, 10**6),
    block_q=st.sampled_from([32, 64]),
    block_k=st.sampled_from([16, 64]),
    documents=st.sampled_from([0, 1, 3, 7]),
)


@given(call=calls)
def test_rows_keep_their_own_position_and_between_bounds_some_key(call: Call) -> None:
    """Rows whose own position is hidden keep the nearest key that their bounds show."""
    covered, allowed = call.covered() > 0, call.allowed()
    own = allowed & (call.distance() == 0)
    for head in range(len(ALL)):
        assert not (own & ~covered[head]).any(), ALL[head].name
        if call.documents and ALL[head] is not BLOCKS:
            some = (covered[head] & allowed).any(-1)
            assert torch.equal(some, allowed.any(-1)), ALL[head].name


@given(call=calls)
def test_dense_heads_cover_everything_that_is_visible(call: Call) -> None:
    assert not (call.allowed() & (call.covered()[3] == 0)).any()


@given(
    sink=st.integers(0, 50),
    local=st.integers(1, 80),
    documents=st.sampled_from([0, 3]),
    offset=st.sampled_from([0, 17]),
    right=st.sampled_from([-1, 60]),
)
def test_a_shape_keeps_first_keys_and_both_sides_and_little_more(
    sink: int, local: int, documents: int, offset: int, right: int
) -> None:
    call = Call(
        (HeadPattern("a_shape", sink, local),),
        num_k=300 + offset,
        offset=offset,
        right=right,
        documents=documents,
    )
    covered, allowed, distance = call.covered()[0] > 0, call.allowed(), call.distance().abs()
    bounds, key = call.bounds(), torch.arange(call.num_k)
    first = torch.zeros(call.num_q, 1) if bounds is None else bounds[0, :, :1]
    wanted = (distance < local) | ((key >= first) & (key < first + sink))
    assert not (wanted & allowed & ~covered).any()
    # Whole key blocks, the same for the rows of a row block.
    room = call.block_q + call.block_k
    most = (distance < local + room) | ((key > first - room) & (key < first + sink + room))
    assert not (covered & allowed & ~most).any()


@given(
    seed=st.integers(0, 10**6),
    sizes=st.sampled_from([(300, 300), (300, 260), (150, 300), (40, 300)]),
    right=st.sampled_from([-1, 100]),
    documents=st.sampled_from([0, 2]),
    with_bias=st.booleans(),
)
def test_vertical_slash_keeps_the_best_columns_and_diagonals_of_rows_spread_over_all(
    seed: int, sizes: tuple[int, int], right: int, documents: int, with_bias: bool
) -> None:
    call = Call((SLASH,), *sizes, seed=seed, right=right, documents=documents)
    q, k, v = call.qkv()
    allowed, distance = call.allowed(), call.distance()
    bias = torch.randn(1, 1, *sizes) if with_bias else None
    rows = torch.arange(64) * (sizes[0] - 1) // 63
    scores = q[0, 0].double() @ k[0, 0].double().T / 4 + (0 if bias is None else bias[0, 0])
    weights = scores.masked_fill(~allowed, NOTHING).softmax(-1).nan_to_num(0.0)[rows]
    columns = weights.sum(0)
    columns[:30] = torch.inf
    diagonals = torch.zeros(sum(sizes) - 1, dtype=torch.float64)
    place = distance + sizes[0] - 1
    diagonals.index_add_(0, place[rows].flatten(), weights.flatten())
    near = (torch.arange(len(diagonals)) - sizes[0] + 1).abs() < 100
    diagonals[near] = torch.inf
    kept = torch.zeros_like(allowed)
    # One less than asked for, so that float32 may order the last ones otherwise.
    kept[:, columns.topk(35).indices] = True
    kept |= torch.isin(place, diagonals.topk(204).indices)
    assert not (kept & allowed & (call.covered(q, k, v, bias=bias)[0] == 0)).any()


def test_vertical_slash_finds_a_column_that_only_middle_rows_want() -> None:
    call = Call((HeadPattern("vertical_slash", 31, 199),), 1200, 1200)
    q, k, v = (torch.zeros_like(t) for t in call.qkv())
    q[:, :, 500:700, 0], k[:, :, 1100, 0] = 20.0, 20.0
    assert (call.covered(q, k, v)[0, 500:700, 1100] == 1).all()
    assert call.covered(q, k, v)[0, 600].sum() < 600


@pytest.mark.parametrize("head", [SLASH, BLOCKS], ids=lambda head: head.name)
@pytest.mark.parametrize("documents", [0, 2])
def test_a_nan_key_is_never_skipped(head: HeadPattern, documents: int) -> None:
    call = Call((head,), documents=documents)
    q, k, v = call.qkv()
    k[:, :, 140] = float("nan")
    seen = call.allowed()[:, 140]
    assert (call.covered(q, k, v)[0, seen, 140] == 1).all()


@pytest.mark.parametrize("form", ["full", "one for all", "keys", "table"])
@pytest.mark.parametrize(
    "head", [SLASH, HeadPattern("block_sparse", 3)], ids=lambda head: head.name
)
def test_a_bias_draws_the_choice_to_the_keys_that_it_favours(head: HeadPattern, form: str) -> None:
    call = Call((head, head), 512, 512)
    q, k, v = call.qkv()
    wanted = torch.zeros(512, 512, dtype=torch.bool)
    if form == "table":
        bias = torch.zeros(2, 1023)
        bias[:, 511 + 180 : 511 + 260] = 30.0
        wanted[100, 320] = True
    else:
        shape = {"full": (1, 2, 512, 512), "one for all": (1, 1, 512, 512)}
        bias = torch.zeros(shape.get(form, (1, 2, 1, 512)))
        bias[..., 320:336] = 30.0
        bias[..., 325] = NOTHING
        wanted[:, 330] = True
    covered = call.covered(q, k, v, bias=bias)
    assert (covered[:, wanted] == 1).all()


@given(call=calls)
def test_a_head_chooses_the_same_whatever_its_neighbours_do(call: Call) -> None:
    q, k, v = call.qkv()
    together = call.covered(q, k, v)
    for head, pattern in enumerate(ALL):
        if pattern.name == "block_sparse" and call.bounds() is not None:
            continue  # alone it has less room: rows without their own position may overflow it
        alone = sparse_attention(
            *(q[:, head : head + 1], k, v, (pattern,), call.geometry),
            bounds=call.bounds(),
            causal=False,
        )[2]
        pairs = covered_pairs(alone, call.geometry, call.num_q, call.num_k)
        assert torch.equal(pairs[0, 0] * call.allowed(), together[head] * call.allowed())


def test_probe_rows_are_spread_over_rows_that_are_no_padding() -> None:
    rows = torch.tensor([[0, 100, 0, 30, 70], [10, 80, 0, 0, 100], [0, 0, 0, 0, 0]]).int()
    none = torch.zeros(0, dtype=torch.int64)
    tensors = [torch.zeros(3, 1, 100, 8)] * 3
    request = SelectRequest(
        *tensors,
        *(none, none, none, Geometry(0, -1, -1, 32, 16), rows, None, 1.0, Limits()),
        probe=lambda *_: (none, none),
    )
    found = spread_rows(request, 64)
    assert found.shape == (3, 64)
    assert found[0].tolist()[::63] == [30, 99]
    assert found[1].tolist()[::63] == [10, 89]
    assert (found[:2].diff() >= 0).all()
    assert ((found >= 0) & (found < 100)).all()


@pytest.mark.parametrize("bias_shape", [(1, 4, 300, 300), (1, 1, 1, 300), (4, 599)])
@pytest.mark.parametrize("right", [-1, 0])
def test_nothing_waits_for_the_device(bias_shape: tuple[int, ...], right: int) -> None:
    """Fake tensors have no values: whoever asks for one, or for a shape that depends on one, fails."""
    call = Call(ALL, right=right, documents=3)
    params = parameters(ALL, causal=False)
    numbers, limits = [registry.get(head.name).number for head in ALL], [40, 210, -1]
    real, spans = call.qkv(), call.bounds()
    assert spans is not None
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        q, k, v = (mode.from_tensor(t) for t in real)
        bounds, bias = mode.from_tensor(spans), torch.zeros(bias_shape)
        rows, none = torch.zeros(1, 5, dtype=torch.int32), torch.zeros(0, dtype=torch.int64)
        mask = torch.ones(1, 300, dtype=torch.bool)
        request = SelectRequest(
            *(q, k, summarize(k, rows, mask, 16), none, none, none, call.geometry, rows, mask),
            scale=0.25,
            limits=Limits(*limits),
            probe=lambda *_: (none, none),
            bounds=bounds,
            bias=bias,
            group=16,
        )
        index = select_index(request, mode.from_tensor(params), numbers, [0, 4], limits, -1.0)
        share = recorder.density(index, call.geometry, rows, 300, 300, bounds)
        columns, _ = probe_torch(
            *(q, k, torch.zeros(2, dtype=torch.int64), none.new_zeros(1), call.geometry),
            scale=0.25,
            rows=rows,
            key_mask=mask,
            num_rows=64,
            bounds=bounds,
            bias=bias,
        )
        out, lse = with_sinks(v.expand(1, 4, -1, -1), v[..., 0].expand(1, 4, -1), torch.zeros(4))
    assert index.blocks.shape == (1, 4, 10, 19)
    assert (share.shape, columns.shape) == ((4,), (1, 2, 300))
    assert (out.shape, lse.shape) == ((1, 4, 300, 16), (1, 4, 300))


@given(call=calls, hidden=st.booleans())
def test_what_rows_and_row_blocks_may_see(call: Call, hidden: bool) -> None:
    mask = torch.rand(1, call.num_k) < 0.5 if hidden else None
    rows = default_rows(1, call.num_q, call.num_k, call.offset, None, torch.device("cpu"))
    rows[0, 0], rows[0, 1] = 1, call.num_q - 1
    sizes = (call.num_q, call.num_k)
    low, high = row_intervals(call.geometry, call.num_q, rows, call.bounds())
    key = torch.arange(call.num_k)
    between = (key >= low[0, :, None]) & (key <= high[0, :, None])
    allowed = allowed_pairs(1, *sizes, call.geometry, rows=rows, bounds=call.bounds())[0]
    assert torch.equal(between, allowed)
    visible, own = block_relation(call.geometry, *sizes, rows, mask, call.bounds())
    assert not (own & ~visible).any()
    if mask is not None:
        allowed = allowed & mask
    pad = (0, -call.num_k % call.block_k, 0, -call.num_q % call.block_q)
    tiles = torch.nn.functional.pad(allowed, pad).unflatten(0, (-1, call.block_q))
    exact = tiles.unflatten(2, (-1, call.block_k)).any(3).any(1)
    assert not (exact & ~visible[0]).any()


@given(seed=st.integers(0, 10**6), heads=st.sampled_from([1, 3]), table=st.booleans())
def test_the_bias_of_rows_is_the_bias_of_pairs(seed: int, heads: int, table: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    row = torch.randint(0, 20, (2, 5), generator=draw)
    if table:
        biases = [torch.randn(heads, 20 + 33 - 1, generator=draw)]
    else:
        shapes = [(b, heads, n, 33) for b in (1, 2) for n in (1, 20)]
        biases = [torch.randn(shape, generator=draw) for shape in shapes]
    for bias in biases:
        whole = pair_bias(bias, 20, 33).expand(2, heads, 20, 33)
        head = torch.tensor([heads - 1])
        expected = torch.stack([whole[b, heads - 1, row[b]] for b in range(2)])
        assert torch.equal(bias_of_rows(bias, head, row, 20, 33).expand(2, 5, 33), expected)


@pytest.mark.parametrize("name", registry.names())
def test_budgets_on_both_sides(name: str) -> None:
    """A larger budget asks for no less, and the share computed comes near what was asked for."""
    pattern = registry.get(name)
    for length in (1, 64, 1000, 100_000):
        numbers = [pattern.from_budget(b / 20, length, 64, causal=False) for b in range(1, 21)]
        for less, more in pairwise(numbers):
            assert less.first <= more.first
            assert less.second <= more.second
    if name == "dense":
        return
    geometry, length = Geometry(0, -1, -1, 64, 64), 2048
    q, k, v = random_qkv(1, heads=1, num_q=length, num_k=length, dim=16)
    rows = torch.tensor([[0, length, 0, 0, length]]).int()
    for budget in (0.3, 0.6):
        head = pattern.from_budget(budget, length, 64, causal=False)
        _, _, index = sparse_attention(q, k, v, (head,), geometry)
        share = float(recorder.density(index, geometry, rows, length, length)[0])
        assert 0.4 * budget <= share <= 1.25 * budget
        _, _, index = sparse_attention(q, k, v, (head,), geometry, budget=budget)
        again = float(recorder.density(index, geometry, rows, length, length)[0])
        assert again == pytest.approx(share, abs=0.02)


def test_every_pattern_has_a_choice_on_both_sides() -> None:
    for name in ("dense", "a_shape", "vertical_slash", "block_sparse"):
        pattern = registry.get(name)
        assert not pattern.needs_causal
        assert pattern.component_for(causal=False) == "blocks"
        assert pattern.component_for(causal=True) == pattern.component
        limits = pattern.limits(pattern.default(), 64, 64, causal=False)
        assert (limits.blocks == -1) == (name != "block_sparse")
