"""Predicates and expressions rewritten without sympy's simplification, which is slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy

from sparse_compiler.passes.symbolic_values import conj, conjuncts, disj

__all__ = ["common_factors", "rewrite"]


def common_factors(pred: Any) -> Any:
    """`pred` with the conjuncts that all branches of an Or share taken out of it."""
    if isinstance(pred, sympy.And):
        return conj(*(common_factors(arg) for arg in pred.args))
    if not isinstance(pred, sympy.Or):
        return pred
    branches = [conjuncts(common_factors(arg)) for arg in pred.args]
    shared = [part for part in branches[0] if all(part in other for other in branches[1:])]
    if not shared:
        return pred
    rest = (conj(*(p for p in branch if p not in shared)) for branch in branches)
    return conj(*shared, disj(*rest))


def rewrite(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with every part for which `change` gives something replaced by that.

    Relations stay unevaluated, which sympy's own replacing does not grant.
    """
    changed = change(value)
    if changed is not None:
        return changed
    if not value.args:
        return value
    args = tuple(rewrite(arg, change) for arg in value.args)
    if all(a is b for a, b in zip(args, value.args, strict=True)):
        return value
    if isinstance(value, sympy.core.relational.Relational):
        return type(value)(*args, evaluate=False)
    if isinstance(value, sympy.And):
        return conj(*args)
    if isinstance(value, sympy.Or):
        return disj(*args)
    return value.func(*args)
