"""Trying a pattern on a call: every operand reaches the executor, costs stay below the budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from search_calls import TOKENS, attention_call

from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.runtime.observe import AttentionCall, attended, observing, selected
from sparse_compiler.runtime.reference import allowed_pairs, attend_pairs, covered_pairs
from sparse_compiler.search.candidates import parse_candidates
from sparse_compiler.search.costs import CostModel, cost_model, shape_of
from sparse_compiler.search.maps import attention_map, kept_map
from sparse_compiler.search.trial import Trial, grow_by_clock, grow_by_model, head_groups

ALL = HeadPattern("a_shape", 0, 10_000)
SIZE = (64, 64)


def _bounds() -> torch.Tensor:
    row = torch.arange(192)
    return torch.stack([row // 96 * 96, row], -1).to(torch.int32)[None]


OPERANDS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "chunk": lambda: {"num_q": 130},
    "window": lambda: {"left": 50},
    "soft cap": lambda: {"softcap": 2.0},
    "one key head": lambda: {"kv_heads": 1},
    "no groups": lambda: {"kv_heads": 4},
    "sinks": lambda: {"sinks": torch.tensor([0.0, 3.0, -2.0, 1.0])},
    "padding": lambda: {"key_mask": (torch.arange(192) >= 7)[None]},
    "bias of heads": lambda: {"bias": torch.randn(1, 4, 1, 192)},
    "bias of pairs": lambda: {"bias": torch.randn(1, 1, 192, 192)},
    "table": lambda: {"bias": torch.randn(4, 383)},
    "table of all": lambda: {"bias": torch.randn(1, 383)},
    "documents": lambda: {"bounds": _bounds()},
    "no order": lambda: {"right": -1},
}


@pytest.mark.parametrize("name", OPERANDS)
def test_a_pattern_that_keeps_everything_has_no_error_group_by_group(name: str) -> None:
    call = attention_call(**OPERANDS[name]())
    seen: list[int] = []
    for heads, group in head_groups(call):
        trial = Trial(group, [ALL] * len(heads), SIZE)
        index = trial.select()
        errors = trial.errors(trial.attend(index))
        assert max(errors) < 1e-5
        assert all(d == pytest.approx(1.0, abs=0.02) or d > 1 for d in trial.densities(index))
        seen += heads
    assert seen == list(range(4))


def test_the_error_is_relative_over_all_rows() -> None:
    call = attention_call()
    _, group = next(head_groups(call))
    heads = [HeadPattern("a_shape", 8, 70), HeadPattern("a_shape", 2, 8)]
    trial = Trial(group, heads, SIZE)
    index = trial.select()
    pairs = covered_pairs(index, trial.geometry, 192, 192) > 0
    pairs &= allowed_pairs(1, 192, 192, trial.geometry)[:, None]
    out, _ = attend_pairs(group.q, group.k, group.v, pairs, scale=0.25)
    errors = trial.errors(trial.attend(index))
    for head, error in enumerate(errors):
        dense = group.out[:, head]
        assert error == pytest.approx(float((out[:, head] - dense).norm() / dense.norm()), rel=1e-4)
    assert 0 < errors[0] < errors[1]


def test_an_output_that_is_not_finite_is_never_chosen() -> None:
    call = attention_call()
    trial = Trial(call, [ALL] * 4, SIZE)
    out = call.out.clone()
    out[:, 2, 5] = math.nan
    assert trial.errors(out)[2] == math.inf
    assert trial.errors(out)[1] == 0


COST = CostModel(None, SIZE, "")


@pytest.mark.parametrize(
    "text", ["a_shape(16,*)", "vertical_slash(*,100)", "vertical_slash(*,*)", "block_sparse"]
)
def test_growing_stops_just_below_the_budget(text: str) -> None:
    call = attention_call(num_q=TOKENS, num_k=TOKENS)
    shape, [candidate] = shape_of(call), parse_candidates([text])
    _, group = next(head_groups(call))
    sizes = []
    for budget in (0.45, 0.7):
        grown = grow_by_model(group, shape, candidate, budget, COST)
        heads = [head for head in grown.heads if head is not None]
        assert len(heads) == 2
        assert grown.least <= budget
        trial = Trial(group, heads, SIZE)
        for head, density in zip(heads, trial.densities(trial.select()), strict=True):
            share = COST.share(shape, head, density, SIZE)
            assert budget - 0.2 < share <= budget
        sizes.append(heads[0].first + heads[0].second)
    assert sizes[0] < sizes[1]


def test_a_budget_below_the_smallest_gives_nothing_and_says_how_much_it_takes() -> None:
    call = attention_call()
    [candidate] = parse_candidates(["vertical_slash(*,100)"])
    grown = grow_by_model(call, shape_of(call), candidate, 0.01, COST)
    assert grown.heads == (None,) * 4
    assert 0.01 < grown.least < 2


def test_a_fixed_candidate_is_taken_or_left() -> None:
    call = attention_call(num_q=TOKENS, num_k=TOKENS)
    [candidate] = parse_candidates(["a_shape(16,128)"])
    shape = shape_of(call)
    assert set(grow_by_model(call, shape, candidate, 0.6, COST).heads) == {
        HeadPattern("a_shape", 16, 128)
    }
    assert set(grow_by_model(call, shape, candidate, 0.2, COST).heads) == {None}


def test_by_the_clock_all_heads_grow_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that knows the numbers stands in for the real one."""
    from sparse_compiler.search import trial

    def share(tried: Trial) -> float:
        return float(tried._params[0, 2]) / 400

    monkeypatch.setattr(trial, "clock_share", share)
    call = attention_call(num_q=TOKENS, num_k=TOKENS)
    [candidate] = parse_candidates(["a_shape(16,*)"])
    [head] = {*grow_by_clock(call, candidate, 0.5, SIZE).heads}
    assert head is not None
    assert 185 <= head.second <= 200
    assert set(grow_by_clock(call, candidate, 0.001, SIZE).heads) == {None}


def test_the_real_clock_runs() -> None:
    call = attention_call(num_q=TOKENS, num_k=TOKENS)
    [candidate] = parse_candidates(["a_shape(16,64)"])
    grown = grow_by_clock(call, candidate, 1e9, SIZE)
    assert set(grown.heads) == {HeadPattern("a_shape", 16, 64)}
    assert 0 < grown.least < math.inf


def test_constants_of_a_device_charge_for_the_index_too() -> None:
    model = cost_model("cpu", "NVIDIA H200")
    call = attention_call(num_q=TOKENS, num_k=TOKENS)
    shape = shape_of(call)
    head = HeadPattern("vertical_slash", 100, 100)
    short = model.share(shape, head, 0.1, model.blocking(call))
    long = model.share(shape.at_length(2**17), head, 0.1, model.blocking(call))
    assert short > 1 > long > 0.1
    assert "H200" in model.note


# ---- the observer ------------------------------------------------------------------------------


def test_what_a_watcher_runs_itself_is_not_shown_to_it() -> None:
    call = attention_call()
    shown: list[AttentionCall] = []

    def watch(seen: AttentionCall) -> None:
        shown.append(seen)
        trial = Trial(seen, [ALL] * 4, SIZE)
        trial.attend(trial.select())

    with observing(watch):
        trial = Trial(call, [HeadPattern("a_shape", 4, 70)] * 4, SIZE)
        trial.attend(trial.select())
    assert len(shown) == 1
    assert shown[0].params is not None
    assert shown[0].params[:, 2].tolist() == [70] * 4
    assert shown[0].banded
    trial.attend(trial.select())
    assert len(shown) == 1


def test_a_watcher_may_put_another_output_in_place() -> None:
    call = attention_call()
    trial = Trial(call, [ALL] * 4, SIZE)
    with observing(lambda seen: torch.zeros_like(seen.out)):
        assert not trial.attend(trial.select()).any()


def test_without_a_watcher_nothing_is_made() -> None:
    out = torch.ones(1)

    def make(params: object) -> AttentionCall:
        raise AssertionError

    selected(3, out)
    assert attended(3, make, out) is out


# ---- maps --------------------------------------------------------------------------------------


def _unpacked(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data[1:])).view(data[0], -1)


def test_a_map_of_attention_is_pooled_mass_on_a_logarithmic_scale() -> None:
    call = attention_call(left=60, num_q=100, num_k=100, heads=2, kv_heads=1)
    pairs = allowed_pairs(1, 100, 100, call.geometry)
    scores = (call.q @ call.k.transpose(-1, -2) * 0.25).masked_fill(~pairs[:, None], -math.inf)
    mass = scores.softmax(-1)[0, 1]
    found = _unpacked(attention_map(call, 1))
    expected = 1 + 254 * (1 + (mass / mass.max()).log10().clamp(min=-6) / 6)
    assert torch.allclose(found.float(), torch.where(mass > 0, expected, 0.0), atol=0.6)


@pytest.mark.parametrize(
    "head", [HeadPattern("vertical_slash", 40, 8), HeadPattern("a_shape", 3, 9)]
)
def test_a_map_of_what_is_kept_agrees_with_the_index(head: HeadPattern) -> None:
    call = attention_call(num_q=128, num_k=128, heads=2, kv_heads=1)
    trial = Trial(call, [head] * 2, (16, 16))
    index = trial.select()
    kept = covered_pairs(index, trial.geometry, 128, 128)[0, 1]
    allowed = allowed_pairs(1, 128, 128, call.geometry)[0]
    found = _unpacked(kept_map(index, trial.geometry, call, 1))
    assert torch.equal(found[allowed], kept.long()[allowed] * 255)
    assert not found.all()


def test_a_map_of_blocks_and_more_keys_than_cells() -> None:
    call = attention_call(num_q=64, num_k=512, heads=2, kv_heads=1)
    trial = Trial(call, [HeadPattern("block_sparse", 2)] * 2, SIZE)
    index = trial.select()
    kept = covered_pairs(index, trial.geometry, 64, 512)[0, 0].view(64, 128, 4).float().mean(-1)
    assert torch.equal(_unpacked(kept_map(index, trial.geometry, call, 0)), (kept * 255).long())
    assert attention_map(call, 0)[0] == 64


def test_a_row_that_sees_nothing_has_no_mass() -> None:
    call = attention_call(key_mask=torch.zeros(1, 192, dtype=torch.bool))
    assert not _unpacked(attention_map(replace(call), 0)).any()
