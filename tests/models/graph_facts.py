"""What a graph shows without the passes: calls that are attention, and tensors with one value a pair."""

from __future__ import annotations

import re

import torch
from shrink import HIDDEN, VOCAB
from torch import fx

from sparse_compiler.ir.report import Report

__all__ = ["attention_like", "pair_tensors"]

_ATTENTION = (
    "scaled_dot_product_attention",
    "flex_attention",
    "multi_head_attention_forward",
    "native_multi_head_attention",
    "transformer_encoder_layer_fwd",
)
# A softmax over fewer values chooses among experts or streams, never among the zoo's keys.
_FEWEST_KEYS = 9


def attention_like(gm: fx.GraphModule) -> int:
    """How many nodes are attention calls or softmaxes over keys, the last dimension of a tensor."""
    return sum(_is_attention(node) or _is_key_softmax(node) for node in gm.graph.nodes)


def _target(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        return getattr(node.target, "__name__", "") or str(node.target)
    return ""


def _is_attention(node: fx.Node) -> bool:
    return any(name in _target(node) for name in _ATTENTION)


def _is_key_softmax(node: fx.Node) -> bool:
    name = _target(node)
    if name.split(".")[0] not in ("softmax", "_softmax"):
        return False
    value = _value(node)
    if value is None or value.dim() < 3:
        return False
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else -1)
    if not isinstance(dim, int) or dim % value.dim() != value.dim() - 1:
        return False
    keys = value.shape[-1]
    return not isinstance(keys, int) or (keys >= _FEWEST_KEYS and keys != VOCAB)


def _value(node: fx.Node) -> torch.Tensor | None:
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, torch.Tensor) else None


def pair_tensors(gm: fx.GraphModule, report: Report) -> list[str]:
    """Nodes that hold a truth value for each query and key of some site, as ``name dtype shape``.

    Additive masks are made of bool ones; scores of linear attention and biases are no masks. Only for sizes that nothing else in the model has; views that repeat one row or column hold no
    such tensor.
    """
    pairs = set()
    for site in report.sites:
        query, key = (_sizes(site.shapes[part]) for part in ("query", "key"))
        if len(query) == len(key) == 4:
            pairs.add((query[2], key[2]))
    pairs = {p for p in pairs if min(p) > _FEWEST_KEYS and not {HIDDEN, 16, 32} & set(p)}
    found = []
    for node in gm.graph.nodes:
        value = _value(node)
        if node.op in ("placeholder", "output") or value is None or value.dim() < 2:
            continue
        if any(not isinstance(size, int) for size in value.shape[-2:]):
            continue
        of_pairs = tuple(value.shape[-2:]) in pairs and all(value.stride()[-2:])
        if of_pairs and value.dtype == torch.bool:
            found.append(f"{node.name} {value.dtype} {list(value.shape)}")
    return found


def _sizes(text: str) -> list[int]:
    parts = re.findall(r"[^\[\], ]+", text)
    return [int(p) for p in parts] if all(p.isdecimal() for p in parts) else []
