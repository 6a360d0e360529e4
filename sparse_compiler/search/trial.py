"""Trying patterns on one attention call: the index that they give, its output, its cost, its error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparse_compiler.errors import PatternInvalid
from sparse_compiler.ir.index import AttentionIndex, automatic_blocks, capacity_blocks
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.ir.shape import NEVER, SiteShape
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import Limits
from sparse_compiler.patterns.block_sparse import PUBLISHED_BLOCK
from sparse_compiler.patterns.listed import Listed
from sparse_compiler.runtime import dispatch, recorder
from sparse_compiler.runtime.observe import AttentionCall
from sparse_compiler.search.candidates import Candidate
from sparse_compiler.search.costs import CostModel, measure
from sparse_compiler.search.extrapolate import density_at

__all__ = [
    "Grown",
    "Trial",
    "clock_share",
    "densities_at",
    "grow_by_clock",
    "grow_by_model",
    "head_groups",
    "obstacle",
]

#: Growing stops where a step more is less than this share of what is kept.
_EXACTNESS = 1 / 64
_CLOCK_EXACTNESS = 1 / 16


def head_groups(call: AttentionCall) -> Iterator[tuple[range, AttentionCall]]:
    """The query heads of one key head after the other, so that memory is that of one group."""
    groups = call.q.shape[1] // call.k.shape[1]
    for kv in range(call.k.shape[1]):
        heads = slice(kv * groups, (kv + 1) * groups)
        bias = call.bias
        if bias is not None:
            dim = 1 if bias.dim() == 4 else 0
            bias = bias if bias.shape[dim] == 1 else bias.narrow(dim, heads.start, groups)
        yield (
            range(heads.start, heads.stop),
            replace(
                call,
                params=None if call.params is None else call.params[heads],
                q=call.q[:, heads],
                k=call.k[:, kv : kv + 1],
                v=call.v[:, kv : kv + 1],
                bias=bias,
                sinks=None if call.sinks is None else call.sinks[heads],
                out=call.out[:, heads],
                lse=call.lse[:, heads],
            ),
        )


def obstacle(call: AttentionCall, candidate: Candidate) -> str:
    """Why a candidate cannot be tried on this call at all; "" if it can."""
    if registry.get(candidate.pattern).needs_causal and not call.banded:
        return f"pattern {candidate.pattern} is defined for causal masks only"
    return ""


class Trial:
    """One call with heads that all follow one pattern, each with its own numbers.

    Args:
        call: of some query heads and their key heads.
        heads: a pattern for each query head of ``call``.
        size: row and key block.
    """

    def __init__(
        self, call: AttentionCall, heads: Sequence[HeadPattern], size: tuple[int, int]
    ) -> None:
        self.call = call
        self.geometry = replace(call.geometry, block_q=size[0], block_k=size[1])
        pattern = registry.get(heads[0].name)
        band = pattern.component_for(call.banded) == "band"
        limits = Limits()
        for head in dict.fromkeys(heads):
            limits = limits.join(pattern.limits(head, *size, call.banded))
        self._lists = [limits.columns, limits.distances, limits.blocks]
        self._slots = [len(heads), 0] if band else [0, len(heads)]
        rows = [
            [pattern.number, head.first, head.second, *((h, -1) if band else (-1, h))]
            for h, head in enumerate(heads)
        ]
        self._params = torch.tensor(rows, dtype=torch.int32, device=call.q.device)
        self._ids = [pattern.number]
        self._group = registry.summary_group((pattern,), size[1])

    @property
    def _mask(self) -> tuple[Tensor | None, ...]:
        call = self.call
        return call.rows, call.key_mask, call.bounds, call.bias

    def _choice(self, min_tokens: int) -> tuple[float, int, str, int]:
        return -1.0, min_tokens, self.call.executor, -1

    def select(self, min_tokens: int = 0) -> AttentionIndex:
        """The index; an empty one where ``min_tokens`` keeps the call dense."""
        call, geometry = self.call, self.geometry
        choice = self._choice(min_tokens)
        summary = dispatch.summarize_keys(call.k, call.rows, call.key_mask, self._group, *choice)
        place = (geometry.q_offset, geometry.left, geometry.right)
        arguments: Any = (
            *(call.q, call.k, summary, self._params, *self._mask, *place, call.scale),
            *(geometry.block_q, geometry.block_k, self._ids, self._slots, self._lists),
            *choice,
        )
        return AttentionIndex(*dispatch.select_keys(*arguments))

    def attend(self, index: AttentionIndex, min_tokens: int = 0) -> Tensor:
        """The output over an index, [B, H, Lq, Dv]; the dense one where ``min_tokens`` says so."""
        call, geometry = self.call, self.geometry
        place = (geometry.q_offset, geometry.left, geometry.right)
        arguments: Any = (
            *(call.q, call.k, call.v, *index.tensors(), *self._mask, *place),
            *(call.scale, call.softcap, call.sinks, geometry.block_q, geometry.block_k),
            *self._choice(min_tokens),
        )
        out, _ = dispatch.attend(*arguments)
        return out

    def densities(self, index: AttentionIndex) -> list[float]:
        """Computed over allowed pairs of each head; waits for the device."""
        call = self.call
        num_q, num_k = call.q.shape[2], call.k.shape[2]
        bounds = None if call.bounds is None else call.bounds.expand(call.q.shape[0], -1, -1)
        return recorder.density(index, self.geometry, call.rows, num_q, num_k, bounds).tolist()

    def errors(self, out: Tensor) -> list[float]:
        """Relative L2 error of each head's output over all rows; infinite where it is not finite."""
        found = []
        for head in range(out.shape[1]):
            dense = self.call.out[:, head].float()
            missed = (out[:, head].float() - dense).square().sum(dtype=torch.float64)
            size = dense.square().sum(dtype=torch.float64)
            error = float(missed.sqrt() / size.sqrt()) if float(size) else float(missed.sqrt())
            found.append(error if math.isfinite(error) else math.inf)
        return found


def densities_at(
    call: AttentionCall, heads: Sequence[HeadPattern], size: tuple[int, int], tokens: int
) -> list[float] | None:
    """Shares of the allowed pairs that heads would keep at another length, from what a call shows.

    Each row block lists what matters to it, up to the bound of the other length: the sample's own
    would hide how many that are. The sample's first half shows how that grows with the length. See
    ``extrapolate.density_at``.

    Args:
        heads: of one pattern, with numbers for ``tokens`` tokens; one for each query head.
    Returns:
        None where what rows keep by their position says nothing of another length: of patterns that
        do not choose by a threshold, under windows, padding, and masks that are not causal.
    """
    pattern, num_keys = registry.get(heads[0].name), call.k.shape[2]
    if tokens == num_keys or not isinstance(pattern, Listed) or not _sees_all_before(call):
        return None
    most = automatic_blocks(tokens, PUBLISHED_BLOCK)
    asked = [replace(h, second=h.second or most) for h in heads]
    half = num_keys // 2 // size[0] * size[0]
    # Where a bias would have to be cut too, rows are taken to list as much in a longer prompt.
    shorter = _listed(_first(call, half), asked, size) if half and call.bias is None else None
    limits = [pattern.limits(head, *size, call.banded).blocks for head in heads]
    bound = torch.tensor([capacity_blocks(limit, tokens, size[1]) for limit in limits])
    counts = _listed(call, asked, size)
    return density_at(counts, num_keys, size, tokens, bound, shorter).tolist()


def _listed(call: AttentionCall, heads: Sequence[HeadPattern], size: tuple[int, int]) -> Tensor:
    """Key blocks that each row block lists, the mean over the batch, float64 [H, row blocks]."""
    index = Trial(call, heads, size).select()
    return index.num_blocks.double().mean(0)[index.slots[:, 1].long()].cpu()


def _first(call: AttentionCall, tokens: int) -> AttentionCall:
    """A call for which ``_sees_all_before`` holds, of its first tokens alone, without a bias."""
    whole = call.rows.new_tensor([0, tokens, 0, 0, tokens])
    place = slice(None), slice(None), slice(tokens)
    return replace(
        call,
        rows=whole.expand_as(call.rows).contiguous(),
        **{name: getattr(call, name)[place] for name in ("q", "k", "v", "out", "lse")},
    )


def _sees_all_before(call: AttentionCall) -> bool:
    """Row i of every batch entry sees the keys up to i, and nothing else hides any."""
    num_q, num_k, geometry = call.q.shape[2], call.k.shape[2], call.geometry
    whole = call.rows.new_tensor([0, num_q, 0, 0, num_k])
    plain = call.banded and geometry.left < 0 and geometry.q_offset == 0 and num_q == num_k
    return plain and call.key_mask is None and bool((call.rows == whole).all())


@dataclass(frozen=True)
class Grown:
    """What a candidate became for each head.

    Args:
        heads: the numbers; None where the smallest cost too much, or the pattern cannot be used.
        smallest: what the smallest numbers cost each head; empty if unknown.
        reason: why a pattern cannot be used; "" otherwise.
    """

    heads: tuple[HeadPattern | None, ...]
    smallest: tuple[float, ...] = ()
    reason: str = ""

    @property
    def least(self) -> float:
        """The lowest cost of the smallest numbers; infinite if unknown."""
        return min(self.smallest, default=math.inf)


def _nothing(count: int, reason: str) -> Grown:
    return Grown((None,) * count, reason=reason)


def grow_by_model(
    call: AttentionCall,
    shape: SiteShape,
    candidate: Candidate,
    budget: float,
    cost: CostModel,
) -> Grown:
    """Grow a candidate for each head of a call until its predicted cost reaches the budget.

    The prediction knows the share of pairs that the head's own index covers, so that scattered
    distances of one head and those of another that lie together cost what they cost. At another
    length the share is that of ``densities_at``, or else the sample's.

    Args:
        call: one group of heads of the layer.
        shape: of the whole layer, at the length for which numbers are wanted.
    """
    num_heads, num_keys = call.q.shape[1], call.k.shape[2]
    size = cost.blocking(call)

    def numbers(step: int) -> HeadPattern:
        return candidate.at(step, num_keys, size[0], call.banded)

    def shares(steps: Sequence[int]) -> list[float]:
        place = (num_keys, shape.num_k, size[0], call.banded)
        there = [candidate.priced(step, *place) for step in steps]
        densities = densities_at(call, there, size, shape.num_k)
        if densities is None:
            trial = Trial(call, [numbers(step) for step in steps], size)
            densities = trial.densities(trial.select())
        return [cost.share(shape, h, d, size) for h, d in zip(there, densities, strict=True)]

    try:
        first = shares([1] * num_heads)
        fits = [share <= budget for share in first]
        most = candidate.steps(num_keys)
        low = _grow(shares, num_heads, most, budget, _EXACTNESS) if any(fits) else [1] * num_heads
    except PatternInvalid as error:
        return _nothing(num_heads, str(error))
    found = (numbers(step) if fit else None for step, fit in zip(low, fits, strict=True))
    return Grown(tuple(found), tuple(first))


def _grow(
    shares: Callable[[Sequence[int]], list[float]],
    count: int,
    most: int,
    budget: float,
    exactness: float,
) -> list[int]:
    """The largest step of each head that costs no more than the budget; 1 where none does.

    Up a ladder first, so that nothing far above the budget is ever tried, then by bisection.

    Args:
        shares: costs of a step for each head.
        count: heads.
        most: the last step.
    """
    low, high = [1] * count, [0] * count  # a high of 0 is not known yet
    for rung in sorted({most // parts for parts in (256, 64, 16, 4, 1)} - {0, 1}):
        if all(high):
            break
        found = shares([rung if not high[h] else low[h] for h in range(count)])
        for h in range(count):
            if not high[h]:
                fits = found[h] <= budget
                low[h], high[h] = (rung, 0) if fits else (low[h], rung)
    high = [top or low[h] for h, top in enumerate(high)]
    _bisect(low, high, shares, budget, exactness)
    return low


def _bisect(
    low: list[int],
    high: list[int],
    shares: Callable[[Sequence[int]], list[float]],
    budget: float,
    exactness: float,
) -> None:
    """Raise each ``low``, which fits, towards ``high``, which does not, by ratios."""
    while True:
        open_heads = [h for h in range(len(low)) if high[h] - low[h] > max(1, low[h] * exactness)]
        if not open_heads:
            return
        middle = list(low)
        for h in open_heads:
            middle[h] = min(max(math.isqrt(low[h] * high[h]), low[h] + 1), high[h] - 1)
        found = shares(middle)
        for h in open_heads:
            if found[h] <= budget:
                low[h] = middle[h]
            else:
                high[h] = middle[h]


def clock_share(trial: Trial) -> float:
    """Measured time of select and attend over that of dense attention."""
    device = trial.call.q.device
    empty = trial.select(NEVER)
    dense = measure(lambda: trial.attend(empty, NEVER), device)
    return measure(lambda: trial.attend(trial.select()), device) / dense


def grow_by_clock(
    call: AttentionCall, candidate: Candidate, budget: float, size: tuple[int, int]
) -> Grown:
    """Grow a candidate for all heads of a layer alike until select and attend take long enough."""
    num_heads, num_keys = call.q.shape[1], call.k.shape[2]

    def share(step: int) -> float:
        head = candidate.at(step, num_keys, size[0], call.banded)
        return clock_share(Trial(call, [head] * num_heads, size))

    try:
        first = share(1)
        if first > budget:
            return Grown((None,) * num_heads, (first,) * num_heads)
        most = candidate.steps(num_keys)
        [low] = _grow(lambda steps: [share(steps[0])], 1, most, budget, _CLOCK_EXACTNESS)
    except PatternInvalid as error:
        return _nothing(num_heads, str(error))
    head = candidate.at(low, num_keys, size[0], call.banded)
    return Grown((head,) * num_heads, (first,) * num_heads)
