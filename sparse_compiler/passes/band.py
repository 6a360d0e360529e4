"""Which band, if any, a set of (query, key) pairs is; decided by isl for all sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import islpy as isl
import sympy

from sparse_compiler.ir.mask import Band
from sparse_compiler.passes.presburger import Decider

__all__ = ["NotABand", "find_band"]

Bound = sympy.Expr | None


@dataclass(frozen=True)
class NotABand:
    """The set is no band; `certain` says whether that is shown, `witness` where."""

    EMPTY: ClassVar[str] = "it hides every key"

    reason: str
    certain: bool
    witness: str = ""


def find_band(
    decider: Decider, pred: Any, query: tuple[sympy.Symbol, Any], key: tuple[sympy.Symbol, Any]
) -> Band | NotABand:
    """The band that equals `pred` over 0 <= query < Lq, 0 <= key < Lk for all sizes.

    Bounds that never bind become None. The bounds are read off the set itself (the extremes of
    key - query), so no spelling is privileged, and each candidate is proved before it is returned.

    Args:
        decider: its domain names exactly `query` and `key`.
        pred: affine predicate over them.
        query, key: (index symbol, size).
    Raises:
        Undecidable: `pred` is not Presburger or too much work.
    """
    visible = decider.set_of(pred)
    if decider.run(visible.is_empty):
        return NotABand(NotABand.EMPTY, certain=not decider.opaque)
    distance = key[0] - query[0]
    shifts = decider.run(
        lambda: visible.apply(isl.Map.from_pw_aff(decider.affine(distance))).coalesce()
    )
    lows, highs = (_extremes(decider, shifts, low) for low in (True, False))
    for right in highs.candidates:
        for left in lows.candidates:
            claim = _band_set(decider, distance, left, right)
            if decider.run(partial(claim.is_equal, visible)):
                return _canonical(left, right, key[1] - query[1])
    certain = highs.complete and lows.complete and not decider.opaque
    tightest = _band_set(decider, distance, lows.candidates[-1], highs.candidates[-1])
    apart = decider.run(lambda: tightest.subtract(visible).union(visible.subtract(tightest)))
    return NotABand("it is no band around a diagonal", certain, decider.witness(apart))


def _band_set(decider: Decider, distance: sympy.Expr, left: Bound, right: Bound) -> Any:
    claims = [sympy.Ge(distance, left, evaluate=False)] if left is not None else []
    if right is not None:
        claims.append(sympy.Le(distance, right, evaluate=False))
    return decider.set_of(sympy.And(*claims) if claims else sympy.true)


@dataclass(frozen=True)
class _Extremes:
    candidates: list[Bound]
    complete: bool


def _extremes(decider: Decider, shifts: Any, low: bool) -> _Extremes:
    """Affine expressions that the least or greatest shift takes, unbounded first."""
    extreme = decider.run(lambda: shifts.dim_min(0) if low else shifts.dim_max(0))
    candidates: list[Bound] = [None]
    complete = True
    for _, aff in decider.run(extreme.get_pieces):
        expr = _expression(decider, aff)
        if expr is None:
            complete = False
        elif expr not in candidates:
            candidates.append(expr)
    return _Extremes(candidates, complete)


def _expression(decider: Decider, aff: Any) -> sympy.Expr | None:
    """An isl affine function of the parameters in sympy; None with divisions."""
    if aff.dim(isl.dim_type.div) or aff.get_denominator_val().to_python() != 1:
        return None
    names = {name: expr for expr, name in decider.param_names.items()}
    total: sympy.Expr = sympy.Integer(aff.get_constant_val().to_python())
    for position in range(aff.dim(isl.dim_type.param)):
        factor = aff.get_coefficient_val(isl.dim_type.param, position).to_python()
        if factor:
            total += factor * names[aff.get_dim_name(isl.dim_type.param, position)]
    return total


def _canonical(left: Bound, right: Bound, diagonal: sympy.Expr) -> Band:
    """One spelling for each band: causal if it ends at a diagonal, else centred if it may."""
    if right is None:
        if left is None:
            return Band(0, None, None)
        # Nothing is hidden to the right: keys from a distance on.
        if left.is_positive:
            return Band(_plain(left), 0, None)
        return Band(0, _plain(-left), None)
    if left is None:
        return Band(_plain(right), None, 0)
    width = _plain(right - left)
    if right != 0 and right != diagonal and left.is_nonpositive and right.is_nonnegative:
        return Band(0, _plain(-left), _plain(right))
    return Band(_plain(right), width, 0)


def _plain(expr: sympy.Expr) -> int | sympy.Expr:
    expr = sympy.expand(expr)
    return int(expr) if isinstance(expr, sympy.Integer) else expr
