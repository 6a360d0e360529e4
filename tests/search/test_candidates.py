"""Candidates: their grammar, and the numbers to which they grow."""

from __future__ import annotations

import pytest

from sparse_compiler.errors import OptionInvalid
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry
from sparse_compiler.search.candidates import default_candidates, parse_candidates


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


@pytest.mark.parametrize("name", sorted(set(registry.names()) - {"dense"}))
def test_a_bare_name_follows_the_patterns_own_budget(name: str) -> None:
    [candidate] = parse_candidates([name])
    count = candidate.steps(4096)
    assert candidate.at(count, 4096, 64, True) == registry.get(name).from_budget(1.0, 4096, 64)
    half = registry.get(name).from_budget(0.5, 4096, 64)
    assert candidate.at(count // 2, 4096, 64, True) == half


def test_every_pattern_but_dense_is_a_default_and_some_come_in_splits() -> None:
    found = default_candidates()
    assert {c.pattern for c in found} == set(registry.names()) - {"dense"}
    assert sum(c.pattern == "vertical_slash" for c in found) >= 3
    assert not any(c.fixed for c in found)


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
