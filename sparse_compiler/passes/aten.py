"""Spellings that only exported programs have, replaced by ones that the passes read, and back.

What is left of them after the passes is turned back: a declined attention keeps the operators that it
was exported with.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.grid import call
from sparse_compiler.passes.symbolic_reader import argument

__all__ = ["Spellings"]

_aten = torch.ops.aten


class Spellings:
    """The replacements in one graph; made when constructed, undone by ``restore`` where they remain."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._softmaxes: list[fx.Node] = []
        self._indices: list[fx.Node] = []
        for node in list(graph.nodes):
            if node.target is _aten.detach_.default:
                node.target = _aten.detach.default  # it writes nothing
            elif node.target is _aten.index.Tensor:
                self._index(node)
            elif node.target is _aten.where.self:
                self._safe_softmax(node)

    def restore(self) -> None:
        """Turn back what the passes have left."""
        alive = set(self.graph.nodes)
        for node in self._indices:
            if node in alive:
                node.target, (source, items) = _aten.index.Tensor, node.args
                node.args = (source, [None if isinstance(i, slice) else i for i in items])  # type: ignore[union-attr]
        for node in self._softmaxes:
            if node in alive:
                self._decompose(node)

    def _index(self, node: fx.Node) -> None:
        """``x[i, :, j]`` as Python writes it."""
        source, items = node.args
        node.target = operator.getitem
        node.args = (source, tuple(slice(None) if i is None else i for i in items))  # type: ignore[union-attr]
        self._indices.append(node)

    def _safe_softmax(self, node: fx.Node) -> None:
        """Softmax that gives zeros to rows of -inf: one operator, taken apart by export."""
        parts = list(_softmax_parts(node))
        if not parts:
            return
        source = argument(parts[-1], 0, "input")
        with self.graph.inserting_before(node):
            made = call(self.graph, _aten._safe_softmax.default, source, -1)
        made.meta = dict(node.meta)
        self._softmaxes.append(made)
        node.replace_all_uses_with(made)
        for part in parts:
            if not part.users:
                self.graph.erase_node(part)

    def _decompose(self, node: fx.Node) -> None:
        source, meta = node.args[0], node.meta
        with self.graph.inserting_before(node):
            weights = call(self.graph, _aten._softmax.default, source, -1, False)
            hidden = call(self.graph, _aten.eq.Scalar, source, -math.inf)
            seen = call(self.graph, _aten.logical_not.default, hidden)
            some = call(self.graph, _aten.any.dim, seen, -1, True)
            none = call(self.graph, _aten.logical_not.default, some)
            zeros = call(self.graph, _aten.full_like.default, weights, 0)
            result = call(self.graph, _aten.where.self, none, zeros, weights)
        result.meta.update(meta)
        node.replace_all_uses_with(result)
        self.graph.erase_node(node)


def _softmax_parts(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes of a decomposed ``_safe_softmax``, its result first and its softmax last."""
    if len(node.args) != 3:
        return
    none, zeros, weights = node.args
    chain = [none]
    for target in (_aten.logical_not.default, _aten.any.dim, _aten.logical_not.default):
        if not isinstance(chain[-1], fx.Node) or chain[-1].target is not target:
            return
        chain.append(chain[-1].args[0])
    hidden, some = chain[-1], chain[1]
    softmax = isinstance(weights, fx.Node) and weights.target is _aten._softmax.default
    if not softmax or not isinstance(hidden, fx.Node) or not isinstance(some, fx.Node):
        return
    source: Any = argument(weights, 0, "input")  # type: ignore[arg-type]
    zero = isinstance(zeros, fx.Node) and zeros.target is _aten.full_like.default
    same = (
        zero
        and zeros.args[1] == 0  # type: ignore[union-attr]
        and weights.args[1:] == (-1, False)  # type: ignore[union-attr]
        and some.args[1:] == (-1, True)
        and hidden.target is _aten.eq.Scalar
        and hidden.args == (source, -math.inf)
    )
    if same:
        yield from (node, zeros, *chain, weights)  # type: ignore[misc]
