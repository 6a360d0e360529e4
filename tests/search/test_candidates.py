"""Candidates: their grammar, and the numbers to which they grow."""

from __future__ import annotations

import pytest

from sparse_compiler.errors import OptionInvalid
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import BlockChoice, SelectRequest
from sparse_compiler.patterns.key_means import KeyMeans
from sparse_compiler.search.candidates import default_candidates, parse_candidates

BY_THRESHOLD = ["key_groups", "key_means", "low_rank"]


@pytest.mark.parametrize(
    ("text", "step", "expected"),
    [
        ("a_shape(128,*)", 50, (128, 50)),
        ("vertical_slash(*, 4*)", 20, (20, 80)),
        ("vertical_slash(4*,100)", 1000, (2048, 100)),
        ("vertical_slash(3000,*)", 4, (3000, 4)),
        ("vertical_slash(1000,6096)", 1, (1000, 6096)),
        ("block_sparse(*)", 7, (7, 0)),
        ("a_shape( * )", 7, (7, 3968)),
    ],
)
def test_numbers_follow_the_text(text: str, step: int, expected: tuple[int, int]) -> None:
    [candidate] = parse_candidates([text])
    name = text.partition("(")[0]
    assert candidate.at(step, 2048, 64, True) == HeadPattern(name, *expected)
    assert parse_candidates([str(candidate)]) == (candidate,)


@pytest.mark.parametrize("name", sorted(set(registry.names()) - {"dense", *BY_THRESHOLD}))
def test_a_bare_name_follows_the_patterns_own_budget(name: str) -> None:
    [candidate] = parse_candidates([name])
    count = candidate.steps(4096)
    assert candidate.at(count, 4096, 64, True) == registry.get(name).from_budget(1.0, 4096, 64)
    half = registry.get(name).from_budget(0.5, 4096, 64)
    assert candidate.at(count // 2, 4096, 64, True) == half


@pytest.mark.parametrize("name", BY_THRESHOLD)
def test_a_threshold_falls_to_a_millionth_and_the_bound_follows_the_length(name: str) -> None:
    [candidate] = parse_candidates([name])
    assert parse_candidates([str(candidate), f"{name}(*)"]) == (candidate,)
    for tokens in (4096, 1 << 17):
        count = candidate.steps(tokens)
        found = [candidate.at(step, tokens, 64, True) for step in range(1, count + 1)]
        firsts = [head.first for head in found]
        assert firsts == sorted(firsts, reverse=True)
        assert (firsts[count // 2 - 1], firsts[-1]) == (1000, 1)
        assert {(head.name, head.second) for head in found} == {(name, 0)}


def test_a_bound_may_be_fixed_or_grow_beside_a_threshold() -> None:
    falls, grows = parse_candidates(["low_rank(*,100)", "low_rank(7000,*)"])
    assert falls.at(falls.steps(4096), 4096, 64, True) == HeadPattern("low_rank", 1, 100)
    assert grows.at(30, 4096, 64, True) == HeadPattern("low_rank", 7000, 30)


@pytest.mark.parametrize("text", ["low_rank(*,*)", "low_rank(2*)", "key_groups(4*,10)"])
def test_a_threshold_and_a_bound_do_not_grow_together(text: str) -> None:
    with pytest.raises(OptionInvalid, match="threshold"):
        parse_candidates([text])


@pytest.mark.parametrize(
    ("text", "step", "expected"),
    [
        ("a_shape(128,*)", 50, (128, 400)),
        ("vertical_slash(4*,*)", 20, (640, 160)),
        ("vertical_slash(1000,100)", 1, (1000, 100)),
        ("block_sparse(*)", 7, (56, 0)),
        ("low_rank", 2048, (1000, 0)),
        ("low_rank(7000,*)", 9, (7000, 72)),
    ],
)
def test_counts_keep_their_share_at_another_length(
    text: str, step: int, expected: tuple[int, int]
) -> None:
    [candidate] = parse_candidates([text])
    found = candidate.at(step, 16384, 64, True)
    carried = candidate.carried([found, None], 16384, 131072, 64, True)
    assert carried == [HeadPattern(candidate.pattern, *expected), None]
    assert candidate.priced(step, 16384, 131072, 64, True) == carried[0]


@pytest.mark.parametrize("name", ["adaptive", "tri_shape"])
def test_a_patterns_own_budget_is_carried_to_another_length(name: str) -> None:
    [candidate] = parse_candidates([name])
    found = candidate.at(1000, 16384, 64, True)
    assert candidate.carried([found], 16384, 16384, 64, True) == [found]
    [carried] = candidate.carried([found], 16384, 131072, 64, True)
    assert carried is not None
    pattern = registry.get(name)
    shares = [pattern.density(found, 16384, 64), pattern.density(carried, 131072, 64)]
    assert shares[1] == pytest.approx(shares[0], rel=0.1)


def test_every_pattern_but_dense_and_repetitions_is_a_default_and_some_come_in_splits() -> None:
    found = default_candidates()
    left_out = {"dense", "low_rank_recall", "switching_recall"}
    assert {c.pattern for c in found} == set(registry.names()) - left_out
    assert sum(c.pattern == "vertical_slash" for c in found) >= 3
    assert not any(c.fixed for c in found)


def test_what_repeats_another_patterns_choice_is_known_by_its_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A share of the mass in place of the other's number; not one that chooses by itself."""

    class ByShare(KeyMeans):
        name, number, widest, is_share = "by_share", 4242, 1000, True

    class Other(ByShare):
        name, number = "other", 4243

        def choose(self, request: SelectRequest) -> BlockChoice:
            return super().choose(request)

    class Twin(KeyMeans):
        name, number = "twin", 4244

    for kind in (ByShare, Other, Twin):
        monkeypatch.setitem(registry._PATTERNS, kind.name, kind())
    found = {c.pattern for c in default_candidates()}
    assert "by_share" not in found and {"key_means", "other", "twin"} <= found
    assert parse_candidates(["by_share"])[0].pattern == "by_share"


def test_equal_candidates_count_once() -> None:
    assert len(parse_candidates(["a_shape(1,*)", "a_shape( 1 , * )"])) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dense",
        "no_such",
        "vertical_and_slash(*,1)",
        "a_shape(",
        "a_shape()",
        "a_shape(1,2,3)",
        "a_shape(-1,*)",
        "a_shape(1.5,*)",
        "a_shape(0*,1)",
        "a_shape(**,1)",
        "a_shape(*4,1)",
        "a_shape(99999999999,*)",
        "a_shape(1,*) b",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(OptionInvalid, match="candidate"):
        parse_candidates([text])


def test_no_candidates_are_refused() -> None:
    with pytest.raises(OptionInvalid, match="at least one"):
        parse_candidates([])


@pytest.mark.parametrize("name", ["adaptive", "antidiagonal", "switching", "low_rank_recall"])
def test_a_share_grows_to_the_whole_and_is_no_count(name: str) -> None:
    candidate = parse_candidates([f"{name}(*,*)"])[0]
    place = (16384, 131072, 64, True)
    found = [candidate.at(step, 16384, 64, True) for step in (300, 1000, 5000)]
    assert [head.first for head in found] == [300, 1000, 1000]
    there = candidate.carried(found, *place)
    assert [(h.first, h.second) for h in there if h] == [(300, 2400), (1000, 8000), (1000, 40000)]


def test_a_bound_never_becomes_automatic() -> None:
    candidate = parse_candidates(["low_rank(1,*)"])[0]
    (head,) = candidate.carried([HeadPattern("low_rank", 1, 1)], 16384, 4096, 64, True)
    assert head is not None
    assert head.second == 1
