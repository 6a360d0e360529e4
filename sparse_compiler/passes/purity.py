"""Which nodes do nothing but compute their output."""

from __future__ import annotations

import torch
from torch import fx

__all__ = ["is_collective", "is_mutating", "is_pure"]

_IMPURE_CALLS = frozenset({"setattr", "setitem", "_log_api_usage_once", "manual_seed", "print"})


def is_mutating(node: fx.Node) -> bool:
    """Writes to a tensor that exists without it: in-place methods, ``out=``, mutable schemas."""
    if node.op == "call_method":
        name = str(node.target)
        return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    if node.op != "call_function":
        return False
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = getattr(node.target, "__name__", "")
    in_place = (
        name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_", "not_")
    )
    return in_place or name in ("setitem", "iadd", "isub", "imul", "iand", "ior", "copy_")


def is_collective(node: fx.Node) -> bool:
    """Communicates between processes."""
    text = f"{getattr(node.target, '__module__', '')} {node.target}"
    return node.op == "call_function" and ("c10d" in text or "distributed" in text)


def is_pure(node: fx.Node) -> bool:
    """Safe to erase when nobody reads it; a doubtful node is not."""
    if node.op == "get_attr":
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    name = getattr(node.target, "__name__", str(node.target))
    random = "rand" in name or "dropout" in name or "bernoulli" in name
    return not (random or name in _IMPURE_CALLS or is_mutating(node) or is_collective(node))
