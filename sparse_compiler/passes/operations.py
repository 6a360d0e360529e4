"""The plain names of PyTorch's operations, however a graph spells them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from sparse_compiler.ir.site import tensor_of

__all__ = [
    "CASTS",
    "IN_PLACE",
    "KEEPING",
    "MOVES",
    "calls",
    "functional",
    "operation",
    "operation_of",
    "overloads_of",
]

# Operations that leave every element at its place: each set holds the one before it.
# The element itself, at most in other memory.
_COPIES = frozenset({"contiguous", "clone", "detach", "alias"})
# It may get another dtype, by name a floating one. What `to` and its like change depends on their
# arguments: who needs the same dtype or device has to compare. For logits and what leads to them.
CASTS = _COPIES | {"to", "_to_copy", "type", "type_as"} | {"half", "bfloat16", "float", "double"}
# Or another device, by name too. For masks, which are often made on the host.
MOVES = CASTS | {"cpu", "cuda"}
# Or by name a dtype of integers or truth. For values that are read exactly, whatever they are.
KEEPING = MOVES | {"bool", "byte", "short", "int", "long"} | {"lift_fresh_copy", "positive"}


def operation(node: fx.Node) -> str | None:
    """The plain name of a torch operation (``le``, ``expand``); None if it is not torch's own.

    One that writes its result to ``out=`` has none: it does more than its name says.
    """
    if node.kwargs.get("out") is not None:
        return None
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


def overloads_of(target: Any) -> list[Any]:
    """The overloads that an operator stands for; anything else stands for itself.

    A graph holds ``torch.ops.lib.name`` where the source wrote that, and an overload of it where it
    wrote ``torch.ops.lib.name.default`` or called what ``torch.library.custom_op`` returned.
    """
    target = getattr(target, "_opoverload", target)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return [getattr(target, name) for name in target.overloads()]
    return [target]


def calls(node: fx.Node, target: Any) -> bool:
    """Whether ``node`` calls an operator or a function, however the graph names it.

    Args:
        target: a function, an operator, one overload of it, or a result of
            ``torch.library.custom_op``; of an operator with several overloads any counts.
    """
    if node.op != "call_function":
        return False
    wanted = overloads_of(target)
    return all(found in wanted for found in overloads_of(node.target))


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
