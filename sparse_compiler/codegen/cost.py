"""The cost model: amounts of work times constants of a device, term by term, in sympy.

The formulas stand in ``TERMS`` as text-book expressions; they are lambdified once. Nothing here
knows what is computed: a caller counts tiles, entries and bytes (``Amounts``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, fields
from functools import cache

import sympy

from sparse_compiler.codegen.constants import Constants, TileConstants

__all__ = ["TERMS", "Amounts", "formulas", "linear_parts", "predict"]


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """Work of one candidate.

    Args:
        tiles: dense tiles computed.
        asked: of those, how many there would be without quantisation: wanted pairs over the tile's.
        flops, exponents: of one dense tile.
        streamed: bytes that one dense tile loads.
        gathered: entries loaded through a list of single places, tests or not.
        tested: entries that are tested as well.
        programs: programs of the launch.
        launches: kernels launched.
        distinct: bytes that must come from or go to memory once.
        working_set: bytes that concurrent programs read again and again.
        parts: bytes of partial results that a second kernel combines.
        index_keys: (key, head) pairs scanned to build the index.
        index_pairs: (row block, key block, head) triples ranked.
        has_index: 1 if there is an index to build, else 0.
        scored: operations of scoring rows one by one, in those of 16-bit products.
        scored_rows: (row, head) pairs so scored.
        has_scores: 1 if there are any, else 0.
    """

    tiles: float
    asked: float
    flops: float
    exponents: float
    streamed: float
    gathered: float = 0.0
    tested: float = 0.0
    programs: float = 0.0
    launches: float = 1.0
    distinct: float = 0.0
    working_set: float = 0.0
    parts: float = 0.0
    index_keys: float = 0.0
    index_pairs: float = 0.0
    has_index: float = 0.0
    scored: float = 0.0
    scored_rows: float = 0.0
    has_scores: float = 0.0


def _symbols(names: list[str], prefix: str) -> dict[str, sympy.Symbol]:
    return {name: sympy.Symbol(f"{prefix}_{name}", nonnegative=True) for name in names}


_TILE = _symbols([f.name for f in fields(TileConstants)], "c")
_DEVICE = _symbols(
    [f.name for f in fields(Constants) if f.name not in ("device", "origin", "tiles")], "c"
)
_AMOUNT = _symbols([f.name for f in fields(Amounts)], "n")


def _terms() -> dict[str, sympy.Expr]:
    tera, giga, mega, kilo = (sympy.Float(10) ** -power for power in (12, 9, 6, 3))
    c, k, n = _TILE, _DEVICE, _AMOUNT
    tile_ms = c["matrix"] * n["flops"] * tera, c["exponent"] * n["exponents"] * giga
    wasted = n["tiles"] - n["asked"]
    lanes = c["gather"] * n["gathered"] * mega + c["test"] * n["tested"] * mega
    traffic = n["tiles"] * n["streamed"] * giga
    compute = n["tiles"] * sum(tile_ms) + lanes
    cache_floor = sympy.Max(0, k["l2"] * traffic - compute)
    memory_floor = sympy.Max(0, k["hbm"] * n["distinct"] * giga - compute - cache_floor)
    lost = sympy.Max(0, 1 - k["l2_size"] / sympy.Max(n["working_set"], 1))
    return {
        "matrix": n["asked"] * tile_ms[0],
        "exponent": n["asked"] * tile_ms[1],
        "quantisation": wasted * sum(tile_ms),
        "gather": lanes,
        "l2": cache_floor,
        "hbm": memory_floor + k["miss"] * traffic * lost,
        "programs": c["program"] * n["programs"] * kilo,
        "index": n["has_index"] * k["select"]
        + k["select_key"] * n["index_keys"] * mega
        + k["select_pair"] * n["index_pairs"] * giga,
        "score": n["has_scores"] * k["score_start"]
        + k["score_row"] * n["scored_rows"] * mega
        + k["score"] * n["scored"] * tera,
        "combine": 2 * k["hbm"] * n["parts"] * giga,
        "launch": k["launch"] * n["launches"],
    }


TERMS: Mapping[str, sympy.Expr] = _terms()
"""Term -> milliseconds. ``l2`` and ``hbm`` add what bandwidth costs beyond the computation that
hides it; ``hbm`` also charges for bytes that the L2 cache has lost."""


@cache
def formulas() -> dict[str, Callable[..., float]]:
    """``TERMS`` as functions of the tile's constants, the device's and the amounts, in that order."""
    order = [*_TILE.values(), *_DEVICE.values(), *_AMOUNT.values()]
    return {name: sympy.lambdify(order, term, modules="math") for name, term in TERMS.items()}


def predict(constants: Constants, tile: TileConstants, amounts: Amounts) -> dict[str, float]:
    """Milliseconds by term; their sum is the predicted time."""
    device = [float(getattr(constants, name)) for name in _DEVICE]
    values = [*astuple(tile), *device, *astuple(amounts)]
    return {name: float(function(*values)) for name, function in formulas().items()}


@cache
def _linear() -> tuple[tuple[str, Callable[..., float]], ...]:
    # Without the bandwidth floors the total is linear in the constants of the tile and in `miss`.
    total = sympy.Add(*TERMS.values()).replace(sympy.Max, _without_floor)
    parts = {name: sympy.diff(total, s) for name, s in (_TILE | {"miss": _DEVICE["miss"]}).items()}
    order = [_DEVICE["l2_size"], *_AMOUNT.values()]
    return tuple((name, sympy.lambdify(order, p, modules="math")) for name, p in parts.items())


def _without_floor(*arguments: sympy.Expr) -> sympy.Expr:
    floors = {_DEVICE["l2"], _DEVICE["hbm"]}
    if any(argument.free_symbols & floors for argument in arguments):
        return sympy.Integer(0)
    return sympy.Max(*arguments)


def linear_parts(amounts: Amounts, l2_size: float) -> dict[str, float]:
    """How much each constant that is fitted to kernels counts: d total / d constant.

    Args:
        l2_size: bytes of the L2 cache, which decides what is lost.
    """
    return {name: float(f(l2_size, *astuple(amounts))) for name, f in _linear()}
