"""The one normal form that every spelling of attention is read as.

An attention is written over six index symbols, ``Axes``. A tensor of the graph takes part in it as an
``Element``: which element of which node stands at (b, h, q, k). Layouts, merged or split head
dimensions, repeated heads and broadcasting are all in that index, so later passes know nothing of
spellings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import sympy
from torch import fx

__all__ = ["AttentionForm", "Axes", "Element", "MaskTerm"]

Index = tuple[sympy.Expr, ...]


@dataclass(frozen=True)
class Axes:
    """Index symbols of one attention and how far they run.

    Args:
        batch, head, query, key: symbols of b < B, h < Hq, q < Lq, k < Lk.
        dim, value_dim: symbols of d < D, v < Dv.
        sizes: B, Hq, Lq, Lk, D, Dv as expressions.
    """

    batch: sympy.Symbol
    head: sympy.Symbol
    query: sympy.Symbol
    key: sympy.Symbol
    dim: sympy.Symbol
    value_dim: sympy.Symbol
    sizes: Index

    @property
    def pairs(self) -> tuple[tuple[sympy.Symbol, sympy.Expr], ...]:
        """(symbol, size) of b, h, q, k."""
        symbols = (self.batch, self.head, self.query, self.key)
        return tuple(zip(symbols, self.sizes[:4], strict=True))


@dataclass(frozen=True)
class Element:
    """``node[index]``, the index written in the symbols of ``Axes``; 0 where the size is 1."""

    node: fx.Node
    index: Index


@dataclass(frozen=True)
class MaskTerm:
    """One thing done to the logits after scale and soft cap.

    Args:
        kind: ``add``: the element times ``factor`` is added. ``keep``: the pair is visible only
            where the element (bool) is True. ``drop``: only where it is False.
        where: the element at (b, h, q, k).
        factor: of an added element.
    """

    kind: Literal["add", "keep", "drop"]
    where: Element
    factor: float = 1.0


@dataclass(frozen=True)
class AttentionForm:
    """``softmax(softcap(scale * q kᵀ) + terms) v`` as it stands in the graph.

    Args:
        axes: of this attention.
        query: q[b, h, q, d].  key: k[b, h, k, d].  value: v[b, h, k, v].
        output: what the replaced node holds at (b, h, q, v).
        terms: masks and biases.
        is_causal: row i sees keys j <= i, beside the terms.
        scale: float, a node holding a SymFloat, or None for 1 / sqrt(D).
        dropout: probability, or a node.
        softcap: 0 for none.
        sinks: an extra logit s[h] that takes part in the softmax and has no value.
        factors: elements over (b, h, q) that multiply the scores, beside the scale; True: divide.
        spelling: the matcher's name for reports, e.g. ``sdpa`` or ``softmax chain``.
        inner: nodes between the operands and the output that nobody else reads.
        log_sums: nodes that hold the logarithm of the softmax's denominator at (b, h, q).
        obstacle: why the form cannot be rewritten although it was recognised, ("", "") if it can.
    """

    axes: Axes
    query: Element
    key: Element
    value: Element
    output: Element
    terms: tuple[MaskTerm, ...] = ()
    is_causal: bool = False
    scale: Any = None
    dropout: Any = 0.0
    softcap: float = 0.0
    sinks: Element | None = None
    factors: tuple[tuple[Element, bool], ...] = ()
    spelling: str = "sdpa"
    inner: tuple[fx.Node, ...] = ()
    log_sums: tuple[Element, ...] = ()
    obstacle: tuple[str, str] = field(default=("", ""))
