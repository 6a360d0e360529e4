"""One layer of a search: grow every candidate, try it, keep numbers, costs and errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from sparse_compiler.errors import OptionInvalid, TensorInvalid
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.ir.shape import SiteShape
from sparse_compiler.runtime.observe import AttentionCall
from sparse_compiler.search.candidates import Candidate
from sparse_compiler.search.costs import CostModel, shape_of
from sparse_compiler.search.maps import attention_map, kept_map
from sparse_compiler.search.state import LayerRecord
from sparse_compiler.search.trial import (
    Grown,
    Trial,
    clock_share,
    densities_at,
    grow_by_clock,
    grow_by_model,
    head_groups,
    obstacle,
)

__all__ = ["Plan", "add_maps", "best_candidate", "swap", "try_layer"]

#: Digits of an error that count.
_DIGITS = 6


@dataclass(frozen=True)
class Plan:
    """What a search is asked for.

    Args:
        candidates: in order of preference where errors are equal.
        budget: share of dense attention's time.
        clock: costs are measured, not predicted.
        cost: predicts, and says with which blocks to try.
        by_logits: errors are of the logits; ``try_layer`` leaves them out.
        layers: numbers of those to search; None is all.
        samples: prompts.
        maps: keep pictures of the last sample.
        for_tokens: length for which numbers are wanted and costs predicted; 0 is the sample's.
    """

    candidates: tuple[Candidate, ...]
    budget: float
    clock: bool
    cost: CostModel
    by_logits: bool
    layers: frozenset[int] | None
    samples: int
    maps: bool
    for_tokens: int = 0

    def wants(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers

    def shape(self, call: AttentionCall) -> SiteShape:
        """The sizes for which costs are predicted."""
        found, tokens = shape_of(call), self.for_tokens
        return replace(found, num_q=tokens, num_k=tokens) if tokens else found


def try_layer(
    call: AttentionCall, record: LayerRecord, plan: Plan, sample: int, where: str
) -> None:
    """Add what one sample says about one layer to its record.

    Args:
        call: dense, of all heads.
        where: names the layer for messages.
    Raises:
        OptionInvalid: a head for which no candidate is cheap enough.
        TensorInvalid: the dense output is not finite.
    """
    if not bool(call.out.isfinite().all()):
        raise TensorInvalid("the attention output", "finite", "NaN or inf", where=where)
    if not record.grown:
        _grow(call, record, plan, where)
    size = plan.cost.blocking(call)
    shape, count = plan.shape(call), len(plan.candidates)
    errors, costs, densities = ([[] for _ in range(count)] for _ in range(3))
    for heads, group in head_groups(call):
        for c in range(count):
            grown = [_pattern(plan, record, c, head) for head in heads]
            there = [_pattern(plan, record, c, head, carried=True) for head in heads]
            found = _try(group, grown, there, size, shape.num_k, with_error=not plan.by_logits)
            errors[c] += found[0]
            densities[c] += found[1]
            costs[c] += [
                math.inf if p is None or plan.clock else plan.cost.share(shape, p, d, size)
                for p, d in zip(there, found[1], strict=True)
            ]
    if plan.clock:
        costs = [_measured(call, record, plan, c, size) for c in range(count)]
    if not plan.by_logits:
        record.errors.append(errors)
    record.costs.append(costs)
    record.densities.append(densities)
    if plan.maps and not plan.by_logits and sample == plan.samples - 1:
        add_maps(call, record, plan)


def _measured(
    call: AttentionCall, record: LayerRecord, plan: Plan, candidate: int, size: tuple[int, int]
) -> list[float]:
    patterns = [_pattern(plan, record, candidate, head) for head in range(record.heads)]
    usable = [p for p in patterns if p is not None]
    # By the clock a candidate is grown for all heads alike: it is usable for all of them or none.
    share = clock_share(Trial(call, usable, size)) if usable else math.inf
    return [share] * record.heads


def _pattern(
    plan: Plan, record: LayerRecord, candidate: int, head: int, *, carried: bool = False
) -> HeadPattern | None:
    """``carried``: with the numbers for the length that was asked for, not for the sample's."""
    table = record.carried if carried and record.carried else record.grown
    numbers = table[candidate][head]
    return None if numbers is None else HeadPattern(plan.candidates[candidate].pattern, *numbers)


def _grow(call: AttentionCall, record: LayerRecord, plan: Plan, where: str) -> None:
    shape, size = plan.shape(call), plan.cost.blocking(call)
    found = []
    for candidate in plan.candidates:
        reason = obstacle(call, candidate)
        if reason:
            found.append(Grown((None,) * call.q.shape[1], reason=reason))
        elif plan.clock:
            found.append(grow_by_clock(call, candidate, plan.budget, size))
        else:
            parts = [
                grow_by_model(group, shape, candidate, plan.budget, plan.cost)
                for _, group in head_groups(call)
            ]
            heads = tuple(head for part in parts for head in part.heads)
            unknown = (math.inf,) * len(parts[0].heads)
            smallest = tuple(share for part in parts for share in part.smallest or unknown)
            found.append(Grown(heads, smallest, parts[0].reason))
    _check_served(found, plan, where, shape.num_k)
    record.grown = [
        [None if head is None else (head.first, head.second) for head in grown.heads]
        for grown in found
    ]
    if plan.for_tokens:
        place = (call.k.shape[2], plan.for_tokens, size[0], call.banded)
        record.carried = [
            [h and (h.first, h.second) for h in candidate.carried(grown.heads, *place)]
            for candidate, grown in zip(plan.candidates, found, strict=True)
        ]
    record.least = [grown.least for grown in found]
    record.reasons = [grown.reason for grown in found]


def _check_served(found: Sequence[Grown], plan: Plan, where: str, tokens: int) -> None:
    """Refuse a budget that leaves a head without a candidate; says what the whole layer takes."""
    heads = range(len(found[0].heads))
    missing = [head for head in heads if all(grown.heads[head] is None for grown in found)]
    if not missing:
        return
    known = [grown.smallest for grown in found if grown.smallest]
    needed = max(min((costs[head] for costs in known), default=math.inf) for head in missing)
    reasons = "; ".join(dict.fromkeys(grown.reason for grown in found if grown.reason))
    cheapest = f"at least {math.ceil(needed * 1000) / 1000:.3f}" if needed < math.inf else ""
    raise OptionInvalid(
        "option 'budget'",
        f"{cheapest}, what the smallest patterns cost at {tokens} tokens"
        if cheapest
        else "for usable ones",
        plan.budget,
        where=f"{where}, head {missing[0]}",
        fix=reasons or "Longer prompts cost less against dense attention.",
    )


def _try(
    group: AttentionCall,
    patterns: Sequence[HeadPattern | None],
    there: Sequence[HeadPattern | None],
    size: tuple[int, int],
    tokens: int,
    *,
    with_error: bool,
) -> tuple[list[float], list[float]]:
    """Errors of some heads, and densities at ``tokens`` tokens; infinite for those without a pattern.

    ``there``: the patterns with numbers for that length.
    """
    stand_in = next((p for p in patterns if p is not None), None)
    missing = [math.inf] * len(patterns)
    if stand_in is None:
        return missing, missing
    trial = Trial(group, [p or stand_in for p in patterns], size)
    index = trial.select()
    errors = trial.errors(trial.attend(index)) if with_error else missing
    instead = next(p for p in there if p is not None)
    densities = densities_at(group, [p or instead for p in there], size, tokens)
    if densities is None:
        densities = trial.densities(index)
    return (
        [e if p is not None else math.inf for e, p in zip(errors, patterns, strict=True)],
        [d if p is not None else math.inf for d, p in zip(densities, patterns, strict=True)],
    )


def best_candidate(record: LayerRecord, head: int) -> int:
    """The candidate with the least mean error for a head.

    The first wins where errors agree to six digits: what is below that is rounding.
    """
    usable = [c for c in range(len(record.grown)) if record.grown[c][head] is not None]
    count = max(1, len(record.errors))

    def error(c: int) -> float:
        return round(sum(sample[c][head] for sample in record.errors) / count, _DIGITS)

    return min(usable, key=lambda c: (error(c), c))


def _one_head(call: AttentionCall, head: int) -> AttentionCall:
    """A call of one query head."""
    heads, group = next(part for part in head_groups(call) if head in part[0])
    place = slice(head - heads.start, head - heads.start + 1)
    bias = group.bias
    if bias is not None:
        dim = 1 if bias.dim() == 4 else 0
        bias = bias if bias.shape[dim] == 1 else bias.narrow(dim, place.start, 1)
    return replace(
        group,
        q=group.q[:, place],
        bias=bias,
        sinks=None if group.sinks is None else group.sinks[place],
        out=group.out[:, place],
        lse=group.lse[:, place],
    )


def swap(call: AttentionCall, record: LayerRecord, plan: Plan, candidate: int, head: int) -> Tensor:
    """The output of a call with one head by a candidate."""
    pattern = _pattern(plan, record, candidate, head)
    assert pattern is not None
    trial = Trial(_one_head(call, head), [pattern], plan.cost.blocking(call))
    out = call.out.clone()
    out[:, head] = trial.attend(trial.select())[:, 0]
    return out


def add_maps(call: AttentionCall, record: LayerRecord, plan: Plan) -> None:
    """Keep pictures of each head's attention and of what its best candidate lists."""
    size = plan.cost.blocking(call)
    for head in range(record.heads):
        pattern = _pattern(plan, record, best_candidate(record, head), head)
        assert pattern is not None
        one = _one_head(call, head)
        trial = Trial(one, [pattern], size)
        kept = kept_map(trial.select(), trial.geometry, one, 0)
        record.maps.append((attention_map(one, 0), kept))
