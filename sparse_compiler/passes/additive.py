"""What a term added to the logits does: hides keys, shifts logits, or both.

The nodes that make an additive mask are walked backward through sums, choices, casts and views.
Values that are as low as their dtype goes (or lower) hide; what is left is a bias, which the
operators take as a tensor of its own if it does not tie rows to keys by data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.passes.form import Axes, Element, MaskTerm
from sparse_compiler.passes.hidden import hides
from sparse_compiler.passes.operations import MOVES, operation
from sparse_compiler.passes.symbolic_tensor import (
    Index,
    NotUnderstood,
    SymbolicTensors,
    argument,
    tensor_of,
)
from sparse_compiler.passes.symbolic_values import Choice, as_bool, is_bool, neg
from sparse_compiler.passes.symbolic_views import VIEWS

__all__ = ["Effect", "read_term", "summands"]

# A sum that is multiplied by more is one bias: in ``(1 - m) * lowest`` the 1 alone hides nothing.
_MOST = 1e3


@dataclass
class Effect:
    """What terms do: ``visible`` are predicates that must all hold; ``bias`` are elements, each
    with its factor, that are added; ``shifts`` says that a constant was left out.
    """

    visible: list[Any] = field(default_factory=list)
    bias: list[tuple[Element, float]] = field(default_factory=list)
    shifts: bool = False

    def join(self, other: Effect) -> Effect:
        return Effect(
            self.visible + other.visible, self.bias + other.bias, self.shifts or other.shifts
        )


def read_term(tensors: SymbolicTensors, axes: Axes, term: MaskTerm) -> Effect:
    """What one term of an attention does to its logits.

    Raises:
        NotUnderstood, Mutated: as the reader.
    """
    node, index = term.where.node, term.where.index
    value = tensor_of(node)
    if value is None:
        raise NotUnderstood(f"{node.name} is not a tensor")
    if term.kind == "add" and value.dtype != torch.bool:
        if not value.dtype.is_floating_point:
            raise NotUnderstood(f"a mask of {value.dtype}")
        return _Walk(tensors, axes).walk(node, index, term.factor)
    if term.kind == "add":
        raise NotUnderstood(f"{node.name} is a bool that is added")
    truth = as_bool(tensors.evaluate(node, index))
    return Effect([truth if term.kind == "keep" else neg(truth)])


def summands(
    tensors: SymbolicTensors, axes: Axes, element: Element, factor: float
) -> list[tuple[Element, float]] | None:
    """The biases that an element is the sum of; None if it is no sum, or hides something."""
    parts = _Walk(tensors, axes)._parts(element.node, element.index, factor)
    if parts is None or parts.visible or parts.bias == [(element, factor)]:
        return None
    return parts.bias


class _Walk:
    def __init__(self, tensors: SymbolicTensors, axes: Axes) -> None:
        self.tensors, self.axes = tensors, axes

    def walk(self, node: fx.Node, index: Index, factor: float) -> Effect:
        """The effect of adding ``factor * node[index]``."""
        value: Any = self.tensors.evaluate(node, index)
        dtype = self.tensors.dtype(node)
        if isinstance(value, sympy.Integer):
            value = float(value)
        if isinstance(value, float):
            value = Choice(sympy.true, value, value)
        if isinstance(value, Choice):
            known = _constants(value, factor, dtype)
            return known or Effect(bias=[(Element(node, index), factor)])
        if is_bool(value):
            raise NotUnderstood(f"{node.name} is a bool that is added")
        parts = self._parts(node, index, factor)
        if parts is None or not parts.visible:
            # Nothing is hidden by it: the node itself is the bias, computed as the graph does.
            return Effect(bias=[(Element(node, index), factor)])
        return parts

    def _parts(self, node: fx.Node, index: Index, factor: float) -> Effect | None:
        """The effect of the operands of a node, or None if it is no sum, choice or copy."""
        name = operation(node) or ""
        step = _STEPS.get(name)
        try:
            if step is not None:
                return step(self, node, index, factor)
            if name in VIEWS:
                return self.walk(*VIEWS[name](self.tensors, node, index), factor)
        except NotUnderstood:
            return None
        return None

    def _operand(self, node: fx.Node, operand: Any, index: Index, factor: float) -> Effect:
        if not isinstance(operand, fx.Node) or tensor_of(operand) is None:
            if isinstance(operand, int | float):
                return _constants(
                    Choice(sympy.true, float(operand), float(operand)),
                    factor,
                    self.tensors.dtype(node),
                ) or Effect(shifts=True)
            raise NotUnderstood(f"an operand of {node.name} is no tensor")
        shape, outer = self.tensors.shape(operand), self.tensors.shape(node)
        for size, full in zip(reversed(shape), reversed(outer), strict=False):
            if size not in (1, full):
                raise NotUnderstood(f"sizes {size} and {full} of {operand.name} may differ")
        if not self.tensors.dtype(operand).is_floating_point:
            raise NotUnderstood(
                f"{operand.name} is a sum's operand of {self.tensors.dtype(operand)}"
            )
        return self.walk(operand, index[len(index) - len(shape) :], factor)

    def _sum(self, node: fx.Node, index: Index, factor: float, sign: float = 1.0) -> Effect:
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
            raise NotUnderstood("a scaled sum")
        if abs(factor) > _MOST:
            raise NotUnderstood("a sum that is scaled up, whose parts may hide and cancel")
        left, right = argument(node, 0, "input"), argument(node, 1, "other")
        first = self._operand(node, left, index, factor)
        return first.join(self._operand(node, right, index, sign * factor))

    def _difference(self, node: fx.Node, index: Index, factor: float) -> Effect:
        return self._sum(node, index, factor, -1.0)

    def _product(self, node: fx.Node, index: Index, factor: float) -> Effect:
        left, right = argument(node, 0, "input"), argument(node, 1, "other")
        for scaled, by in ((left, right), (right, left)):
            number = self._number(node, by, index)
            if number is not None and math.isfinite(number):
                return self._operand(node, scaled, index, factor * number)
        raise NotUnderstood("a product of two tensors")

    def _quotient(self, node: fx.Node, index: Index, factor: float) -> Effect:
        number = self._number(node, argument(node, 1, "other"), index)
        if not number or not math.isfinite(number) or "rounding_mode" in node.kwargs:
            raise NotUnderstood("a quotient of two tensors")
        return self._operand(node, argument(node, 0, "input"), index, factor / number)

    def _number(self, node: fx.Node, operand: Any, index: Index) -> float | None:
        if isinstance(operand, bool):
            return None
        if isinstance(operand, int | float):
            return float(operand)
        if isinstance(operand, fx.Node) and tensor_of(operand) is not None:
            value = self.tensors.operand(node, operand, index)
            if isinstance(value, float | sympy.Integer):
                return float(value)
        return None

    def _where(self, node: fx.Node, index: Index, factor: float) -> Effect:
        if node.op == "call_method" or len(node.args) != 3:
            raise NotUnderstood("where by another spelling")
        cond, yes, no = node.args
        return self._choice(node, index, factor, cond, yes, no)

    def _masked_fill(self, node: fx.Node, index: Index, factor: float) -> Effect:
        kept, cond, filled = (
            argument(node, n, s) for n, s in enumerate(("input", "mask", "value"))
        )
        return self._choice(node, index, factor, cond, filled, kept)

    def _choice(
        self, node: fx.Node, index: Index, factor: float, cond: Any, yes: Any, no: Any
    ) -> Effect:
        """A choice that hides on one side is visibility and whatever the other side is."""
        truth = self.tensors.truth(cond, node, index)
        for hidden, other, shown in ((yes, no, neg(truth)), (no, yes, truth)):
            number = self._number(node, hidden, index)
            if number is not None and hides(number, factor, self.tensors.dtype(node)):
                rest = self._operand(node, other, index, factor)
                return Effect([shown]).join(rest)
        raise NotUnderstood("a choice that hides nothing")

    def _cast(self, node: fx.Node, index: Index, factor: float) -> Effect:
        return self._operand(node, argument(node, 0, "input"), index, factor)


_STEPS: dict[str, Any] = {
    **dict.fromkeys(("add", "__add__", "__radd__"), _Walk._sum),
    **dict.fromkeys(("sub", "subtract", "__sub__"), _Walk._difference),
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), _Walk._product),
    **dict.fromkeys(("div", "truediv", "true_divide", "__truediv__"), _Walk._quotient),
    "where": _Walk._where,
    "masked_fill": _Walk._masked_fill,
    **dict.fromkeys(MOVES, _Walk._cast),
}


def _constants(value: Choice, factor: float, dtype: torch.dtype) -> Effect | None:
    """The effect of one of two constants; None if both are seen and differ."""
    never, always = value.cond is sympy.false, value.cond is sympy.true
    seen = [float(v) for v in (value.no if never else value.yes, value.yes if always else value.no)]
    if any(v != v for v in seen) or any(v * factor == math.inf for v in seen):
        raise NotUnderstood("an additive value is NaN or infinite")
    hidden = [hides(v, factor, dtype) for v in seen]
    if all(hidden):
        return Effect([sympy.false])
    if not any(hidden):
        return Effect(shifts=seen[0] != 0) if seen[0] == seen[1] else None
    shift = seen[1] if hidden[0] else seen[0]
    return Effect([neg(value.cond) if hidden[0] else value.cond], shifts=shift != 0)
