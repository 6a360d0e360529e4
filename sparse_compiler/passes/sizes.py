"""Size expressions as ints or nodes of the graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.ir.site import example_of

__all__ = ["SizeMissing", "size_node"]


class SizeMissing(Exception):
    """A size that the graph's inputs do not carry, or an operation on sizes that is not known."""


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "FloorDivide": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Modulo": operator.mod,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
}


def size_node(graph: fx.Graph, size: Any) -> Any:
    """An int, or nodes at the insertion point that compute a symbolic size from the graph's inputs.

    Raises:
        SizeMissing: a symbol has no input, or an operation is not a sum, product, quotient or extreme.
    """
    if isinstance(size, int):
        return size
    if isinstance(size, sympy.Integer):
        return int(size)
    if isinstance(size, sympy.Symbol):
        return _symbol(graph, size)
    operation = _OPERATIONS.get(type(size).__name__)
    if operation is None:
        raise SizeMissing(size)
    parts = [size_node(graph, part) for part in size.args]
    total = parts[0]
    for part in parts[1:]:
        both = isinstance(total, int) and isinstance(part, int)
        total = operation(total, part) if both else _call(graph, operation, total, part)
    return total


def _call(graph: fx.Graph, operation: Any, left: Any, right: Any) -> fx.Node:
    node = graph.call_function(operation, (left, right))
    node.meta["example_value"] = operation(_value(left), _value(right))
    return node


def _value(size: Any) -> Any:
    if not isinstance(size, fx.Node):
        return size
    return example_of(size)


def _symbol(graph: fx.Graph, symbol: sympy.Symbol) -> fx.Node:
    """The input that is the symbol, else a size of an input."""
    sized: tuple[fx.Node, int] | None = None
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        value = example_of(node)
        if isinstance(value, torch.SymInt) and value.node.expr == symbol:
            return node
        if isinstance(value, torch.Tensor) and sized is None:
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                    sized = node, dim
    if sized is None:
        raise SizeMissing(symbol)
    node = graph.call_method("size", sized)
    value: Any = example_of(sized[0])
    node.meta["example_value"] = value.shape[sized[1]]
    return node
