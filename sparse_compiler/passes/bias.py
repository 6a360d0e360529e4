"""What is added to the logits, sorted by what it depends on."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_compiler.passes.form import Axes, Element
from sparse_compiler.passes.symbolic_tensor import NotUnderstood, SymbolicTensors

__all__ = ["Bias", "classify"]


@dataclass(frozen=True)
class Bias:
    """``factor * where`` is added to the logits.

    Args:
        where: the element at (b, h, q, k); the query stands in it only if ``by_row``.
        factor: of the element.
        by_row: it depends on row and key.
        by_distance: it depends on the row and key by ``k - q`` alone (and perhaps the head).
    """

    where: Element
    factor: float = 1.0
    by_row: bool = False
    by_distance: bool = False


def classify(
    tensors: SymbolicTensors, axes: Axes, found: list[tuple[Element, float]]
) -> tuple[tuple[Bias, ...], bool]:
    """The biases, and whether some were left out because they are the same for a row's keys.

    Raises:
        NotUnderstood: one ties rows to keys by data.
    """
    kept, shifts = [], False
    for element, factor in found:
        value = tensors.evaluate(element.node, element.index)
        free = value.free_symbols
        if axes.key not in free:
            shifts = True
        elif axes.query not in free:
            index = tuple(i.xreplace({axes.query: axes.query * 0}) for i in element.index)
            kept.append(Bias(Element(element.node, index), factor))
        else:
            raise NotUnderstood(f"the bias {element.node.name} ties rows to keys")
    return tuple(kept), shifts
