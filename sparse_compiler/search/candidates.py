"""What a search may give to a head: patterns with one free number, which grows until it costs enough."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_compiler.config import MAX_NUMBER
from sparse_compiler.errors import OptionInvalid
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry

__all__ = ["GRAMMAR", "Candidate", "default_candidates", "parse_candidates"]

GRAMMAR = "name, name(first) or name(first, second); a number, or * for one that grows, or 4*"
_TEXT = re.compile(r"(?P<name>\w+)(?:\(\s*(?P<numbers>[^()]*?)\s*\))?")
_NUMBER = re.compile(r"(?P<number>\d*)(?P<grows>\*?)")

#: Steps from nothing to everything along ``Pattern.from_budget``.
_BUDGET_STEPS = 4096

_KNOWN: dict[str, tuple[str, ...]] = {
    "a_shape": ("a_shape(128,*)",),
    "vertical_slash": (
        "vertical_slash(*,100)",
        "vertical_slash(4*,*)",
        "vertical_slash(*,*)",
        "vertical_slash(*,4*)",
        "vertical_slash(100,*)",
    ),
    "block_sparse": ("block_sparse(*)",),
}
"""Splits of columns and distances and the like; every other pattern follows its ``from_budget``."""


@dataclass(frozen=True)
class Candidate:
    """A line through the numbers of one pattern: number = fixed, or grows x step.

    Args:
        pattern: a registered name.
        numbers: (fixed, grows) of the first and second number; None follows
            ``Pattern.from_budget``.
    """

    pattern: str
    numbers: tuple[tuple[int, int], tuple[int, int]] | None = None

    @property
    def fixed(self) -> bool:
        """Nothing grows."""
        return self.numbers is not None and not any(grows for _, grows in self.numbers)

    def steps(self, num_keys: int) -> int:
        """How far it can grow for a prompt of that many tokens."""
        if self.numbers is None:
            return _BUDGET_STEPS
        return 1 if self.fixed else max(1, num_keys)

    def at(self, step: int, num_keys: int, block_q: int, causal: bool) -> HeadPattern:
        """The numbers after ``step`` steps, from 1 to ``steps``; as in ``Pattern.from_budget``."""
        if self.numbers is None:
            found = registry.get(self.pattern)
            return found.from_budget(step / _BUDGET_STEPS, num_keys, block_q, causal)
        first, second = (min(n + g * step, max(n, num_keys)) for n, g in self.numbers)
        return HeadPattern(self.pattern, first, second)

    def __str__(self) -> str:
        if self.numbers is None:
            return self.pattern
        texts = [
            str(n) if not grows else "*" if grows == 1 else f"{grows}*" for n, grows in self.numbers
        ]
        return f"{self.pattern}({','.join(texts)})"


def default_candidates() -> tuple[Candidate, ...]:
    """Every registered pattern, plug-ins included, but dense; some in several splits."""
    names = [name for name in registry.names() if name != "dense"]
    texts = [text for name in names for text in _KNOWN.get(name, (name,))]
    return parse_candidates(texts)


def parse_candidates(texts: Sequence[str]) -> tuple[Candidate, ...]:
    """Read candidates; equal ones count once.

    Raises:
        OptionInvalid: one does not follow ``GRAMMAR``, or names no pattern; or there is none.
    """
    found = tuple(dict.fromkeys(_parse(text) for text in texts))
    if not found:
        raise OptionInvalid("option 'candidates'", "at least one candidate", list(texts))
    return found


def _parse(text: str) -> Candidate:
    match = _TEXT.fullmatch(text.strip())
    names = [name for name in registry.names() if name != "dense"]
    if match is None:
        raise OptionInvalid("a candidate", GRAMMAR, text)
    if match["name"] not in names:
        raise OptionInvalid("a candidate's pattern", f"one of {', '.join(names)}", match["name"])
    if match["numbers"] is None:
        return Candidate(match["name"])
    numbers = [_number(part.strip(), text) for part in match["numbers"].split(",")]
    if len(numbers) > 2:
        raise OptionInvalid("a candidate", GRAMMAR, text)
    if len(numbers) == 1:
        numbers.append((registry.get(match["name"]).default().second, 0))
    return Candidate(match["name"], (numbers[0], numbers[1]))


def _number(part: str, text: str) -> tuple[int, int]:
    match = _NUMBER.fullmatch(part)
    if match is None or not part or int(match["number"] or 1) > MAX_NUMBER:
        raise OptionInvalid("a candidate", GRAMMAR, text)
    if not match["grows"]:
        return int(match["number"]), 0
    factor = int(match["number"] or 1)
    if factor == 0:
        raise OptionInvalid("a candidate", f"{GRAMMAR}; a factor is at least 1", text)
    return 0, factor
