"""Whether 32-bit offsets are enough: offsets as sympy expressions, their largest value proved.

An operand's offset is an expression in coordinates (batch entry, head, row, column ...), sizes and
strides. Coordinates range over boxes; sizes and strides are non-negative integers. If no derivative
of the expression by a coordinate can be negative, its largest value lies at the box's far corner,
and that corner is again an expression, in sizes and strides alone: it is derived once and evaluated
in Python integers at each launch. Where that proof fails, offsets are 64-bit.

There is one threshold, 2**31, and one bit for the whole kernel, so that a model needs at most two
texts of a kernel, however its lengths vary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy

__all__ = [
    "ATTEND_OPERANDS",
    "LIMIT",
    "SIZES",
    "Operand",
    "farthest",
    "largest_offsets",
    "needs_wide",
]

#: Offsets below it fit a signed 32-bit integer.
LIMIT = 2**31


@dataclass(frozen=True)
class Operand:
    """How a kernel addresses one operand.

    Args:
        offset: in elements from the operand's base.
        ends: (coordinate, one past its largest value), each an expression in sizes; a kernel also
            computes, and masks, offsets of padded rows and keys, so ends are padded.
    """

    offset: sympy.Expr
    ends: tuple[tuple[sympy.Symbol, sympy.Expr], ...]


def _symbols(names: str) -> tuple[sympy.Symbol, ...]:
    return sympy.symbols(names, integer=True, nonnegative=True)


_B, _H, _HKV, _LQ, _LK, _D, _DV = _symbols("batch heads kv_heads num_q num_k head_dim value_dim")
_b, _h, _row, _key, _c, _s, _m, _i, _p = _symbols("b h row key c s m i p")
_QB, _QH, _QL, _KB, _KH, _KL, _VB, _VH, _VL = _symbols(
    "q_stride_b q_stride_h q_stride_l k_stride_b k_stride_h k_stride_l"
    " v_stride_b v_stride_h v_stride_l"
)
_S, _T, _F, _E, _C, _P, _X, _K, _R = _symbols(
    "band_slots block_slots full_size lanes_size columns_size packed_size distances_size"
    " blocks_size row_blocks"
)
_UB, _AB, _AH, _AL, _AK = _symbols(
    "bounds_stride_b bias_stride_b bias_stride_h bias_stride_l bias_stride_k"
)
_M, _N, _SPLIT, _PARTS = _symbols("block_q block_k split_blocks parts")

_ROWS = _R * _M
_KEYS = _LK + _N
_BATCH, _BAND = (_b, _B), (_s, _S)
_SPLIT_ROWS = _SPLIT * _M

#: Every operand of ``attend`` that is addressed by its own offsets; descriptors are not.
ATTEND_OPERANDS: dict[str, Operand] = {
    "q": Operand(
        _b * _QB + _h * _QH + _row * _QL + _c, (_BATCH, (_h, _H), (_row, _ROWS), (_c, _D))
    ),
    "k": Operand(
        _b * _KB + _h * _KH + _key * _KL + _c, (_BATCH, (_h, _HKV), (_key, _KEYS), (_c, _D))
    ),
    "v": Operand(
        _b * _VB + _h * _VH + _key * _VL + _c, (_BATCH, (_h, _HKV), (_key, _KEYS), (_c, _DV))
    ),
    "out": Operand(
        ((_b * _H + _h) * _LQ + _row) * _DV + _c, (_BATCH, (_h, _H), (_row, _ROWS), (_c, _DV))
    ),
    # An item of the work list has at most 11 numbers.
    "work": Operand(
        ((_b * _H + _h) * _R + _m) * 11 + _i,
        (_BATCH, (_h, _H), (_m, _R), (_i, sympy.Integer(11))),
    ),
    "full": Operand((_b * _S + _s) * _F + _i, (_BATCH, _BAND, (_i, _F))),
    "lanes": Operand((_b * _S + _s) * _E + _i, (_BATCH, _BAND, (_i, _E))),
    "columns": Operand((_b * _S + _s) * _C + _i, (_BATCH, _BAND, (_i, _C))),
    "covered": Operand((_b * _S + _s) * _X + _i, (_BATCH, _BAND, (_i, _X))),
    "blocks": Operand(((_b * _T + _s) * _R + _m) * _K + _i, (_BATCH, (_s, _T), (_m, _R), (_i, _K))),
    "key_mask": Operand(_b * _LK + _key, (_BATCH, (_key, _KEYS))),
    "bounds": Operand(_b * _UB + _row * 2 + _i, (_BATCH, (_row, _ROWS), (_i, sympy.Integer(2)))),
    "bias": Operand(
        _b * _AB + _h * _AH + _row * _AL + _key * _AK,
        (_BATCH, (_h, _H), (_row, _ROWS), (_key, _KEYS)),
    ),
    # Places of a bias by distance: key - row + num_q - 1, and padded rows before the first.
    "bias_by_distance": Operand(_h * _AH + _i * _AK, ((_h, _H), (_i, _KEYS + _ROWS))),
    "k_packed": Operand(
        ((_b * _H + _h) * _P + _key) * _D + _c, (_BATCH, (_h, _H), (_key, _P), (_c, _D))
    ),
    "v_packed": Operand(
        ((_b * _H + _h) * _P + _key) * _DV + _c, (_BATCH, (_h, _H), (_key, _P), (_c, _DV))
    ),
    "partial": Operand(
        (((_b * _H + _h) * _SPLIT_ROWS + _row) * _PARTS + _p) * (_DV + 2) + _c,
        (_BATCH, (_h, _H), (_row, _SPLIT_ROWS), (_p, _PARTS), (_c, _DV)),
    ),
}


#: Names that ``largest_offsets`` wants: sizes and strides in elements, blocks and counts.
SIZES = tuple(
    sorted(
        {
            str(symbol)
            for operand in ATTEND_OPERANDS.values()
            for symbol in operand.offset.free_symbols.union(
                *(e.free_symbols for _, e in operand.ends)
            )
        }
        - {str(place) for operand in ATTEND_OPERANDS.values() for place, _ in operand.ends}
    )
)


def farthest(operand: Operand) -> sympy.Expr | None:
    """The largest offset as an expression in sizes and strides; None where it cannot be proved."""
    corner = operand.offset
    for coordinate, end in operand.ends:
        slope = sympy.expand(sympy.diff(operand.offset, coordinate))
        if not slope.is_nonnegative:
            return None
        corner = corner.subs(coordinate, end - 1)
    return sympy.expand(corner)


@lru_cache(maxsize=1)
def _corners() -> dict[str, Callable[..., int] | None]:
    found: dict[str, Callable[..., int] | None] = {}
    arguments = [sympy.Symbol(name, integer=True, nonnegative=True) for name in SIZES]
    for name, operand in ATTEND_OPERANDS.items():
        corner = farthest(operand)
        found[name] = None if corner is None else sympy.lambdify(arguments, corner, modules="math")
    return found


def largest_offsets(sizes: Mapping[str, Any]) -> dict[str, int | None]:
    """Operand -> the largest offset that ``attend`` computes for it; None where nothing is proved.

    Args:
        sizes: a value for each name in ``SIZES``; 0 for what a kernel does not have.
    """
    values = [int(sizes[name]) for name in SIZES]
    return {name: corner and corner(*values) for name, corner in _corners().items()}


def needs_wide(sizes: Mapping[str, Any]) -> bool:
    """Whether some offset cannot be proved to fit 32 bits.

    Args:
        sizes: as ``largest_offsets``.
    """
    return any(found is None or found >= LIMIT for found in largest_offsets(sizes).values())
