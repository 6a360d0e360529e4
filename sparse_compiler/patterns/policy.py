"""Zero-config: what a head gets when nobody said anything about it."""

from __future__ import annotations

from sparse_compiler.errors import PatternInvalid
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import BlockRule

__all__ = ["AUTO_BAND", "AUTO_OTHER", "uniform"]

AUTO_OTHER = HeadPattern("block_sparse", 100)
"""Without a causal order the last rows say nothing about the first: rank blocks instead."""

AUTO_BAND = HeadPattern("vertical_slash", 1000, 1000)
"""Kernels that score rows know no bias; without them every pair of row and key would be read."""

RECALL_BY_ROWS, RECALL_BAND, RECALL_OTHER = "low_rank_recall", "switching_recall", "adaptive"
"""In place of ``auto`` where it scores rows, of other causal ones and of ``AUTO_OTHER``, where a share of
the mass is asked for."""


def uniform(
    option: str,
    heads: int,
    *,
    causal: bool,
    auto: HeadPattern,
    unlisted: bool = False,
    recall: float | None = None,
) -> list[HeadPattern]:
    """The same pattern for every head.

    Args:
        option: ``auto`` or a pattern's name.
        heads: local query heads.
        causal: the mask hides later keys.
        auto: what the executor can afford for a causal head about which nothing is known.
        unlisted: scoring rows would not pay: something is added to the logits, or every pair is
            computed anyway.
        recall: share of every row's mass to keep; None leaves the patterns their own numbers.
    Raises:
        PatternInvalid: the pattern cannot express ``recall``.
    """
    by_rows = isinstance(registry.get(auto.name).rule, BlockRule)
    if recall is not None:
        band = RECALL_BAND if unlisted or not by_rows else RECALL_BY_ROWS
        name = option if option != "auto" else band if causal else RECALL_OTHER
        found = registry.get(name).from_recall(recall)
        if found is None:
            names = ", ".join(registry.recall_names())
            raise PatternInvalid("a pattern with 'target_recall'", f"one of {names}", name)
        return [found] * heads
    if option == "auto":
        head = (AUTO_BAND if unlisted and by_rows else auto) if causal else AUTO_OTHER
    else:
        head = registry.get(option).default()
    return [head] * heads
