"""Which of an attention's leading dimensions are the batch, and which the heads."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
from torch import fx

from sparse_compiler.passes.form import AttentionForm, Axes, Element
from sparse_compiler.passes.layout import step_back
from sparse_compiler.passes.symbolic_reader import Index, tensor_of
from sparse_compiler.passes.symbolic_tensor import SymbolicTensors
from sparse_compiler.passes.symbolic_values import (
    FloorDivide,
    Modulo,
    NotUnderstood,
    floor_divide,
    modulo,
)

__all__ = ["attention_axes", "fix_sizes", "shared_axes", "unread_form"]

Mapping = dict[sympy.Symbol, sympy.Expr]


def attention_axes(
    batch: Sequence[tuple[sympy.Symbol, sympy.Expr]],
    named: tuple[sympy.Symbol, sympy.Symbol, sympy.Symbol, sympy.Symbol],
    sizes: tuple[sympy.Expr, sympy.Expr, sympy.Expr, sympy.Expr],
    elements: Sequence[Element],
    tensors: SymbolicTensors,
) -> tuple[Axes, Mapping] | None:
    """The axes of an attention, shared by all attentions of equal sizes, and the old symbols in them.

    Two leading dimensions are batch and heads. One is their product where a tensor behind an element
    says so, else the batch. Of more, the first is the batch and the others together are the heads.

    Args:
        batch: symbols and sizes of the leading dimensions.
        named: symbols of the query row, the key, and the dimensions of q and v.
        sizes: of those.
        elements: of the operands, in these symbols.
    Returns:
        (axes, {old symbol: expression in the axes}); None where heads are no number.
    """
    split = 0
    if len(batch) == 1:
        found = (_merged_heads(e, batch[0][0], tensors) for e in elements)
        split = next((n for n in found if n), 0)
    one = sympy.Integer(1)
    if split:
        count, heads = sympy.expand(batch[0][1] / split), sympy.Integer(split)
    else:
        inner = [size for _, size in batch[1:]]
        if not all(isinstance(n, sympy.Integer) for n in inner):
            return None
        count = batch[0][1] if batch else one
        heads = sympy.sympify(sympy.prod(inner)) if inner else one
    axes = shared_axes(tensors, (count, heads, *sizes))
    mapping: Mapping = dict(
        zip(named, (axes.query, axes.key, axes.dim, axes.value_dim), strict=True)
    )
    if split:
        mapping[batch[0][0]] = axes.batch * split + axes.head
        return axes, mapping
    rest: sympy.Expr = axes.head
    for position in reversed(range(1, len(batch))):
        symbol, size = batch[position]
        if position == 1:
            mapping[symbol] = rest
        else:
            mapping[symbol] = modulo(rest, size)
            rest = floor_divide(rest, size)
    if batch:
        mapping[batch[0][0]] = axes.batch
    return axes, mapping


def shared_axes(tensors: SymbolicTensors, sizes: Index) -> Axes:
    """Axes of the sizes B, Hq, Lq, Lk, D, Dv.

    Layers of equal sizes get the same symbols, so that they share the proofs about them.
    """
    known = tensors.shared.get(("axes", sizes))
    if known is None:
        symbols = (tensors.new_index(n, s) for n, s in zip("bhqkdv", sizes, strict=True))
        known = tensors.shared[("axes", sizes)] = Axes(*symbols, sizes=sizes)
    return known


def _merged_heads(element: Element, merged: sympy.Symbol, tensors: SymbolicTensors) -> int:
    """H where a tensor behind the element has ``merged`` as two dimensions [B, H]; 0 if none."""
    node, index = element.node, element.index
    for _ in range(16):
        step = step_back(tensors, node, index)
        if step is None:
            return 0
        node, index = step
        lower = {e.args[1] for e in index if isinstance(e, Modulo) and e.args[0] == merged}
        upper = {e.args[1] for e in index if isinstance(e, FloorDivide) and e.args[0] == merged}
        both = [n for n in lower & upper if isinstance(n, sympy.Integer)]
        if both:
            return int(both[0])
    return 0


def fix_sizes(node: fx.Node, *dims: int) -> None:
    """Make sizes constants that a model has for good: its heads and head sizes.

    Under dynamic shapes that adds a guard; afterwards ``tensors.shape(node)`` holds numbers there.

    Raises:
        NotUnderstood: not a tensor, or not so many dimensions.
    """
    value = tensor_of(node)
    if value is None or any(not -value.dim() <= dim < value.dim() for dim in dims):
        raise NotUnderstood(f"{node.name} is no tensor with dimensions {dims}")
    for dim in dims:
        int(value.shape[dim])


def unread_form(
    reader: fx.Node, result: fx.Node, tensors: SymbolicTensors, obstacle: tuple[str, str]
) -> AttentionForm:
    """A form that only says that here is an attention, and why nobody could read it."""
    zero = sympy.Integer(0)
    axes = Axes(*(sympy.Dummy(n, integer=True) for n in "bhqkdv"), sizes=(zero,) * 6)
    places = tuple(zero for _ in tensors.shape(result))
    nothing = Element(reader, tuple(zero for _ in tensors.shape(reader)))
    return AttentionForm(
        axes, nothing, nothing, nothing, Element(result, places), obstacle=obstacle
    )
