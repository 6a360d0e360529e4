"""What a search found, as values and as a file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import BlockRule
from sparse_compiler.search.layer_search import Plan, best_candidate
from sparse_compiler.search.published_config import embed_config, save_config
from sparse_compiler.search.state import LayerRecord, SearchState

__all__ = ["HeadChoice", "SearchResult", "result_of"]

#: Digits of a score: more of them differ from machine to machine.
_DIGITS = 6


@dataclass(frozen=True)
class HeadChoice:
    """What one head got; errors are means over the samples.

    Args:
        pattern: with the numbers that reach the budget.
        candidate: the text of the candidate that it grew from.
        error: relative L2 error against dense, of the attention output or of the logits.
        cost: share of dense attention's time at the length of the longest sample, or at the one asked
            for, for a layer whose heads all are like this one.
        density: computed over allowed pairs, on the longest sample; where another length is asked
            for, what is predicted there.
        errors: of every candidate that could be used, by its text.
        maps: (attention, kept) where they were asked for; see ``maps``.
    """

    pattern: HeadPattern
    candidate: str
    error: float
    cost: float
    density: float
    errors: Mapping[str, float]
    maps: tuple[bytes, bytes] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class SearchResult:
    """One object per layer; empty for layers that were not searched, and so for dense ones.

    Args:
        layers: head -> choice.
        budget: as asked.
        tokens: of the samples, the longest first.
        kind: what errors are of, ``output`` or ``logits``.
        notes: what a reader should know.
    """

    layers: tuple[Mapping[int, HeadChoice], ...]
    budget: float
    tokens: tuple[int, ...]
    kind: str
    notes: tuple[str, ...]

    @property
    def patterns(self) -> list[dict[int, HeadPattern]]:
        """As ``load_config`` gives them."""
        return [{head: c.pattern for head, c in layer.items()} for layer in self.layers]

    @property
    def scores(self) -> list[dict[int, float]]:
        """1 - error, not below 0: the share of the output that stays."""
        return [
            {head: round(max(0.0, 1.0 - c.error), _DIGITS) for head, c in layer.items()}
            for layer in self.layers
        ]

    @property
    def mean_error(self) -> float:
        return _mean([c.error for layer in self.layers for c in layer.values()])

    @property
    def mean_cost(self) -> float:
        return _mean([c.cost for layer in self.layers for c in layer.values()])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the published format, for the backend's option ``config``."""
        save_config(path, self.patterns, self.scores)

    def embed(self, path: str | os.PathLike[str]) -> None:
        """Put it into a serving engine's ``config.json``."""
        embed_config(path, self.patterns, self.scores)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / max(1, len(values))


def result_of(state: SearchState, plan: Plan, tokens: Sequence[int], executor: str) -> SearchResult:
    """The best of what a finished state holds."""
    count = max(state.layers, default=-1) + 1
    layers = []
    empty = []
    for number in range(count):
        record = state.layers.get(number)
        if record is None or not record.errors:
            layers.append({})
            empty.append(number)
            continue
        layers.append({head: _choice(record, plan, head) for head in range(record.heads)})
    notes = [plan.cost.note if not plan.clock else f"cost measured with executor {executor}"]
    if plan.for_tokens:
        notes.append(
            f"numbers, densities and costs are for {plan.for_tokens} tokens, predicted from the "
            "samples; errors are of the samples"
        )
    notes += _uncharged(plan)
    if empty:
        notes.append(
            f"layers {', '.join(map(str, empty))} were not searched: where they are sparse, their "
            "heads get the format's default, vertical_and_slash (1000, 6096)"
        )
    if state.unknown:
        notes.append(f"{state.unknown} attentions belong to no layer that the compiler can number")
    for c, candidate in enumerate(plan.candidates):
        reasons = {r.reasons[c] for r in state.layers.values() if r.reasons and r.reasons[c]}
        notes += [f"{candidate} was left out: {reason}" for reason in sorted(reasons)]
    kind = "logits" if plan.by_logits else "output"
    return SearchResult(tuple(layers), plan.budget, tuple(tokens), kind, tuple(notes))


def _uncharged(plan: Plan) -> list[str]:
    """A note on estimators whose own work the cost model does not know."""
    names = dict.fromkeys(candidate.pattern for candidate in plan.candidates)
    known = {"a_shape", "vertical_slash", "block_sparse", "tri_shape"}
    others = [
        name
        for name in names
        if name not in known and not isinstance(registry.get(name).rule, BlockRule)
    ]
    if plan.clock or not others:
        return []
    return [
        f"predicted costs leave out what {', '.join(others)} spend on choosing keys beyond ranking "
        "blocks; cost='measured' counts it"
    ]


def _choice(record: LayerRecord, plan: Plan, head: int) -> HeadChoice:
    best = best_candidate(record, head)
    numbers = (record.carried or record.grown)[best][head]
    assert numbers is not None

    def mean(samples: list[list[list[float]]], candidate: int) -> float:
        return _mean([sample[candidate][head] for sample in samples])

    return HeadChoice(
        pattern=HeadPattern(plan.candidates[best].pattern, *numbers),
        candidate=str(plan.candidates[best]),
        error=mean(record.errors, best),
        cost=record.costs[0][best][head],
        density=record.densities[0][best][head],
        errors={
            str(candidate): mean(record.errors, c)
            for c, candidate in enumerate(plan.candidates)
            if record.grown[c][head] is not None
        },
        maps=record.maps[head] if record.maps else None,
    )
