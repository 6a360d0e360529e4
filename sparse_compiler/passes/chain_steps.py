"""What the matcher of written-out attention asks of single nodes."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.ir.report import Code
from sparse_compiler.ir.site import example_of
from sparse_compiler.passes.form import Element
from sparse_compiler.passes.operations import CASTS, operation
from sparse_compiler.passes.origins import is_parameter
from sparse_compiler.passes.purity import is_pure
from sparse_compiler.passes.symbolic_reader import argument, described, tensor_of
from sparse_compiler.passes.symbolic_views import VIEWS

__all__ = [
    "LIMIT",
    "Failed",
    "absorbed",
    "asks_of_other",
    "computed_alike",
    "free_symbols",
    "is_dead",
    "is_log_sum",
    "is_row_maximum",
    "is_view",
    "is_weight",
    "number_of",
    "only_asks",
    "plain_name",
    "where_operands",
]

_SHAPE_ONLY = frozenset({"size", "dim", "sym_size", "numel", "stride"})
_INPLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "idiv": "div"}
_PLAIN = {
    "__add__": "add", "__radd__": "add", "__sub__": "sub", "subtract": "sub", "multiply": "mul",
    "__mul__": "mul", "__rmul__": "mul", "truediv": "div", "true_divide": "div",
    "__truediv__": "div", "divide": "div", "concat": "cat", "concatenate": "cat",
}  # fmt: skip
LIMIT = 256


class Failed(Exception):
    """The graph is no attention that the form can say; the text names node and operation."""

    def __init__(self, node: fx.Node, reason: str, code: Code = Code.CHAIN) -> None:
        super().__init__(f"{described(node)}: {reason}")
        self.code = code


def plain_name(node: fx.Node) -> str:
    """The operation's name; in-place forms count as what they compute, ``out=`` has no name."""
    if node.kwargs.get("out") is not None:
        return ""
    name = operation(node) or ""
    name = _INPLACE.get(name, name)
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return _PLAIN.get(name, name)


def free_symbols(element: Element) -> set[Any]:
    """The symbols that occur in an element's index."""
    return set().union(*(sympy.sympify(e).free_symbols for e in element.index))


def computed_alike(first: Any, second: Any, depth: int = 16) -> bool:
    """Whether two nodes apply the same pure operations to the same nodes."""
    if first is second:
        return True
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)) or not depth:
        return (
            not isinstance(first, fx.Node) and not isinstance(second, fx.Node) and first == second
        )
    if first.op not in ("call_function", "call_method") or not is_pure(first):
        return False
    same = (first.op, first.target, first.kwargs.keys()) == (
        *(second.op, second.target, second.kwargs.keys()),
    )
    if not same or len(first.args) != len(second.args):
        return False
    pairs = [*zip(first.args, second.args, strict=True)]
    pairs += [(first.kwargs[name], second.kwargs[name]) for name in first.kwargs]
    return all(computed_alike(a, b, depth - 1) for a, b in pairs)


def number_of(value: Any, node: fx.Node) -> float:
    """``alpha`` or ``beta`` of ``node`` as a float; a symbolic one is fixed by a guard.

    Raises:
        Failed: it is no number.
    """
    if isinstance(value, fx.Node):
        value = example_of(value)
    if not isinstance(value, int | float | torch.SymFloat):
        raise Failed(node, "alpha or beta is no number")
    return float(value)


def is_dead(node: fx.Node, depth: int = 8) -> bool:
    """Computes what nobody reads, and does nothing else."""
    if not depth or node.op == "output" or not is_pure(node):
        return False
    return all(is_dead(user, depth - 1) for user in node.users)


def absorbed(node: fx.Node, region: set[fx.Node], depth: int = 6) -> bool:
    """Whether all that comes of ``node`` is read inside of a region only, or not at all."""
    if node in region or only_asks(node):
        return True
    if not depth or node.op == "output" or not node.users:
        return False
    return all(absorbed(user, region, depth - 1) for user in node.users)


def asks_of_other(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` reads no more of ``node`` than its dtype or shape."""
    name = operation(user) or ""
    like = name in ("type_as", "view_as", "expand_as", "reshape_as") and user.args[0] is not node
    return like or name.endswith("_like") or name.startswith("new_")


def is_log_sum(node: fx.Node, logits: fx.Node) -> bool:
    """Whether ``node`` is the log-sum-exp of a row of ``logits``."""
    value = tensor_of(logits)
    if operation(node) != "logsumexp" or argument(node, 0, "input") is not logits or value is None:
        return False
    dim = argument(node, 1, "dim")
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    return dim in (-1, value.dim() - 1)


def only_asks(node: fx.Node) -> bool:
    """Reads nothing but sizes and the like, or is itself read by nobody."""
    if is_dead(node):
        return True
    name = operation(node) or getattr(node.target, "__name__", str(node.target))
    if name in _SHAPE_ONLY:
        return True
    if name == "getattr":
        return argument(node, 1, "name") in ("shape", "dtype", "device", "ndim")
    return False


def is_view(node: fx.Node) -> bool:
    """Whether ``node`` holds elements of another tensor at places that the reader can tell."""
    return (operation(node) or "") in VIEWS


def is_weight(node: fx.Node) -> bool:
    """Whether ``node`` is a parameter, seen through views and casts."""
    for _ in range(8):
        if is_parameter(node):
            return True
        if not is_view(node) and (operation(node) or "") not in CASTS:
            return False
        inputs = node.all_input_nodes
        if not inputs:
            return False
        node = inputs[0]
    return False


def is_row_maximum(node: Any, of: fx.Node) -> bool:
    """``of.amax(-1, keepdim=True)`` or the values of ``of.max(-1, keepdim=True)``."""
    if not isinstance(node, fx.Node):
        return False
    name = operation(node) or getattr(node.target, "__name__", "")
    if name in ("detach", "getitem", "getattr"):
        picks = name == "detach" or argument(node, 1, "name") in (0, "values")
        inner = node.args[0]
        return picks and isinstance(inner, fx.Node) and is_row_maximum(inner, of)
    if name not in ("amax", "max") or argument(node, 0, "input") is not of:
        return False
    value = tensor_of(of)
    dim = argument(node, 1, "dim")
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    last = value is not None and dim in (-1, value.dim() - 1)
    return last and argument(node, 2, "keepdim", False) is True


def where_operands(node: fx.Node) -> tuple[Any, Any, Any]:
    """(condition, yes, no) of ``torch.where(c, a, b)`` or ``a.where(c, b)``."""
    given = [*node.args, *(node.kwargs.get(n) for n in ("condition", "input", "self", "other"))]
    given = [g for g in given if g is not None][:3]
    if len(given) < 3:
        return None, None, None
    if node.op == "call_method":
        return given[1], given[0], given[2]
    return given[0], given[1], given[2]
