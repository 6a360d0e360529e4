"""The operands of the operators that say what a proved mask means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparse_compiler.ir.mask import MaskFact
from sparse_compiler.ir.site import AttentionSite
from sparse_compiler.passes.bias import emit_bias
from sparse_compiler.passes.emit_mask import emit_bounds, emit_padding
from sparse_compiler.passes.form import Axes
from sparse_compiler.passes.grid import Place, call
from sparse_compiler.passes.sizes import SizeMissing, size_node
from sparse_compiler.passes.symbolic_tensor import SymbolicTensors

__all__ = ["MaskEmitter", "MaskOperands"]


@dataclass(frozen=True)
class MaskOperands:
    """Arguments of ``select`` and ``attend``, see ``ops``; nodes, ints or None.

    Args:
        banded: as of ``MaskFact``.
    """

    rows: Any
    key_mask: Any
    bounds: Any
    bias: Any
    q_offset: Any
    left: Any
    right: Any
    banded: bool

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

    def __init__(self, owner: MaskEmitter, axes: Axes, fact: MaskFact, site: AttentionSite) -> None:
        self.owner, self.axes, self.fact = owner, axes, fact
        self.graph, self.device = owner.graph, site.query.example.device
        self.place = Place(owner.graph, owner.tensors, axes, owner.size, self.device)

    def operands(self) -> MaskOperands:
        fact, band = self.fact, self.fact.band
        rows, q_offset = self._rows() if fact.offset_is_read else (None, self._plain(band.q_offset))
        return MaskOperands(
            rows=rows,
            key_mask=self._key_mask(),
            bounds=emit_bounds(self.place, fact),
            bias=emit_bias(self.place, fact),
            q_offset=q_offset,
            left=-1 if band.left is None else self._plain(band.left),
            right=-1 if band.right is None else self._plain(band.right),
            banded=fact.banded,
        )

    def _plain(self, expr: Any) -> Any:
        return self.owner.size(expr)

    def _rows(self) -> tuple[fx.Node, Any]:
        """Rows whose offset the graph computes, and a bound of it that the host knows.

        An offset beyond the last key shows all keys to every row, and so does Lk - 1.
        """
        band, (batch, _, num_q, num_k) = self.fact.band, self.axes.sizes[:4]
        if band.left is not None or band.right != 0:
            raise SizeMissing(f"a window whose place {band.q_offset} is known at run time only")
        # Lower than that, too, no row sees a key; either way it fits 32 bits.
        offset = call(
            self.graph, "clamp", self.place.emit(band.q_offset, ""), min=self._plain(-num_q)
        )
        offset = call(self.graph, "clamp", offset, max=self._plain(num_k - 1))
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
        mask = emit_padding(self.place, self.fact)
        if mask is None:
            return None
        return call(self.graph, "expand", mask, self._plain(self.axes.sizes[0]), -1)
