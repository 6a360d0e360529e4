"""An attention site: what the matcher found, before anybody decided anything."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

__all__ = ["AttentionSite", "Operand", "Step", "example_of", "tensor_of"]

Step = tuple[str, tuple[Any, ...]]
"""A tensor method and its arguments, e.g. ``("transpose", (1, 2))``."""


def example_of(node: fx.Node) -> Any:
    """The fake value that tracing left on ``node``, in Dynamo's or in export's place; or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def tensor_of(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor that tracing left on ``node``, or None."""
    value = example_of(node)
    return value if isinstance(value, torch.Tensor) else None


@dataclass(frozen=True)
class Operand:
    """A tensor of the rewritten graph: a node of the graph, seen through views.

    Args:
        node: a tensor node.
        steps: views applied to it, one after the other.
    """

    node: fx.Node
    steps: tuple[Step, ...] = ()

    @cached_property
    def example(self) -> torch.Tensor:
        """The fake tensor that the steps make of the node's."""
        value = tensor_of(self.node)
        if value is None:
            raise TypeError(f"{self.node.name} holds no tensor")
        for method, arguments in self.steps:
            value = getattr(value, method)(*arguments)
        return value

    @property
    def shape(self) -> torch.Size:
        return self.example.shape


@dataclass(frozen=True)
class AttentionSite:
    """One scaled-dot-product attention in a graph; shapes may hold SymInts.

    Args:
        node: the node whose output is replaced.
        query: [B, Hq, Lq, D].  key: [B, Hkv, Lk, D].  value: [B, Hkv, Lk, Dv]; key and value before
            any repetition over heads.
        output: views from [B, Hq, Lq, Dv] to what ``node`` holds.
        masked: something beside ``is_causal`` hides pairs or is added to the logits.
        is_causal: the causal flag of the call (aligned to row 0 and key 0).
        scale: multiplies the scores; a float once the graph's guards fix it.
        factors: tensors [B|1, Hq|1, Lq|1, 1] that multiply the scores too; True: that divide them.
        groups: query heads per key head.
        dropout: probability, 0 at inference.
        softcap: tanh soft cap of the scores, 0 for none.
        sinks: [Hq], an extra logit of each head without a value, or None.
        log_sums: nodes that hold the log-sum-exp of the logits, and views to them from [B, Hq, Lq].
        spelling: how the attention is written in the graph, e.g. ``sdpa``.
        layer: index parsed from the module path, or None where unknown.
        path: module path, or "" where unknown.
        source: file and line of the call, or "".
        head_offset, global_heads: placement of the local query heads under tensor parallelism;
            (0, Hq) when the graph shows plain local tensors of a whole model.
    """

    node: fx.Node
    query: Operand
    key: Operand
    value: Operand
    output: tuple[Step, ...]
    masked: bool
    is_causal: bool
    scale: float
    factors: tuple[tuple[Operand, bool], ...]
    groups: int
    dropout: float
    softcap: float
    sinks: Operand | None
    log_sums: tuple[tuple[fx.Node, tuple[Step, ...]], ...]
    spelling: str
    layer: int | None
    path: str
    source: str
    head_offset: int
    global_heads: int

    @property
    def anchor(self) -> fx.Node:
        """Where the attention is first read: it has to be computed before this node."""
        return min((self.node, *(node for node, _ in self.log_sums)))

    @property
    def query_shape(self) -> tuple[int, ...]:
        """[B, Hq, Lq, D]; B and Lq may be SymInts."""
        return _fixed(self.query)

    @property
    def key_shape(self) -> tuple[int, ...]:
        """[B, Hkv, Lk, D]; B and Lk may be SymInts."""
        return _fixed(self.key)


def _fixed(operand: Operand) -> tuple[int, ...]:
    batch, heads, length, size = operand.shape
    return batch, int(heads), length, int(size)
