"""``F.scaled_dot_product_attention`` and its aten overloads, in every argument form and rank."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.ir.report import Code
from sparse_compiler.passes.axes import attention_axes, unread_form
from sparse_compiler.passes.form import AttentionForm, Element, MaskTerm
from sparse_compiler.passes.layout import substituted
from sparse_compiler.passes.products import broadcast
from sparse_compiler.passes.symbolic_reader import Index, tensor_of
from sparse_compiler.passes.symbolic_tensor import NotUnderstood, SymbolicTensors
from sparse_compiler.passes.symbolic_values import floor_divide

__all__ = ["fix_sizes", "is_sdpa", "match_sdpa", "sdpa_arguments", "sdpa_form"]


def _signature(
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


_SDPA = inspect.signature(_signature)
_TARGETS = (
    torch.nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
# What a flag that is not known leaves unknown.
_FLAGS = {"is_causal": Code.MASK_UNKNOWN, "enable_gqa": Code.SHAPES}


def is_sdpa(node: fx.Node) -> bool:
    """Whether ``node`` calls PyTorch's scaled-dot-product attention."""
    return node.op == "call_function" and node.target in _TARGETS


def sdpa_arguments(node: fx.Node) -> dict[str, Any]:
    """The call's arguments by name, defaults included."""
    bound = _SDPA.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def match_sdpa(node: fx.Node, tensors: SymbolicTensors) -> AttentionForm | None:
    """The form of a call of SDPA; with an obstacle where its shapes say too little."""
    if not is_sdpa(node):
        return None
    given = sdpa_arguments(node)
    operands = [given[name] for name in ("query", "key", "value")]
    if not all(isinstance(o, fx.Node) and tensor_of(o) is not None for o in operands):
        return unread_form(
            node, node, tensors, (Code.SHAPES, "the graph does not say what q, k and v are")
        )
    for name, code in _FLAGS.items():
        if isinstance(given[name], fx.Node):
            # A graph made by hand may compute it: the value is not known before the run.
            reason = f"{name} is computed by the graph ({given[name].name})"
            return unread_form(node, node, tensors, (code, reason))
    try:
        return sdpa_form(node, given, tensors)
    except NotUnderstood as reason:
        return unread_form(node, node, tensors, (Code.SHAPES, str(reason)))


def sdpa_form(node: fx.Node, given: dict[str, Any], tensors: SymbolicTensors) -> AttentionForm:
    """The form of the attention that ``node`` holds, called with SDPA's arguments ``given``.

    Raises:
        NotUnderstood: its shapes say too little.
    """
    query, key, value = (given[name] for name in ("query", "key", "value"))
    _fix_sizes(query, key, value)
    shape = tensors.shape(node)
    keys = tensors.shape(key)
    if min(len(shape), len(keys), len(tensors.shape(value))) < 2:
        raise NotUnderstood(f"q, k and v have ranks {len(shape)}, {len(keys)}")
    rows = tuple(tensors.new_index(f"x{n}", size) for n, size in enumerate(shape[:-2]))
    dim = tensors.shape(query)[-1]
    names = zip("qkdv", (shape[-2], keys[-2], dim, shape[-1]), strict=True)
    q, k, d, v = (tensors.new_index(name, size) for name, size in names)
    elements = (
        broadcast(query, (*rows, q, d), tensors),
        _shared(key, (*rows, k, d), shape, given, tensors),
        _shared(value, (*rows, k, v), shape, given, tensors),
        Element(node, (*rows, q, v)),
    )
    terms = _terms(given["attn_mask"], (*rows, q, k), tensors)
    batch = list(zip(rows, shape[:-2], strict=True))
    sizes = (shape[-2], keys[-2], dim, shape[-1])
    made = attention_axes(batch, (q, k, d, v), sizes, elements[:3], tensors)
    if made is None:
        raise NotUnderstood(f"which dimensions of {shape} are heads")
    axes, mapping = made
    first, second, third, output = (substituted(e, mapping, tensors) for e in elements)
    return AttentionForm(
        axes=axes,
        query=first,
        key=second,
        value=third,
        output=output,
        terms=tuple(MaskTerm(t.kind, substituted(t.where, mapping, tensors)) for t in terms),
        is_causal=bool(given["is_causal"]),
        scale=given["scale"],
        dropout=given["dropout_p"],
        spelling="sdpa",
    )


def fix_sizes(graph: fx.Graph) -> None:
    """Guards of every call of SDPA, before any form is read.

    A guard makes two symbols one, and a form that was read before would keep the old one.
    """
    for node in graph.nodes:
        if not is_sdpa(node):
            continue
        given = sdpa_arguments(node)
        operands = [given[name] for name in ("query", "key", "value")]
        if all(isinstance(o, fx.Node) and tensor_of(o) is not None for o in operands):
            with suppress(NotUnderstood):
                _fix_sizes(*operands)


def _fix_sizes(query: fx.Node, key: fx.Node, value: fx.Node) -> None:
    """Guards: heads and head sizes are constants of a model, and sizes that must agree do."""
    q, k, v = (tensor_of(n) for n in (query, key, value))
    assert q is not None
    assert k is not None
    assert v is not None
    for tensor in (q, k, v):
        for size in (*tensor.shape[1:-2], tensor.shape[-1]):
            int(size)
    agree = q.shape[-1] == k.shape[-1] and k.shape[-2] == v.shape[-2]
    if min(q.dim(), k.dim(), v.dim()) > 2:
        agree = agree and all(t.shape[0] == 1 or t.shape[0] == q.shape[0] for t in (k, v))
    if not agree:
        raise NotUnderstood(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")


def _shared(
    node: fx.Node, index: Index, shape: Index, given: dict[str, Any], tensors: SymbolicTensors
) -> Element:
    """The element of K or V; with ``enable_gqa`` heads share it in groups."""
    if given["enable_gqa"] and len(index) > 2:
        heads, own = shape[-3], tensors.shape(node)[-3]
        groups = heads / own
        if not isinstance(groups, sympy.Integer):
            raise NotUnderstood(f"{heads} query heads do not share {own} key heads evenly")
        index = (*index[:-3], floor_divide(index[-3], groups), *index[-2:])
    return broadcast(node, index, tensors)


def _terms(mask: Any, index: Index, tensors: SymbolicTensors) -> list[MaskTerm]:
    if not isinstance(mask, fx.Node):
        return []
    is_bool = tensors.dtype(mask) == torch.bool
    return [MaskTerm("keep" if is_bool else "add", broadcast(mask, index, tensors))]
