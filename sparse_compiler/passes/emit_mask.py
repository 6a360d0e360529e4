"""The operands of the operators that say what a proved mask means."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.ir.mask import MaskFact
from sparse_compiler.ir.site import AttentionSite
from sparse_compiler.passes.bias import Bias
from sparse_compiler.passes.form import Axes
from sparse_compiler.passes.grid import call, emit, emit_element
from sparse_compiler.passes.layout import Wanted, layout
from sparse_compiler.passes.sizes import SizeMissing, size_node
from sparse_compiler.passes.symbolic_tensor import SymbolicTensors

__all__ = ["MaskEmitter", "MaskOperands"]


@dataclass(frozen=True)
class MaskOperands:
    """Arguments of ``select`` and ``attend``, see ``ops``; nodes, ints or None.

    Args:
        causal: no row sees a later key, whatever the other operands hide.
    """

    rows: Any
    key_mask: Any
    bounds: Any
    bias: Any
    q_offset: Any
    left: Any
    right: Any
    causal: bool

    @property
    def band(self) -> tuple[Any, ...]:
        """In the order of the operators' arguments."""
        return (
            *(self.rows, self.key_mask, self.bounds, self.bias),
            *(self.q_offset, self.left, self.right),
        )


class MaskEmitter:
    """Emits the operands of one graph's masks; layers that share a mask share them.

    Args:
        graph, tensors: the graph and its reader. Sites are to be asked for in graph order, since an
            operand is computed where it is first needed.
    """

    def __init__(self, graph: fx.Graph, tensors: SymbolicTensors) -> None:
        self.graph, self.tensors = graph, tensors
        self._known: dict[Any, MaskOperands] = {}
        self._sizes: dict[Any, Any] = {}

    def operands(self, axes: Axes, fact: MaskFact, site: AttentionSite) -> MaskOperands:
        """Nodes at the insertion point.

        Raises:
            SizeMissing, NotUnderstood: something in the fact cannot be computed from the graph.
        """
        key = (axes, fact, site.query.example.device)
        if key not in self._known:
            self._known[key] = _Site(self, axes, fact, site).operands()
        return self._known[key]

    def size(self, expr: Any) -> Any:
        """An int or a node for a size expression; nodes are shared."""
        if expr not in self._sizes:
            self._sizes[expr] = size_node(self.graph, expr)
        return self._sizes[expr]


class _Site:
    """The mask operands of one site."""

    def __init__(
        self, owner: MaskEmitter, axes: Axes, fact: MaskFact, site: AttentionSite
    ) -> None:
        self.owner, self.axes, self.fact = owner, axes, fact
        self.graph, self.tensors = owner.graph, owner.tensors
        self.site = site
        self.device = site.query.example.device

    def operands(self) -> MaskOperands:
        fact, band = self.fact, self.fact.band
        rows, q_offset = (
            self._rows() if fact.offset_is_read else (None, self._plain(band.q_offset))
        )
        return MaskOperands(
            rows=rows,
            key_mask=self._key_mask(),
            bounds=self._bounds(),
            bias=self._bias(),
            q_offset=q_offset,
            left=-1 if band.left is None else self._plain(band.left),
            right=-1 if band.right is None else self._plain(band.right),
            causal=band.causal,
        )

    def _plain(self, expr: Any) -> Any:
        return self.owner.size(expr)

    def _emit(self, value: Any, *names: str) -> fx.Node:
        pairs = dict(zip("bhqk", self.axes.pairs, strict=True))
        return emit(
            self.graph,
            self.tensors,
            value,
            [pairs[name] for name in names],
            self.owner.size,
            self.device,
        )

    def _rows(self) -> tuple[fx.Node, Any]:
        """Rows whose offset the graph computes, and a bound of it that the host knows.

        An offset beyond the last key shows all keys to every row, and so does Lk - 1.
        """
        band, (batch, _, num_q, num_k) = self.fact.band, self.axes.sizes[:4]
        if band.left is not None or band.right != 0:
            raise SizeMissing(f"a window whose place {band.q_offset} is known at run time only")
        offset = call(self.graph, "clamp", self._emit(band.q_offset), max=self._plain(num_k - 1))
        numbers = [0, self._plain(num_q), offset, 0, self._plain(num_k)]
        scalars = [
            n if n is offset else call(
                self.graph, torch.full, (), n, dtype=torch.int64, device=self.device
            )
            for n in numbers
        ]  # fmt: skip
        rows = call(self.graph, torch.stack, scalars)
        rows = call(self.graph, "to", rows, torch.int32)
        rows = call(self.graph, "expand", rows, self._plain(batch), 5)
        return call(self.graph, "contiguous", rows), self._plain(num_k - 1)

    def _key_mask(self) -> fx.Node | None:
        if self.fact.key_padding is None:
            return None
        if isinstance(self.fact.key_padding, str):
            mask = next(n for n in self.graph.nodes if n.name == self.fact.key_padding)
            if not self.fact.key_padding_is_bool:
                mask = call(self.graph, "to", mask, torch.bool)
        else:
            mask = self._emit(self.fact.key_padding, "b", "k")
        batch, num_k = self._plain(self.axes.sizes[0]), self._plain(self.axes.sizes[3])
        return call(self.graph, "expand", mask, batch, num_k)

    def _bounds(self) -> fx.Node | None:
        fact = self.fact
        if not fact.bounded:
            return None
        low = sympy.Integer(0) if fact.low is None else fact.low
        high = self.axes.sizes[3] - 1 if fact.high is None else fact.high
        ends = call(
            self.graph,
            torch.broadcast_tensors,
            self._emit(low, "b", "q"),
            self._emit(high, "b", "q"),
        )
        pair = [call(self.graph, operator.getitem, ends, n) for n in (0, 1)]
        bounds = call(self.graph, torch.stack, pair, -1)
        bounds = call(self.graph, "to", bounds, torch.int32)
        return call(self.graph, "expand", bounds, -1, self._plain(self.axes.sizes[2]), 2)

    def _bias(self) -> fx.Node | None:
        """The sum of the biases, [B|1, H|1, Lq|1, Lk], or a table by distance."""
        total = None
        for bias in self.fact.bias:
            part = self._one_bias(bias)
            total = part if total is None else call(self.graph, operator.add, total, part)
        return total

    def _one_bias(self, bias: Bias) -> fx.Node:
        axes, element = self.axes, bias.where
        symbols = (axes.batch, axes.head, axes.query, axes.key)
        wanted = Wanted(symbols, axes.sizes[:4], head=1, optional=(0, 1, 2))
        found = layout(element, wanted, self.tensors, self.site.node, self.site.node)
        if found is not None:
            node = found[0].node
            for method, arguments in found[0].steps:
                node = call(self.graph, method, node, *arguments)
        else:
            node = emit_element(
                self.graph, self.tensors, element.node, element.index, axes.pairs, self.owner.size
            )
        return node if bias.factor == 1.0 else call(self.graph, operator.mul, node, bias.factor)
