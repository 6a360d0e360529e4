"""An attention site: what the matcher found, before anybody decided anything."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

__all__ = ["AttentionSite"]


@dataclass(frozen=True)
class AttentionSite:
    """One scaled-dot-product attention in a graph; shapes may hold SymInts.

    Args:
        node: the node whose output is replaced.
        query: [B, Hq, Lq, D].  key: [B, Hkv, Lk, D].  value: [B, Hkv, Lk, Dv]; key and value are
            the nodes before any repetition over heads.
        mask: node of the mask argument, or None.
        is_causal: the causal flag of the call (aligned to row 0 and key 0).
        scale: multiplies the scores; a float once the graph's guards fix it.
        groups: query heads per key head.
        dropout: probability, 0 at inference.
        softcap: tanh soft cap of the scores, 0 for none.
        layer: index parsed from the module path, or None where unknown.
        path: module path, or "" where unknown.
        source: file and line of the call, or "".
        head_offset, global_heads: placement of the local query heads under tensor parallelism;
            (0, Hq) when the graph shows plain local tensors of a whole model.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    is_causal: bool
    scale: float
    groups: int
    dropout: float
    softcap: float
    layer: int | None
    path: str
    source: str
    head_offset: int
    global_heads: int

    @property
    def query_shape(self) -> tuple[int, ...]:
        """[B, Hq, Lq, D]; B and Lq may be SymInts."""
        return _fixed(self.query)

    @property
    def key_shape(self) -> tuple[int, ...]:
        """[B, Hkv, Lk, D]; B and Lk may be SymInts."""
        return _fixed(self.key)


def _fixed(node: fx.Node) -> tuple[int, ...]:
    batch, heads, length, size = node.meta["example_value"].shape
    return batch, int(heads), length, int(size)
