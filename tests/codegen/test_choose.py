"""Ranking: dense always there, what cannot run last and explained, break-even from constants."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_compiler.codegen.attention_work import Clustering, cover, scoring
from sparse_compiler.codegen.choose import (
    SCHEDULES,
    Candidate,
    break_even_tokens,
    candidates,
    choose_tile,
)
from sparse_compiler.codegen.constants import DENSE, shipped
from sparse_compiler.codegen.resources import DEVICE_LIMITS, Resources, obstacles
from sparse_compiler.errors import ShapeMismatch
from sparse_compiler.ir.index import Geometry
from sparse_compiler.ir.pattern import HeadPattern, LayerPatterns
from sparse_compiler.ir.shape import SiteShape
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.lowering import lower_band

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
H200 = shipped("NVIDIA H200").constants
SLASH = HeadPattern("vertical_slash", 512, 2048)
BLOCKS = HeadPattern("block_sparse", 100)
LOW_RANK = registry.get("low_rank").default()
SCORED = (LOW_RANK, registry.get("key_groups").default(), registry.get("key_means").default())
NARROW = {"heads": 6, "kv_heads": 2, "head_dim": 64, "value_dim": 64}
PATTERNS = (SLASH, BLOCKS, HeadPattern("a_shape", 128, 3968))


def site(tokens: int, **fields: object) -> SiteShape:
    return replace(SiteShape(1, 32, 8, tokens, tokens, 128, 128), **fields)


@given(
    pattern=st.sampled_from(PATTERNS),
    tokens=st.integers(1024, 2**20),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    width=st.sampled_from([64, 128, 256]),
)
def test_dense_is_always_a_candidate_and_the_best_comes_first(
    pattern: HeadPattern, tokens: int, dtype: str, width: int
) -> None:
    shape = site(tokens, dtype=dtype, head_dim=width, value_dim=width)
    ranking = choose_tile(shape, pattern, H200)
    times = [r.ms for r in ranking.ranked]
    assert times == sorted(times)
    assert DENSE in [r.candidate.schedule for r in ranking.ranked]
    assert ranking.best.feasible
    for ranked in ranking.ranked:
        assert ranked.feasible == (ranked.ms < float("inf"))
        assert ranked.ms == pytest.approx(sum(ranked.terms.values())) or not ranked.feasible
        assert all(value >= 0 for value in ranked.terms.values())


def test_short_prompts_stay_dense_and_long_ones_do_not() -> None:
    assert choose_tile(site(4096), SLASH, H200).best.candidate.schedule == DENSE
    best = choose_tile(site(131072), SLASH, H200).best
    assert best.candidate.schedule != DENSE
    assert (best.candidate.block_q, best.candidate.block_k) == (64, 64), "distances scatter"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_break_even_is_where_the_ranking_turns(pattern: HeadPattern) -> None:
    tokens = break_even_tokens(site(1), pattern, H200)
    assert tokens is not None
    assert tokens % 64 == 0
    assert choose_tile(site(tokens), pattern, H200).best.candidate.schedule != DENSE
    assert choose_tile(site(tokens * 9 // 10), pattern, H200).best.candidate.schedule == DENSE


def measured() -> list[dict[str, Any]]:
    """On an H200; each row is one shape at one length."""
    files = ("attention_low_rank_h200.json", "attention_low_rank_retriever_h200.json")
    return [row for name in files for row in json.loads((RESULTS / name).read_text())["results"]]


def site_of(row: dict[str, Any]) -> SiteShape:
    heads, kv_heads, dim = row["heads"]
    return SiteShape(1, heads, kv_heads, row["tokens"], row["tokens"], dim, dim)


@pytest.mark.parametrize("heads", [[32, 8, 128], [6, 2, 64]])
def test_scored_rows_break_even_where_they_did(heads: list[int]) -> None:
    """Behind the longest prompt that was slower than dense, near the shortest that was faster."""
    rows = [row for row in measured() if row["heads"] == heads]
    slower = [row["tokens"] for row in rows if row["ours_ms"] >= row["cudnn_ms"]]
    faster = [row["tokens"] for row in rows if row["ours_ms"] < row["cudnn_ms"]]
    on_device = replace(H200, score_host=0.0)  # what the files hold are device times
    tokens = break_even_tokens(site_of(rows[0]), LOW_RANK, on_device, block_k=64)
    assert tokens is not None
    # Later than it could be where lists are not full, as the retriever's are not.
    assert max(slower, default=4096) < tokens < 1.25 * min(faster)


@pytest.mark.parametrize("narrow", [False, True])
def test_rows_are_not_scored_where_dense_is_over_before_the_host_is_ready(narrow: bool) -> None:
    shape = site(1, **(NARROW if narrow else {}))
    tokens = break_even_tokens(shape, LOW_RANK, H200, block_k=64)
    assert tokens is not None
    assert H200.score_host > 0
    for length, waits in ((tokens, False), (tokens * 9 // 10, True)):
        dense = choose_tile(shape.at_length(length), LOW_RANK, H200).of(Candidate(DENSE))
        assert (dense.ms < H200.score_host) == waits
    # Other patterns are measured with the host's time in.
    slash = break_even_tokens(shape, SLASH, H200)
    assert slash == break_even_tokens(shape, SLASH, replace(H200, score_host=0.0))


@pytest.mark.parametrize("row", measured(), ids=lambda row: f"{row['heads']} {row['tokens']}")
def test_scored_rows_are_never_thought_faster_than_they_were(row: dict[str, Any]) -> None:
    found = choose_tile(site_of(row), LOW_RANK, H200).of(Candidate("plain", 64, 64))
    predicted = found.terms["score"] + found.terms["index"]
    assert row["select_ms"] * 0.995 < predicted < 1.25 * row["select_ms"]
    attend = found.ms - predicted
    assert row["attend_ms"] < attend < 3 * row["attend_ms"], "as if every list were full"


@pytest.mark.parametrize("name", ["score", "score_row", "score_start"])
@given(pattern=st.sampled_from(SCORED), narrow=st.booleans())
def test_dearer_scores_pay_later(name: str, pattern: HeadPattern, narrow: bool) -> None:
    shape = site(1, **(NARROW if narrow else {}))
    found = []
    for factor in (0.25, 1.0, 4.0):
        constants = replace(H200, score_host=0.0, **{name: getattr(H200, name) * factor})
        tokens = break_even_tokens(shape, pattern, constants, block_k=64)
        found.append(tokens or 2**30)
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_scoring_is_counted_for_the_heads_that_do_it() -> None:
    shape = site(4096)
    alone, none = scoring(LOW_RANK, shape, 64), scoring(SLASH, shape, 64)
    assert (alone.heads, alone.rows, none.heads, none.flops) == (32, 32 * 4096, 0, 0)
    assert alone.flops == 2 * 16 * shape.allowed_pairs
    mixed = scoring(LayerPatterns((SLASH,) * 24 + (LOW_RANK,) * 8, "test"), shape, 64)
    assert (mixed.heads, mixed.flops) == (8, alone.flops / 4)
    assert scoring(LOW_RANK, replace(shape, dtype="float32"), 64).flops == 6 * alone.flops
    amounts = choose_tile(shape, LOW_RANK, H200).of(Candidate("plain", 64, 64)).amounts
    assert amounts is not None
    assert (amounts.index_keys, amounts.index_pairs) == (0, 0), "nothing but scores is looked at"


@pytest.mark.parametrize("pattern", SCORED)
def test_lists_of_scored_rows_are_as_long_as_their_pattern_says(pattern: HeadPattern) -> None:
    for tokens in (1024, 32768, 131072):
        shape = site(tokens)
        density = cover(pattern, shape, 64, 64, Clustering()).counted * 32 / shape.allowed_pairs
        assert density == pytest.approx(registry.get(pattern.name).density(pattern, tokens, 64))
    both = site(32768, causal=False)
    half = cover(pattern, both, 64, 64, Clustering()).counted * 32 / both.allowed_pairs
    assert half == pytest.approx(
        registry.get(pattern.name).density(pattern, 32768, 64) / 2, rel=0.01
    )


def test_break_even_of_a_slow_kernel_does_not_exist() -> None:
    slow = {
        key: tile if key == DENSE else replace(tile, matrix=1e3) for key, tile in H200.tiles.items()
    }
    assert break_even_tokens(site(1), SLASH, replace(H200, tiles=slow)) is None


def test_a_schedule_offers_the_tiles_that_it_has_for_every_head() -> None:
    for schedule, kinds in SCHEDULES.items():
        for pattern, kind in ((SLASH, "band"), (BLOCKS, "blocks")):
            found = [c for c in candidates(pattern, 32) if c.schedule == schedule]
            assert [(c.block_q, c.block_k) for c in found] == list(kinds[kind])
        mixed = LayerPatterns((SLASH, BLOCKS), "test")
        both = {(c.block_q, c.block_k) for c in candidates(mixed, 2) if c.schedule == schedule}
        assert both == set(kinds["band"]) & set(kinds["blocks"])
    assert {c.block_q for c in candidates(LOW_RANK, 32)} == {0, 64}, "lists are no longer for more"
    assert candidates(HeadPattern("dense"), 32) == (Candidate(DENSE),)


def test_what_cannot_run_is_pruned_with_a_reason() -> None:
    ranking = choose_tile(site(131072), BLOCKS, H200, target="sm_80")
    hopper = ranking.of(Candidate("hopper", 128, 128))
    assert "needs wgmma" in hopper.obstacles[0]
    key = "plain:64x64:128:bfloat16"
    reports = {key: Resources(shared=200_000, registers=255, spills=160)}
    ranking = choose_tile(site(131072), SLASH, H200, target="sm_80", reports=reports)
    plain = ranking.of(Candidate("plain", 64, 64))
    assert "200000 bytes of shared memory" in plain.obstacles[0]
    assert "spills 160 bytes a thread" in plain.obstacles[1]
    assert ranking.ranked[-1].ms == float("inf")
    wide = site(131072, head_dim=256, value_dim=256)
    found = choose_tile(wide, BLOCKS, H200).of(Candidate("hopper", 128, 64)).obstacles
    assert found == ("the hopper schedule takes head sizes up to 128",)


def test_a_tile_that_was_not_measured_is_pruned() -> None:
    tiles = {key: tile for key, tile in H200.tiles.items() if not key.startswith("plain:128")}
    ranking = choose_tile(site(131072), SLASH, replace(H200, tiles=tiles))
    assert "no constants of plain:128x64" in ranking.of(Candidate("plain", 128, 64)).obstacles[0]


def test_registers_of_a_program_are_limited_together() -> None:
    needed = Resources(shared=0, registers=255, spills=0, threads=384)
    assert obstacles(needed, DEVICE_LIMITS["sm_90"], schedule="hopper") == [
        "needs 97920 registers a program, 65536 exist"
    ]


def test_a_measured_density_replaces_the_estimate() -> None:
    tiles = {**H200.tiles, "plain:128x64": H200.tiles["plain:64x64"]}
    ranking = choose_tile(site(131072), SLASH, replace(H200, tiles=tiles), density=0.05)
    assert ranking.of(Candidate("plain", 64, 64)).density == pytest.approx(0.05)
    wide = ranking.of(Candidate("plain", 128, 64)).density
    assert 0.05 < wide < 0.1, "wider rows cover more, less than twice"


def test_heads_add_up() -> None:
    mixed = LayerPatterns((SLASH,) * 16 + (BLOCKS,) * 16, "test")
    amounts = choose_tile(site(65536), mixed, H200).of(Candidate("plain", 64, 64)).amounts
    half = [
        choose_tile(site(65536, heads=16, kv_heads=4), p, H200)
        .of(Candidate("plain", 64, 64))
        .amounts
        for p in (SLASH, BLOCKS)
    ]
    assert amounts is not None
    assert half[0] is not None
    assert half[1] is not None
    assert amounts.tiles == pytest.approx(half[0].tiles + half[1].tiles)


@pytest.mark.parametrize(("tokens", "block_q"), [(2048, 64), (4096, 64), (4096, 128)])
def test_cover_agrees_with_lowered_indices(tokens: int, block_q: int) -> None:
    """Random runs and columns, lowered by the code that builds the index, counted by brute force."""
    run, runs, window, columns, draws = 8, 20, 100, 64, 8
    geometry = Geometry(0, -1, 0, block_q, 64)
    space = geometry.distance_size(tokens)
    pairs = 0
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        distances = torch.zeros(1, 1, space, dtype=torch.bool)
        for start in torch.randint(0, tokens - run, (runs,), generator=generator).tolist():
            distances[..., start : start + run] = True
        distances[..., :window] = True
        kept = torch.zeros(1, 1, tokens, dtype=torch.bool)
        kept[..., torch.randperm(tokens, generator=generator)[:columns]] = True
        covered = lower_band(kept, distances, geometry, (tokens, tokens, tokens))[-1][0, 0].bool()
        for end in range(block_q, tokens + 1, block_q):
            visible = covered[end - torch.arange(end)] | kept[0, 0, :end]
            pairs += int(visible.sum()) * block_q
    head = HeadPattern("vertical_slash", columns, window + run * runs)
    shape = SiteShape(1, 1, 1, tokens, tokens, 64, 64)
    estimate = cover(head, shape, block_q, 64, Clustering(run=run, reach=0.5)).counted
    assert estimate == pytest.approx(pairs / draws, rel=0.1)


@pytest.mark.parametrize(
    ("tokens", "block_q", "measured"),
    [(32768, 64, 0.390), (131072, 64, 0.116), (131072, 128, 0.181)],
)
def test_density_comes_near_what_was_measured(tokens: int, block_q: int, measured: float) -> None:
    """Vertical-slash (512, 2048) on the inputs of benchmarks/attention.py."""
    shape = site(tokens)
    one = cover(SLASH, shape, block_q, 64, Clustering())
    density = one.counted * 32 / shape.allowed_pairs
    assert density == pytest.approx(measured, rel=0.15)


def test_a_site_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ShapeMismatch, match="multiple of its 8 key heads"):
        site(64, heads=12)
    with pytest.raises(ShapeMismatch, match="at most its 10 keys"):
        SiteShape(1, 1, 1, 20, 10, 64, 64)
