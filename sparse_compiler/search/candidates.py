"""What a search may give to a head: patterns with one free number, which grows until it costs enough."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_compiler.config import MAX_NUMBER
from sparse_compiler.errors import OptionInvalid, PatternInvalid
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.listed import Listed
from sparse_compiler.patterns.row_scores import MILLION, RowScored

__all__ = ["GRAMMAR", "Candidate", "default_candidates", "parse_candidates"]

GRAMMAR = "name, name(first) or name(first, second); a number, or * for one that grows, or 4*"
_TEXT = re.compile(r"(?P<name>\w+)(?:\(\s*(?P<numbers>[^()]*?)\s*\))?")
_NUMBER = re.compile(r"(?P<number>\d*)(?P<grows>\*?)")

#: Steps from nothing to everything along ``Pattern.from_budget``, or down a threshold.
_BUDGET_STEPS = 4096
_WHOLE = 1000  # per mille

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
"""Splits of columns and distances and the like; of every other pattern its bare name."""


@dataclass(frozen=True)
class Candidate:
    """A line through the numbers of one pattern: number = fixed, or grows x step.

    A first number that is a threshold on shares of mass falls in place of growing, from 1 to a
    millionth, by equal ratios: more is kept step by step all the same, and unlike a number of
    blocks it means the same at every length.

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
        if self.numbers is None or self._falls:
            return _BUDGET_STEPS
        return 1 if self.fixed else max(1, num_keys)

    def at(self, step: int, num_keys: int, block_q: int, causal: bool) -> HeadPattern:
        """The numbers after ``step`` steps, from 1 to ``steps``; as in ``Pattern.from_budget``."""
        if self.numbers is None:
            found = registry.get(self.pattern)
            return found.from_budget(step / _BUDGET_STEPS, num_keys, block_q, causal)
        if self._falls:
            share = step / _BUDGET_STEPS
            return HeadPattern(self.pattern, round(MILLION ** (1 - share)), self.numbers[1][0])
        most = (_WHOLE if self._shares else num_keys, num_keys)
        first, second = (
            min(n + g * step, max(n, m)) for (n, g), m in zip(self.numbers, most, strict=True)
        )
        return HeadPattern(self.pattern, first, second)

    def carried(
        self,
        heads: Sequence[HeadPattern | None],
        num_keys: int,
        tokens: int,
        block_q: int,
        causal: bool,
    ) -> list[HeadPattern | None]:
        """What it found at ``num_keys`` tokens, as numbers for ``tokens`` that keep the same shares.

        Fixed numbers and thresholds stay.
        """
        if self.numbers is None:
            steps = {}
            for step in range(_BUDGET_STEPS, 0, -1):
                with contextlib.suppress(PatternInvalid):  # it was not found by that step
                    steps[self.at(step, num_keys, block_q, causal)] = step
            return [h and self.at(steps[h], tokens, block_q, causal) for h in heads]
        return [h and self._scaled(h, num_keys, tokens) for h in heads]

    def priced(
        self, step: int, num_keys: int, tokens: int, block_q: int, causal: bool
    ) -> HeadPattern:
        """What ``carried`` makes of ``at(step, num_keys)``."""
        if self.numbers is None:
            return self.at(step, tokens, block_q, causal)
        return self._scaled(self.at(step, num_keys, block_q, causal), num_keys, tokens)

    def _scaled(self, head: HeadPattern, num_keys: int, tokens: int) -> HeadPattern:
        assert self.numbers is not None
        if self._falls:
            return head
        counts = (self.numbers[0][1] > 0 and not self._shares, self.numbers[1][1] > 0)
        # A count of 0 would say something else.
        first, second = (
            max(1, round(number * tokens / num_keys)) if counted and number else number
            for number, counted in zip((head.first, head.second), counts, strict=True)
        )
        return HeadPattern(self.pattern, first, second)

    @property
    def _shares(self) -> bool:
        """The first number is per mille of something, or a threshold, and no count."""
        return isinstance(registry.get(self.pattern), Listed)

    @property
    def _falls(self) -> bool:
        """What grows is a threshold."""
        return self.numbers is not None and self.numbers[0][1] > 0 and _by_threshold(self.pattern)

    def __str__(self) -> str:
        if self.numbers is None:
            return self.pattern
        texts = [
            str(n) if not grows else "*" if grows == 1 else f"{grows}*" for n, grows in self.numbers
        ]
        return f"{self.pattern}({','.join(texts)})"


def default_candidates() -> tuple[Candidate, ...]:
    """Every registered pattern, plug-ins included, but dense; some in several splits.

    What repeats another pattern's choice is left out (``_repeats``).
    """
    names = [name for name in registry.names() if name != "dense" and not _repeats(name)]
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
        # Blocks that are counted at one length are too few at the next.
        falling = ((0, 1), (0, 0))
        return Candidate(match["name"], falling if _by_threshold(match["name"]) else None)
    numbers = [_number(part.strip(), text) for part in match["numbers"].split(",")]
    if len(numbers) > 2:
        raise OptionInvalid("a candidate", GRAMMAR, text)
    if len(numbers) == 1:
        numbers.append((registry.get(match["name"]).default().second, 0))
    if _by_threshold(match["name"]) and (numbers[0][1] > 1 or (numbers[0][1] and numbers[1][1])):
        raise OptionInvalid(
            f"a candidate of {match['name']}, whose first number is a threshold,",
            f"{match['name']}, {match['name']}(*,second) or {match['name']}(first,*)",
            text,
        )
    return Candidate(match["name"], (numbers[0], numbers[1]))


def _repeats(name: str) -> bool:
    """It is another pattern with a share of the mass to keep in place of that one's first number.

    Such patterns are for ``target_recall``; they rank blocks as the other does.
    """
    found, by_share = registry.get(name), registry.recall_names()
    others = (registry.get(other) for other in registry.names() if other not in by_share)
    return name in by_share and any(
        isinstance(found, type(other)) and type(found).choose is type(other).choose
        for other in others
    )


def _by_threshold(name: str) -> bool:
    """The first number is what a block must hold of a row's mass: the smaller, the more is kept."""
    # Of those whose first number is a share to be kept of all mass, recall can be asked for.
    return isinstance(registry.get(name), RowScored) and name not in registry.recall_names()


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
