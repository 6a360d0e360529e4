"""Candidates for a site, those that cannot run pruned, the others ranked by predicted time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from sparse_compiler.codegen.attention_work import (
    Clustering,
    Covered,
    amounts_dense,
    amounts_sparse,
    cover,
    heads_of,
    scoring,
)
from sparse_compiler.codegen.constants import DENSE, Constants, tile_key
from sparse_compiler.codegen.cost import Amounts, predict
from sparse_compiler.codegen.resources import DEVICE_LIMITS, Resources, obstacles
from sparse_compiler.codegen.spec import power_of_two
from sparse_compiler.ir.pattern import HeadPattern, LayerPatterns
from sparse_compiler.ir.shape import SiteShape
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import BlockRule

__all__ = [
    "SCHEDULES",
    "TILES",
    "Candidate",
    "Ranked",
    "Ranking",
    "break_even_tokens",
    "candidates",
    "choose_tile",
]

TILES = ((64, 64), (128, 64), (128, 128))
SCHEDULES: Mapping[str, Mapping[str, tuple[tuple[int, int], ...]]] = {
    "plain": {"band": TILES, "blocks": TILES},
    "hopper": {"band": (), "blocks": TILES[1:]},
}
"""Schedule -> component of the index -> the tiles that its kernels are written for: two warp groups
of 64 rows share what a hopper program loads, and distances would scatter twice as wide."""
_LONGEST = 2**20


@dataclass(frozen=True)
class Candidate:
    """One way to answer a site: a schedule with a dense tile, or ``dense``."""

    schedule: str
    block_q: int = 0
    block_k: int = 0

    @property
    def key(self) -> str:
        """Under which a device's constants and reports are kept."""
        return tile_key(self.schedule, self.block_q, self.block_k)

    def __str__(self) -> str:
        return DENSE if self.schedule == DENSE else f"{self.schedule} {self.block_q}x{self.block_k}"


@dataclass(frozen=True)
class Ranked:
    """A candidate with its prediction.

    Args:
        ms: predicted; infinite for one that cannot run.
        terms: ms by term of the cost model.
        density: pairs computed over pairs allowed.
        amounts: what the prediction was made from.
        obstacles: why it cannot run; empty if it can.
    """

    candidate: Candidate
    ms: float
    terms: Mapping[str, float]
    density: float
    amounts: Amounts | None = None
    obstacles: tuple[str, ...] = ()

    @property
    def feasible(self) -> bool:
        return not self.obstacles


@dataclass(frozen=True)
class Ranking:
    """Candidates, fastest first, those that cannot run last.

    Args:
        shape, pattern, constants: what was asked.
        note: what a reader must know about the constants.
    """

    shape: SiteShape
    pattern: HeadPattern | LayerPatterns
    constants: Constants
    ranked: tuple[Ranked, ...]
    note: str = ""

    @property
    def best(self) -> Ranked:
        """The fastest; dense runs everywhere, so there is one."""
        return self.ranked[0]

    @property
    def tile(self) -> Candidate | None:
        """The fastest sparse candidate, whether or not dense is faster; None if none can run."""
        found = self.sparse()
        return None if found is None else found.candidate

    def sparse(self, block_k: int | None = None) -> Ranked | None:
        """The fastest sparse candidate that can run, of those with key blocks of that size."""
        for ranked in self.ranked:
            tile = ranked.candidate
            if ranked.feasible and tile.schedule != DENSE and block_k in (None, tile.block_k):
                return ranked
        return None

    def of(self, candidate: Candidate) -> Ranked:
        return next(r for r in self.ranked if r.candidate == candidate)


def candidates(
    pattern: HeadPattern | LayerPatterns, heads: int, schedules: Sequence[str] = tuple(SCHEDULES)
) -> tuple[Candidate, ...]:
    """Dense, and every schedule with every tile that it has for these patterns.

    Where rows are scored, the list of a row block is as long for more rows, and so worse for each.
    """
    found = [Candidate(DENSE)]
    names = {head.name for head, _ in heads_of(pattern, heads)} - {DENSE}
    components = {registry.get(name).component for name in names}
    scored = any(isinstance(registry.get(name).rule, BlockRule) for name in names)
    tiles = [tile for tile in TILES if tile[0] == 64 or not scored]
    for schedule in schedules if names else ():
        # One launch serves all heads, so a tile must suit every component.
        common = [t for t in tiles if all(t in SCHEDULES[schedule][c] for c in components)]
        found += [Candidate(schedule, *tile) for tile in common]
    return tuple(found)


def _estimate(shape: SiteShape, candidate: Candidate) -> Resources:
    """Shared memory of the operands alone, for a kernel that nobody compiled yet."""
    widths = power_of_two(shape.head_dim) + power_of_two(shape.value_dim)
    queries = candidate.block_q * power_of_two(shape.head_dim)
    # The emitters fall back to short steps of a tile for wide or 4-byte heads.
    keys = min(candidate.block_k, 64 * 128 * 2 // max(128, widths // 2) // shape.element_size)
    stages = 1 if shape.element_size > 2 else 2
    elements = queries + stages * keys * widths
    return Resources(
        elements * shape.element_size,
        threads=256 if candidate.block_q > 64 else 128,
        measured=False,
    )


def _obstacles(
    shape: SiteShape,
    candidate: Candidate,
    constants: Constants,
    target: str,
    reports: Mapping[str, Resources],
) -> tuple[str, ...]:
    if candidate.schedule == DENSE:
        return ()
    found = []
    if candidate.key not in constants.tiles:
        found.append(f"no constants of {candidate.key} for {constants.device}: not measured there")
    if candidate.schedule == "hopper":
        if shape.element_size != 2:
            found.append(f"the hopper schedule takes 16-bit inputs, not {shape.dtype}")
        if max(shape.head_dim, shape.value_dim) > 128:
            found.append("the hopper schedule takes head sizes up to 128")
        if shape.head_dim % 8 or shape.value_dim % 8:
            found.append("the hopper schedule takes head sizes that are multiples of 8")
    report = reports.get(f"{candidate.key}:{max(shape.head_dim, shape.value_dim)}:{shape.dtype}")
    limits = DEVICE_LIMITS[target]
    needed = report or _estimate(shape, candidate)
    return (*found, *obstacles(needed, limits, schedule=candidate.schedule))


def choose_tile(
    shape: SiteShape,
    pattern: HeadPattern | LayerPatterns,
    constants: Constants,
    *,
    clustering: Clustering | None = None,
    density: float | None = None,
    schedules: Sequence[str] = tuple(SCHEDULES),
    target: str = "sm_90",
    reports: Mapping[str, Resources] | None = None,
) -> Ranking:
    """Rank all candidates of a site.

    Args:
        pattern: of every head, or of each.
        density: measured share of the allowed pairs with row blocks of 64; scales the estimate of
            every row block size alike. None estimates it from the pattern and ``clustering``.
        target: compilation target whose limits hold; a key of ``DEVICE_LIMITS``.
        reports: compilers' reports by ``candidate.key:size:dtype``; operands are counted where
            there is none.
    """
    ranked = []
    factor = 1.0
    clustering = clustering or Clustering()
    if density is not None:
        factor = density / max(_covered(shape, pattern, 64, 64, clustering).counted, 1e-9)
        factor *= shape.allowed_pairs
    for candidate in candidates(pattern, shape.heads, schedules):
        stopped = _obstacles(shape, candidate, constants, target, reports or {})
        if stopped:
            ranked.append(Ranked(candidate, float("inf"), {}, 0.0, obstacles=stopped))
            continue
        amounts, share = _amounts(shape, pattern, candidate, clustering, factor)
        terms = predict(constants, constants.tiles[candidate.key], amounts)
        ranked.append(Ranked(candidate, sum(terms.values()), terms, share, amounts))
    ranked.sort(key=lambda r: (not r.feasible, r.ms))
    return Ranking(shape, pattern, constants, tuple(ranked))


def _covered(
    shape: SiteShape,
    pattern: HeadPattern | LayerPatterns,
    block_q: int,
    block_k: int,
    clustering: Clustering,
) -> Covered:
    """Pairs of all heads and batch entries."""
    total = Covered(0.0)
    for head, count in heads_of(pattern, shape.heads):
        one = cover(head, shape, block_q, block_k, clustering).scaled(count * shape.batch)
        total = Covered(
            *(a + b for a, b in zip(vars(total).values(), vars(one).values(), strict=True))
        )
    return total


def _amounts(
    shape: SiteShape,
    pattern: HeadPattern | LayerPatterns,
    candidate: Candidate,
    clustering: Clustering,
    factor: float,
) -> tuple[Amounts, float]:
    if candidate.schedule == DENSE:
        return amounts_dense(shape), 1.0
    size_q, size_k = candidate.block_q, candidate.block_k
    covered = _covered(shape, pattern, size_q, size_k, clustering).scaled(factor)
    listing = sum(count for head, count in heads_of(pattern, shape.heads) if _ranks_blocks(head))
    ranked = shape.batch * listing * (shape.num_q / size_q) * (shape.num_k / size_k)
    scored = scoring(pattern, shape, size_k)
    amounts = amounts_sparse(shape, covered, size_q, size_k, ranked=ranked, scored=scored)
    return amounts, covered.counted / shape.allowed_pairs


def _ranks_blocks(head: HeadPattern) -> bool:
    """Whether it ranks key blocks by their means; what scores rows is counted by ``scoring``."""
    found = registry.get(head.name)
    return bool(found.summary_keys) and not isinstance(found.rule, BlockRule)


@lru_cache(maxsize=256)
def _break_even(
    shape: SiteShape,
    pattern: HeadPattern | LayerPatterns,
    constants_of: _Frozen,
    target: str,
    schedules: tuple[str, ...],
    block_k: int | None,
) -> int | None:
    def pays(tokens: int) -> bool:
        ranking = choose_tile(
            shape.at_length(tokens), pattern, constants_of.value, target=target, schedules=schedules
        )
        sparse = ranking.sparse(block_k)
        if sparse is None:
            return False
        host = constants_of.value.score_host if sparse.terms["score"] > 0 else 0.0
        return max(sparse.ms, host) < ranking.of(Candidate(DENSE)).ms

    # Coarse to fine: the sign changes once, and a wrong side near it costs next to nothing.
    lengths = [2**power for power in range(9, 21)]
    found = next((n for n in lengths if pays(n)), None)
    if found is None or found == lengths[0]:
        return found
    low, high = found // 2, found
    while high - low > max(64, high // 64):
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return -(-high // 64) * 64


@dataclass(frozen=True, eq=False)
class _Frozen:
    """A hashable holder: constants are compared by identity, which is enough for a cache."""

    value: Constants

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and other.value is self.value


def break_even_tokens(
    shape: SiteShape,
    pattern: HeadPattern | LayerPatterns,
    constants: Constants,
    *,
    target: str = "sm_90",
    schedules: Sequence[str] = tuple(SCHEDULES),
    block_k: int | None = None,
) -> int | None:
    """The shortest prompt, in tokens, for which some sparse candidate beats dense.

    Args:
        shape: its lengths do not matter.
        block_k: only candidates with key blocks of this size; None is any.
    Returns:
        A multiple of 64 from 512, or None if dense is faster up to 2**20 tokens.
    """
    standard = replace(shape, num_q=1, num_k=1)
    return _break_even(standard, pattern, _Frozen(constants), target, tuple(schedules), block_k)
