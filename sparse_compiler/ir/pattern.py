"""What a head does: the name of its pattern and two numbers, and tables of those."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HeadPattern", "LayerPatterns", "fewest_queries"]


def fewest_queries(min_queries: int, min_tokens: int) -> int:
    """Query rows below which a call stays dense, at compile time and at run time alike.

    Args:
        min_queries: what the executor asks for.
        min_tokens: of the call; a user who lowers it to try short prompts lowers this bound too.
    """
    return min(min_queries, max(2, min_tokens))


@dataclass(frozen=True)
class HeadPattern:
    """One query head's pattern.

    Args:
        name: a registered pattern, e.g. ``vertical_slash``, ``a_shape``, ``block_sparse``; or ``dense``.
        first, second: the pattern's own numbers in tokens or blocks (columns and distances, sink
            and local window, blocks and unused); 0 where unused.
    """

    name: str
    first: int = 0
    second: int = 0


@dataclass(frozen=True)
class LayerPatterns:
    """The patterns of all query heads of one layer, and where they came from.

    Args:
        heads: one entry for each local query head.
        origin: ``policy``, ``option`` or the path of a configuration file.
        budget: None to use each head's own numbers; else the share of the allowed pairs to aim at
            (1.0: every pair that the mask allows).
    """

    heads: tuple[HeadPattern, ...]
    origin: str
    budget: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Distinct pattern names, in order of first use."""
        return tuple(dict.fromkeys(head.name for head in self.heads))

    def describe(self) -> str:
        counts: dict[str, int] = {}
        for head in self.heads:
            full_budget = self.budget is not None
            text = head.name if full_budget else f"{head.name}({head.first}, {head.second})"
            counts[text] = counts.get(text, 0) + 1
        text = " + ".join(f"{n} x {name}" for name, n in counts.items())
        return text if self.budget is None else f"{text} at budget {self.budget:g}"
