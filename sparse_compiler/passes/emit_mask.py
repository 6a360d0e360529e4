"""Nodes that compute a proved mask's operands, as the operators take them.

Each function inserts at the graph's insertion point and answers None where the fact needs no such
operand.
"""

from __future__ import annotations

import operator

import sympy
import torch
from torch import fx

from sparse_compiler.ir.mask import MaskFact
from sparse_compiler.passes.grid import Place, call, full

__all__ = ["emit_bounds", "emit_padding"]


def emit_padding(place: Place, fact: MaskFact) -> fx.Node | None:
    """``key_mask``: bool [B|1, Lk], True is visible."""
    if fact.key_padding is None:
        return None
    key = place.axes.pairs[3]
    return full(place.graph, place.emit(fact.key_padding, "bk"), key, place.size_of)


def emit_bounds(place: Place, fact: MaskFact) -> fx.Node | None:
    """``bounds``: int32 [B|1, Lq, 2], first and last key, clamped to -1..Lk."""
    if not fact.bounded:
        return None
    graph = place.graph
    _, _, query, (_, num_k) = place.axes.pairs
    last = num_k - 1
    sides = [
        sympy.Integer(0) if fact.low is None else _within(fact.low, sympy.Integer(0), num_k),
        last if fact.high is None else _within(fact.high, sympy.Integer(-1), last),
    ]
    found = [place.emit(side, "bq") for side in sides]
    found = call(graph, torch.broadcast_tensors, *found)
    low, high = (call(graph, operator.getitem, found, n) for n in (0, 1))
    both = call(graph, torch.stack, [low, high], dim=-1)
    both = full(graph, both, query, place.size_of, dim=1)
    return call(graph, "to", both, torch.int32)


def _within(value: sympy.Expr, low: sympy.Expr, high: sympy.Expr) -> sympy.Expr:
    if isinstance(value, sympy.Integer) and isinstance(high, sympy.Integer):
        return max(min(value, high), low)
    # Unevaluated: sympy's search for simpler forms takes longer than the proof.
    return sympy.Max(sympy.Min(value, high, evaluate=False), low, evaluate=False)
