"""What is added to the logits, sorted by what it depends on."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from sparse_compiler.ir.mask import MaskFact
from sparse_compiler.passes.distance import by_distance, is_computed, line_of, symbols_of, trace
from sparse_compiler.passes.form import Axes, Element
from sparse_compiler.passes.grid import Place, call, emit_element, full
from sparse_compiler.passes.scores import is_score
from sparse_compiler.passes.symbolic_reader import described
from sparse_compiler.passes.symbolic_tensor import NotUnderstood, SymbolicTensors

__all__ = ["Bias", "classify", "emit_bias"]


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


Parts = list[tuple[Element, float]]
Split = Callable[[Element, float], Parts | None]


def classify(
    tensors: SymbolicTensors, axes: Axes, found: Parts, split: Split
) -> tuple[tuple[Bias, ...], bool]:
    """The biases, and whether some were left out because they are the same for a row's keys.

    Args:
        split: the summands of an element, each with its factor; None if it is no sum.
    Raises:
        NotUnderstood: one ties rows to keys by data.
    """
    kept: list[Bias] = []
    shifts = False
    work = list(found)
    while work:
        element, factor = work.pop(0)
        tree = trace(tensors, element.node, element.index)
        free = symbols_of(tree)
        if axes.key not in free:
            shifts = True
        elif axes.query not in free:
            first_row = {axes.query: sympy.Integer(0)}
            index: Any = tuple(sympy.sympify(i.xreplace(first_row)) for i in element.index)
            kept.append(Bias(Element(element.node, index), factor))
        elif by_distance(axes, tree):
            kept.append(Bias(element, factor, by_row=True, by_distance=True))
        elif is_computed(tensors, tree) or is_score(tensors, element.node):
            kept.append(Bias(element, factor, by_row=True))
        else:
            parts = split(element, factor)
            if parts is None:
                raise NotUnderstood(_refusal(element.node))
            work = parts + work
    return tuple(kept), shifts


def _refusal(node: fx.Node) -> str:
    source = node
    while source.op != "placeholder" and len(source.all_input_nodes) == 1:
        source = source.all_input_nodes[0]
    if source.op == "placeholder":
        return (
            f"the mask or bias {source.name} is an input that says something of each pair of row and"
            " key, which cannot be known; pass a padding mask [B, Lk] instead"
        )
    return f"the bias {described(node)} ties rows to keys by data"


def emit_bias(place: Place, fact: MaskFact) -> fx.Node | None:
    """``bias``: floating [B|1, Hq|1, Lq|1, Lk], or a table by distance [Hq|1, Lq + Lk - 1]."""
    if not fact.bias:
        return None
    graph, tensors, axes, size_of = place.graph, place.tensors, place.axes, place.size_of
    table = all(bias.by_distance for bias in fact.bias)
    found = []
    for bias in fact.bias:
        where = bias.where
        if table:
            node = line_of(place, where)
        else:
            node = emit_element(graph, tensors, where.node, where.index, axes.pairs, size_of)
        found.append(node if bias.factor == 1 else call(graph, operator.mul, node, bias.factor))
    total = functools.reduce(lambda a, b: call(graph, operator.add, a, b), found)
    return total if table else full(graph, total, axes.pairs[3], size_of)
