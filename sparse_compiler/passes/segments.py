"""Packed documents: the keys that share a row's id form an interval if ids never decrease."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from sparse_compiler.passes.form import Axes
from sparse_compiler.passes.operations import KEEPING, operation
from sparse_compiler.passes.predicates import rewrite
from sparse_compiler.passes.symbolic_tensor import (
    Index,
    NotUnderstood,
    SymbolicTensors,
    argument,
    tensor_of,
)
from sparse_compiler.passes.symbolic_values import Choice, conj, disj, is_bool
from sparse_compiler.passes.symbolic_views import VIEWS

__all__ = ["is_monotone", "segments_as_intervals"]

# Casts that cannot turn an order around: counts of a sequence's tokens fit all of these.
_WIDE = (torch.int64, torch.int32, torch.float32, torch.float64)


def segments_as_intervals(tensors: SymbolicTensors, axes: Axes, pred: Any) -> Any:
    """`pred` with ``ids(b, q) == ids(b, k)`` written as ``start(b, q) <= k <= end(b, q)``.

    Only where the ids are proved never to decrease along the keys, and rows and keys are the same
    places; others stay as they are.
    """

    def change(part: Any) -> Any:
        if not isinstance(part, sympy.Eq | sympy.Ne):
            return None
        found = _pair(axes, part)
        if found is None or axes.sizes[2] != axes.sizes[3]:
            return None
        node = tensors.reads.get(found.func)
        if node is None or found.args[-1] != axes.query:
            return None
        if tensors.shape(node)[-1] != axes.sizes[2]:
            return None
        if not is_monotone(tensors, node, found.args, axes.query):
            return None
        low, high = (tensors.segment(node, side, found.args) for side in ("start", "end"))
        if isinstance(part, sympy.Eq):
            return conj(
                sympy.Ge(axes.key, low, evaluate=False), sympy.Le(axes.key, high, evaluate=False)
            )
        return disj(
            sympy.Lt(axes.key, low, evaluate=False), sympy.Gt(axes.key, high, evaluate=False)
        )

    return rewrite(pred, change)


def _pair(axes: Axes, part: Any) -> Any:
    """The read at the row's place if the relation compares one tensor at row and key."""
    difference = sympy.expand(part.args[0] - part.args[1])
    reads = [a for a in difference.atoms(AppliedUndef) if a.free_symbols & {axes.query, axes.key}]
    if len(reads) != 2:
        return None
    mine = next((r for r in reads if axes.key not in r.free_symbols), None)
    other = next((r for r in reads if axes.query not in r.free_symbols), None)
    if mine is None or other is None or mine.func != other.func:
        return None
    if other != mine.xreplace({axes.query: axes.key}):
        return None
    return mine if difference in (mine - other, other - mine) else None


def is_monotone(
    tensors: SymbolicTensors, node: fx.Node, index: Index, symbol: sympy.Symbol
) -> bool:
    """Whether ``node[index]`` provably never decreases while `symbol` grows."""
    if tensors.mutations.written(node):
        return False
    at = [n for n, i in enumerate(index) if symbol in i.free_symbols]
    if not at:
        return True
    if len(at) != 1 or symbol in (index[at[0]] - symbol).free_symbols:
        return False
    name = operation(node) or ""
    value = tensor_of(node)
    source = argument(node, 0, "input")
    try:
        if name in VIEWS:
            return is_monotone(tensors, *VIEWS[name](tensors, node, index), symbol)
        check = _CHECKS.get(name)
        if check is not None and value is not None:
            return check(tensors, node, index, at[0], symbol)
        if name in KEEPING and value is not None and isinstance(source, fx.Node):
            counts = tensors.dtype(source) in _WIDE and value.dtype in _WIDE
            return counts and is_monotone(tensors, source, index, symbol)
    except NotUnderstood:
        return False
    return False


def _running_sum(
    tensors: SymbolicTensors, node: fx.Node, index: Index, at: int, symbol: sympy.Symbol
) -> bool:
    source, dim = argument(node, 0, "input"), argument(node, 1, "dim")
    if not isinstance(dim, int) or dim % len(index) != at or tensors.dtype(node) not in _WIDE:
        return False
    value: Any = tensors.evaluate(source, index)
    # Zeros and ones only: their sums are no longer than the sequence and overflow nothing.
    return is_bool(value) or (isinstance(value, Choice) and {value.yes, value.no} <= {0, 1})


def _bucket(
    tensors: SymbolicTensors, node: fx.Node, index: Index, at: int, symbol: sympy.Symbol
) -> bool:
    """Binary search keeps the order of what is searched, whatever the boundaries are."""
    searched = argument(node, 0 if operation(node) == "bucketize" else 1, "input")
    bounds = argument(node, 1 if operation(node) == "bucketize" else 0, "boundaries")
    if not isinstance(searched, fx.Node) or not isinstance(bounds, fx.Node):
        return False
    if len(tensors.shape(bounds)) != 1 or tensors.dtype(searched).is_floating_point:
        return False
    value: Any = tensors.evaluate(searched, index)
    return isinstance(value, sympy.Expr) and value.diff(symbol) == 1 and not value.has(AppliedUndef)


_CHECKS: dict[str, Callable[..., bool]] = {
    "cumsum": _running_sum,
    "bucketize": _bucket,
    "searchsorted": _bucket,
}
