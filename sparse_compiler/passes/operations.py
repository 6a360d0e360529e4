"""The plain names of PyTorch's operations, however a graph spells them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from sparse_compiler.ir.site import tensor_of

__all__ = ["IN_PLACE", "functional", "operation", "operation_of"]


def operation(node: fx.Node) -> str | None:
    """The plain name of a torch operation (``le``, ``expand``); None if it is not torch's own."""
    if node.op == "call_method":
        first = node.args[0] if node.args else None
        is_tensor = isinstance(first, fx.Node) and tensor_of(first) is not None
        return str(node.target) if is_tensor else None
    return operation_of(node.target) if node.op == "call_function" else None


def operation_of(target: Any) -> str | None:
    """As `operation`, for what a node calls."""
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__ if target.namespace == "aten" else None
    name = getattr(target, "__name__", None)
    if name is None:
        return None
    for owner in (operator, torch, torch.Tensor, torch.nn.functional):
        if getattr(owner, name, None) is target:
            return name
    return "getattr" if target is getattr else None


def functional(node: fx.Node) -> str | None:
    """The operation whose result an operation that writes its first argument puts there."""
    name = operation(node)
    if name is None:
        return None
    if name in IN_PLACE:
        return IN_PLACE[name]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else None


_IN_PLACE = ("add", "sub", "mul", "and_", "or_", "xor", "floordiv", "mod", "truediv")
IN_PLACE: dict[str, str] = {
    spelling: name
    for name in _IN_PLACE
    for spelling in (f"i{name.rstrip('_')}", f"__i{name.rstrip('_')}__")
}
