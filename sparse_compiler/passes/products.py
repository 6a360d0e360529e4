"""Matrix products of every spelling, read as one sum over one contracted index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from sparse_compiler.passes.form import Element
from sparse_compiler.passes.symbolic_reader import Index, argument, operation
from sparse_compiler.passes.symbolic_tensor import SymbolicTensors

__all__ = ["Product", "broadcast", "contraction_size", "is_product", "product_at"]

_MATMULS = frozenset({"matmul", "__matmul__", "__rmatmul__", "bmm", "mm"})
_ADDED = frozenset({"baddbmm", "addmm"})
_ZERO = sympy.Integer(0)


@dataclass(frozen=True)
class Product:
    """``node[out] = beta * added + alpha * sum over c of left * right``.

    Args:
        left, right: elements in the symbols of the index asked for, and of c.
        size: of c.
        alpha, beta: numbers or nodes.
        added: of baddbmm, else None.
    """

    left: Element
    right: Element
    size: sympy.Expr
    alpha: Any = 1.0
    added: Element | None = None
    beta: Any = 1.0


def is_product(node: fx.Node) -> bool:
    """Whether ``node`` is a product that ``product_at`` may read; writes to ``out=`` are kept."""
    if node.kwargs.get("out") is not None:
        return False
    return (operation(node) or "") in _MATMULS | _ADDED | {"einsum"}


def _operands(node: fx.Node) -> tuple[Any, Any, Any]:
    """(left, right, added) nodes; None where they are no nodes."""
    name = operation(node) or ""
    if name in _ADDED:
        names = ("batch1", "batch2") if name == "baddbmm" else ("mat1", "mat2")
        return (
            argument(node, 1, names[0]),
            argument(node, 2, names[1]),
            argument(node, 0, "input"),
        )
    second = {"bmm": "mat2", "mm": "mat2"}.get(name, "other")
    left, right = argument(node, 0, "input"), argument(node, 1, second)
    return (right, left, None) if name == "__rmatmul__" else (left, right, None)


def product_at(
    node: fx.Node, index: Index, contracted: sympy.Symbol, tensors: SymbolicTensors
) -> Product | None:
    """The two factors of element ``index`` of a product; None if it is not of two matrices."""
    if operation(node) == "einsum":
        return _einsum(node, index, contracted, tensors)
    left, right, added = _operands(node)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    ranks = len(tensors.shape(left)), len(tensors.shape(right))
    if min(ranks) < 2:
        return None
    batch, row, column = index[:-2], index[-2], index[-1]
    extra = None
    if added is not None:
        if not isinstance(added, fx.Node):
            return None
        extra = broadcast(added, index, tensors)
    return Product(
        left=_at(left, (*batch, row, contracted), tensors),
        right=_at(right, (*batch, contracted, column), tensors),
        size=tensors.shape(left)[-1],
        alpha=node.kwargs.get("alpha", 1.0),
        added=extra,
        beta=node.kwargs.get("beta", 1.0),
    )


def _at(node: fx.Node, index: Index, tensors: SymbolicTensors) -> Element:
    return broadcast(node, index, tensors)


def broadcast(node: fx.Node, index: Index, tensors: SymbolicTensors) -> Element:
    """The element of ``node`` that feeds ``index`` of a result, sizes of 1 broadcast."""
    shape = tensors.shape(node)
    place = index[len(index) - len(shape) :]
    return Element(node, tuple(_ZERO if n == 1 else i for i, n in zip(place, shape, strict=True)))


def contraction_size(node: fx.Node, tensors: SymbolicTensors) -> sympy.Expr | None:
    """How far the contracted index runs."""
    product = product_at(node, tuple(_ZERO for _ in tensors.shape(node)), sympy.Dummy("c"), tensors)
    return None if product is None else product.size


def _einsum(
    node: fx.Node, index: Index, contracted: sympy.Symbol, tensors: SymbolicTensors
) -> Product | None:
    equation = argument(node, 0, "equation")
    operands: Any = node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], Sequence):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    if not all(isinstance(o, fx.Node) for o in operands):
        return None
    labels = _labels(equation, [len(tensors.shape(o)) for o in operands], len(index))
    if labels is None:
        return None
    first, second, result = labels
    summed = (set(first) | set(second)) - set(result)
    if len(summed) != 1 or not summed <= set(first) & set(second):
        return None
    places = dict(zip(result, index, strict=True)) | {summed.pop(): contracted}
    shape = tensors.shape(operands[0])
    size = shape[[places[label] for label in first].index(contracted)]
    left, right = (
        broadcast(operand, tuple(places[label] for label in names), tensors)
        for operand, names in zip(operands, (first, second), strict=True)
    )
    return Product(left, right, size)


def _labels(equation: str, ranks: list[int], out: int) -> tuple[list[str], ...] | None:
    """The labels of each dimension of both operands and the result; None with repeated ones."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if len(parts) != 2 or not arrow:
        return None
    dots = max(rank - len(p.replace("...", "")) for p, rank in zip(parts, ranks, strict=True))
    lists = []
    for part, rank in zip((*parts, result), (*ranks, out), strict=True):
        own = rank - len(part.replace("...", ""))
        hidden = [f"#{n}" for n in range(dots - own, dots)] if "..." in part else []
        if own != len(hidden):
            return None
        before, _, after = part.partition("...")
        lists.append([*before, *hidden, *after])
        if len(set(lists[-1])) != len(lists[-1]):
            return None
    return tuple(lists)
