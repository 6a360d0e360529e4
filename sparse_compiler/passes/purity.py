"""Which nodes do nothing but compute their output."""

from __future__ import annotations

import torch
from torch import fx

from sparse_compiler.passes.mutation import INPLACE_OPERATORS

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
    return in_place or node.target in INPLACE_OPERATORS


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
    random = "rand" in name or "bernoulli" in name or ("dropout" in name and _drops(node))
    return not (random or name in _IMPURE_CALLS or is_mutating(node) or is_collective(node))


def _drops(node: fx.Node) -> bool:
    """Whether a dropout may be active: not with ``training=False`` or a probability of 0."""
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
    probability = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    return training is not False and not (isinstance(probability, int | float) and not probability)
