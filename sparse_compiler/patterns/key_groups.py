"""Key groups: every row is scored against the means of small groups of neighbouring keys."""

from __future__ import annotations

import torch

from sparse_compiler.patterns.base import BlockRule, Scored, SelectRequest
from sparse_compiler.patterns.row_scores import RowScored
from sparse_compiler.patterns.summaries import means_of

__all__ = ["KeyGroups", "of_means"]


def of_means(request: SelectRequest, group: int = 0) -> Scored:
    """The queries as they are, and the means of the visible keys of each group.

    Args:
        group: keys of a mean; 0 takes the summary's.
    """
    # A row with a NaN or inf votes for nothing: it must not choose for its neighbours.
    queries, scale = request.q, request.scale
    queries = torch.where(queries.isfinite().all(-1, keepdim=True), queries, 0)
    if scale < 0:
        queries, scale = -queries, -scale
    means = request.summary if group in (0, request.group) else means_of(request, None, group)
    finite = means.isfinite().all(-1)
    means = torch.where(finite[..., None], means, 0).to(queries.dtype)
    return Scored(queries, means, ~finite, group or request.group, scale)


class KeyGroups(RowScored):
    """Keep key blocks with 8 neighbours whose mean holds ``first`` millionths of some row's mass.

    See ``RowScored`` for ``second`` and what is always kept.

    Costs 1/8 of dense attention's score products. Misses keys that stand out alone: the mean of 8 has
    an eighth of such a key's logit, and rotary positions turn neighbours against each other. A soft
    cap is not seen here, so that peaks are overestimated. Under a causal mask the choice for a row
    block depends on nothing after it.
    """

    name = "key_groups"
    number = 4
    summary_keys = 8
    usual = 5000
    rule = BlockRule(number, every=4, operands=of_means, group=8)
