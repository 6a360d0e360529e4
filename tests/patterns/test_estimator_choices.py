"""What each estimator of key blocks keeps by definition, what it finds, and what it misses."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from estimator_cases import ALL, GROUPS, Call, named
from hypothesis import given
from hypothesis import strategies as st

from sparse_compiler.ir.index import Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns.switching import SHARE, divergence

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
