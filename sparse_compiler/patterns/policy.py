"""Zero-config: what a head gets when nobody said anything about it."""

from __future__ import annotations

from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry

__all__ = ["AUTO_OTHER", "uniform"]

AUTO_OTHER = HeadPattern("block_sparse", 100)
"""Without a causal order the last rows say nothing about the first: rank blocks instead."""


def uniform(option: str, heads: int, *, causal: bool, auto: HeadPattern) -> list[HeadPattern]:
    """The same pattern for every head.

    Args:
        option: ``auto`` or a pattern's name.
        heads: local query heads.
        causal: the mask hides later keys.
        auto: what the executor can afford for a causal head about which nothing is known.
    """
    if option == "auto":
        head = auto if causal else AUTO_OTHER
    else:
        head = registry.get(option).default()
    return [head] * heads
