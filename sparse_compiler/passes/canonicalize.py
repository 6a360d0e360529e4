"""Read each spelling of attention as one normal form; annotates, edits nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparse_compiler.ir.report import PassReport
from sparse_compiler.passes.context import META, PassContext, SiteState

__all__ = ["AttentionForm", "Matcher", "canonicalize", "match_sdpa"]


@dataclass(frozen=True)
class AttentionForm:
    """softmax(scale * q kᵀ, masked) v, with its arguments as they stand in the graph.

    Args:
        query, key, value: [B, heads, L, D]; key and value may have fewer heads if ``gqa``.
        mask: bool (True is visible) or additive, or None.
        is_causal: row i sees keys j <= i.
        scale: float, a node holding a SymFloat, or None for 1 / sqrt(D).
        dropout: probability, or a node.
        gqa: the call itself shares key heads.
        softcap: 0 for none.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    is_causal: bool
    scale: Any
    dropout: Any
    gqa: bool
    softcap: float = 0.0


Matcher = Callable[[fx.Node], AttentionForm | None]


def _sdpa_signature(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    *,
    scale: Any = None,
    enable_gqa: Any = False,
) -> None: ...


_SDPA = inspect.signature(_sdpa_signature)
_TARGETS = (
    torch.nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)


def match_sdpa(node: fx.Node) -> AttentionForm | None:
    """``F.scaled_dot_product_attention`` and its aten overload, in every argument form."""
    if node.op != "call_function" or node.target not in _TARGETS:
        return None
    bound = _SDPA.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    operands = (given["query"], given["key"], given["value"])
    if not all(isinstance(operand, fx.Node) for operand in operands):
        return None
    mask = given["attn_mask"]
    return AttentionForm(
        *operands,
        mask=mask if isinstance(mask, fx.Node) else None,
        is_causal=bool(given["is_causal"]),
        scale=given["scale"],
        dropout=given["dropout_p"],
        gqa=bool(given["enable_gqa"]),
    )


MATCHERS: tuple[Matcher, ...] = (match_sdpa,)


def canonicalize(gm: fx.GraphModule, ctx: PassContext) -> PassReport:
    """Annotate every attention node with its ``AttentionForm``."""
    found = 0
    for node in gm.graph.nodes:
        for matcher in MATCHERS:
            form = matcher(node)
            if form is not None:
                node.meta[META] = SiteState(form=form)
                found += 1
                break
    return PassReport("canonicalize", touched=found)
