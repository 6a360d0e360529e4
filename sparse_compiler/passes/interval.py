"""Which interval of keys each row sees, if every row sees one; decided by isl for all sizes.

The set of visible pairs is cut row by row: the least and the greatest visible key of row ``q`` are
read off the set as piecewise affine functions, turned into sympy, and the claim that a row sees
exactly the keys between them is proved before it is returned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import islpy as isl
import sympy

from sparse_compiler.ir.mask import Band
from sparse_compiler.passes.presburger import Decider, Undecidable
from sparse_compiler.passes.symbolic_values import conj, disj, floor_divide

__all__ = ["Interval", "NoInterval", "band_claim", "find_interval", "interval_claim", "tightest"]

# More pieces than this cost more to compute than they save, and no known mask needs them.
_MOST_PIECES = 16
_PARAM, _SET, _DIV = isl.dim_type.param, isl.dim_type.set, isl.dim_type.div
Pair = tuple[sympy.Symbol, Any]


@dataclass(frozen=True)
class Interval:
    """Row q sees the keys of ``band`` with ``low <= k <= high``; None where the band says it."""

    band: Band
    low: sympy.Expr | None
    high: sympy.Expr | None


@dataclass(frozen=True)
class NoInterval:
    """Some row sees keys with a gap; `certain` says whether that is shown, `witness` where."""

    reason: str
    certain: bool
    witness: str = ""


def find_interval(
    decider: Decider, visible: Any, query: Pair, key: Pair, private: frozenset[sympy.Expr]
) -> Interval | NoInterval:
    """The interval of keys that each row of `visible` sees.

    Args:
        decider: its domain names exactly `query` and `key`.
        visible: an isl set over them.
        query, key: (index symbol, size).
        private: parameters that differ from row to row; the band cannot name them.
    Raises:
        Undecidable: too much work, or bounds that have no closed form here.
    """
    band = tightest(decider, visible, query, key, private)
    around = band_claim(band, query[0], key[0])
    rows, box = (_by_row(decider, s) for s in (visible, decider.everywhere()))
    context = decider.run(box.params)
    lows = _spellings(decider, rows, context, query[0], low=True, otherwise=key[1])
    highs = _spellings(decider, rows, context, query[0], low=False, otherwise=sympy.Integer(-1))
    claims = [(None, h) for h in highs] + [(low, None) for low in lows]
    claims += [(low, h) for low in lows for h in highs]
    for low, high in claims:
        claim = decider.set_of(conj(around, interval_claim(low, high, key[0])))
        if decider.run(partial(claim.is_equal, visible)):
            return Interval(band, low, high)
    hull = decider.set_of(interval_claim(lows[-1], highs[-1], key[0]))
    gaps = decider.run(lambda: hull.subtract(visible))
    if decider.run(gaps.is_empty) or not decider.run(lambda: visible.is_subset(hull)):
        raise Undecidable("the bounds of the rows have no closed form here")
    certain = not decider.opaque and not private
    return NoInterval("a row sees keys with gaps between them", certain, decider.witness(gaps))


def interval_claim(low: Any, high: Any, key: sympy.Symbol) -> Any:
    """``low <= key <= high`` as a predicate; None is no bound."""
    claims = [sympy.Ge(key, low, evaluate=False)] if low is not None else []
    if high is not None:
        claims.append(sympy.Le(key, high, evaluate=False))
    return conj(*claims)


def band_claim(band: Band, query: sympy.Symbol, key: sympy.Symbol) -> Any:
    """The band as a predicate over (query, key)."""
    position = query + band.q_offset
    low = None if band.left is None else position - band.left
    high = None if band.right is None else position + band.right
    return interval_claim(low, high, key)


# -- the band around a set -----------------------------------------------------------------------


def tightest(
    decider: Decider, visible: Any, query: Pair, key: Pair, private: frozenset[sympy.Expr]
) -> Band:
    """A band that holds `visible`, with the tightest bounds that have a closed form.

    A band that ends at the row's own key, or before it, ends at a diagonal: it is causal.
    """
    distance = key[0] - query[0]
    spread = decider.run(
        lambda: visible.apply(isl.Map.from_pw_aff(decider.affine(distance))).coalesce()
    )
    for expr in private:
        spread = _without(decider, spread, decider.param_names.get(expr, ""))
    right = _first_bound(decider, visible, spread, distance, low=False)
    left = _first_bound(decider, visible, spread, distance, low=True)
    if right is None:
        if left is None:
            return Band(0, None, None)
        return Band(_plain(left), 0, None) if left.is_positive else Band(0, _plain(-left), None)
    if right != 0 and left is not None and left.is_nonpositive and right.is_nonnegative:
        return Band(0, _plain(-left), _plain(right))
    return Band(_plain(right), None if left is None else _plain(right - left), 0)


def _without(decider: Decider, points: Any, name: str) -> Any:
    """The points for any value of a parameter."""
    at = decider.run(lambda: points.find_dim_by_name(_PARAM, name))
    return decider.run(lambda: points.project_out(_PARAM, at, 1)) if at >= 0 else points


def _first_bound(
    decider: Decider, visible: Any, spread: Any, distance: sympy.Expr, low: bool
) -> sympy.Expr | None:
    """The first of the extremes of `distance` that bounds it everywhere, numbers before sizes."""
    extreme = decider.run(lambda: spread.dim_min(0) if low else spread.dim_max(0))
    found = []
    for _, aff in decider.run(extreme.get_pieces):
        expr = _sympy(decider, aff, {})
        if not expr.has(sympy.Function) and expr not in found:
            found.append(expr)
    relation = sympy.Ge if low else sympy.Le
    for expr in sorted(found, key=lambda e: not e.is_Integer):
        claim = decider.set_of(relation(distance, expr, evaluate=False))
        if not decider.run(partial(visible.is_subset, claim)):
            continue
        full = decider.run(partial(claim.is_equal, decider.everywhere()))
        return None if full else expr
    return None


def _plain(expr: sympy.Expr) -> int | sympy.Expr:
    expr = sympy.expand(expr)
    return int(expr) if isinstance(expr, sympy.Integer) else expr


# -- isl in sympy --------------------------------------------------------------------------------


def _by_row(decider: Decider, points: Any) -> Any:
    """A set over (query, key) as a set over key, the query a parameter."""
    return decider.run(lambda: points.move_dims(_PARAM, points.dim(_PARAM), _SET, 0, 1))


def _spellings(
    decider: Decider, rows: Any, context: Any, query: sympy.Symbol, low: bool, otherwise: Any
) -> list[sympy.Expr]:
    """Expressions that may be the least or greatest key of each row, the exact one last.

    Args:
        otherwise: the value for rows that see nothing.
    """
    bound = decider.run(
        lambda: (rows.dim_min(0) if low else rows.dim_max(0)).gist_params(context).coalesce()
    )
    names = {f"i{list(decider.index_names).index(query)}": query}
    pieces = decider.run(bound.get_pieces)
    if not pieces or len(pieces) > _MOST_PIECES:
        raise Undecidable(f"the rows' bounds have {len(pieces)} pieces")
    values = [_sympy(decider, aff, names) for _, aff in pieces]
    distinct = list(dict.fromkeys(values))
    found = list(distinct)
    if len(distinct) > 1:
        found += [kind(*distinct, evaluate=False) for kind in (sympy.Max, sympy.Min)]
    conditions = [_condition(decider, points, names) for points, _ in pieces]
    covered = decider.run(lambda: context.is_subset(bound.domain()))
    if covered:
        conditions[-1] = sympy.true
    exact = list(zip(values, conditions, strict=True))
    if not covered and conditions[-1] is not sympy.true:
        exact.append((otherwise, sympy.true))
    spelled = exact[0][0]
    if exact[0][1] is not sympy.true:
        spelled = sympy.Piecewise(*exact, evaluate=False)
    return [*dict.fromkeys([*found, spelled])]


def _condition(decider: Decider, points: Any, names: dict[str, Any]) -> Any:
    cases = []
    for basic in decider.run(lambda: points.compute_divs().get_basic_sets()):
        parts = []
        for constraint in decider.run(basic.get_constraints):
            value = _sympy(decider, decider.run(constraint.get_aff), names)
            relation = sympy.Eq if constraint.is_equality() else sympy.Ge
            parts.append(relation(value, 0, evaluate=False))
        cases.append(conj(*parts))
    return disj(*cases)


def _sympy(decider: Decider, aff: Any, names: dict[str, Any]) -> sympy.Expr:
    """An isl affine function of parameters, with its integer divisions, in sympy.

    Args:
        names: symbols of parameters that the decider knows as indices.
    """
    known = {name: expr for expr, name in decider.param_names.items()} | names
    terms: list[tuple[Any, sympy.Expr]] = [(aff.get_constant_val(), sympy.Integer(1))]
    for position in range(aff.dim(_PARAM)):
        value = aff.get_coefficient_val(_PARAM, position)
        terms.append((value, known[aff.get_dim_name(_PARAM, position)]))
    for position in range(aff.dim(_DIV)):
        value = aff.get_coefficient_val(_DIV, position)
        if not value.is_zero():
            terms.append((value, _sympy(decider, aff.get_div(position), names)))
    fractions = [(int(v.get_num_si()), int(v.get_den_val().to_python()), e) for v, e in terms]
    below = math.lcm(*(den for _, den, _ in fractions))
    total = sum(
        (num * (below // den) * expr for num, den, expr in fractions if num), sympy.Integer(0)
    )
    # isl's divisions are rounded down; a whole function is an integer, so rounding changes nothing.
    return total if below == 1 else floor_divide(total, sympy.Integer(below))
