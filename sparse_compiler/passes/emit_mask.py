"""Nodes that compute a proved mask's operands, as the operators take them.

Each function inserts at the graph's insertion point and answers None where the fact needs no such
operand. Its arguments are those of `passes.grid.emit` with the attention's axes and the fact.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.ir.mask import MaskFact
from sparse_compiler.passes.bias import emit_bias
from sparse_compiler.passes.form import Axes
from sparse_compiler.passes.grid import call, emit, full
from sparse_compiler.passes.symbolic_tensor import SymbolicTensors

__all__ = ["emit_bias", "emit_bounds", "emit_padding", "emit_rows"]

SizeOf = Callable[[sympy.Expr], Any]
Device = torch.device | str


def emit_padding(
    graph: fx.Graph,
    tensors: SymbolicTensors,
    axes: Axes,
    fact: MaskFact,
    size_of: SizeOf,
    device: Device,
) -> fx.Node | None:
    """``key_mask``: bool [B|1, Lk], True is visible."""
    if fact.key_padding is None:
        return None
    batch, _, _, key = axes.pairs
    return full(
        graph, emit(graph, tensors, fact.key_padding, (batch, key), size_of, device), key, size_of
    )


def emit_bounds(
    graph: fx.Graph,
    tensors: SymbolicTensors,
    axes: Axes,
    fact: MaskFact,
    size_of: SizeOf,
    device: Device,
) -> fx.Node | None:
    """``bounds``: int32 [B|1, Lq, 2], first and last key, clamped to -1..Lk."""
    if not fact.bounded:
        return None
    batch, _, query, (_, num_k) = axes.pairs
    last = num_k - 1
    sides = [
        sympy.Integer(0) if fact.low is None else _within(fact.low, sympy.Integer(0), num_k),
        last if fact.high is None else _within(fact.high, sympy.Integer(-1), last),
    ]
    found = [emit(graph, tensors, side, (batch, query), size_of, device) for side in sides]
    found = call(graph, torch.broadcast_tensors, *found)
    low, high = (call(graph, operator.getitem, found, n) for n in (0, 1))
    both = call(graph, torch.stack, [low, high], dim=-1)
    both = full(graph, both, query, size_of, dim=1)
    return call(graph, "to", both, torch.int32)


def emit_rows(
    graph: fx.Graph,
    tensors: SymbolicTensors,
    axes: Axes,
    fact: MaskFact,
    size_of: SizeOf,
    device: Device,
) -> fx.Node | None:
    """Row addresses int64 [Lq] with the band's offset in them, where it is known at run time only.

    The band is then to be read with an offset of 0.
    """
    if not fact.offset_is_read:
        return None
    query = axes.pairs[2]
    place = query[0] + fact.band.q_offset
    return full(graph, emit(graph, tensors, place, (query,), size_of, device), query, size_of)


def _within(value: sympy.Expr, low: sympy.Expr, high: sympy.Expr) -> sympy.Expr:
    if isinstance(value, sympy.Integer) and isinstance(high, sympy.Integer):
        return max(min(value, high), low)
    # Unevaluated: sympy's search for simpler forms takes longer than the proof.
    return sympy.Max(sympy.Min(value, high, evaluate=False), low, evaluate=False)
