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
from sparse_compiler.passes.opaque import is_item
from sparse_compiler.passes.sdpa import sdpa_arguments
from sparse_compiler.passes.symbolic_reader import argument, tensor_of

__all__ = ["Spellings"]

_aten = torch.ops.aten
_FUSED = frozenset(
    getattr(_aten, f"_scaled_dot_product_{name}").default
    for name in (
        *("flash_attention_for_cpu", "flash_attention", "efficient_attention"),
        *("cudnn_attention", "fused_attention_overrideable"),
    )
    if hasattr(_aten, f"_scaled_dot_product_{name}")
)


class Spellings:
    """The replacements in one graph; made when constructed, undone by ``restore`` where they remain."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._softmaxes: list[fx.Node] = []
        self._indices: list[fx.Node] = []
        # SDPA, and target, arguments by name and notes of the call in whose place it stands.
        self._fused: list[tuple[fx.Node, Any, dict[str, Any], dict[str, Any]]] = []
        for node in list(graph.nodes):
            if node.target is _aten.detach_.default:
                node.target = _aten.detach.default  # it writes nothing
            elif node.target is _aten.index.Tensor:
                self._index(node)
            elif node.target is _aten.where.self:
                self._safe_softmax(node)
            elif node.target in _FUSED:
                self._unfuse(node)

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
        for node, target, given, meta in self._fused:
            if node in alive:
                self._fuse(node, target, given, meta)

    def _fuse(self, node: fx.Node, target: Any, given: dict[str, Any], meta: Any) -> None:
        """The kernel again, with what SDPA is given by now: earlier nodes may have been replaced."""
        now = sdpa_arguments(node)
        now["attn_bias"] = now["attn_mask"]
        args, kwargs = [], {}
        for schema in target._schema.arguments:
            name = schema.name
            value = now[name] if name in now else given[name]
            if schema.kwarg_only:
                kwargs[name] = value
            else:
                args.append(value)
        with self.graph.inserting_before(node):
            fused = self.graph.call_function(target, tuple(args), kwargs)
            first = self.graph.call_function(operator.getitem, (fused, 0))
        fused.meta, first.meta = meta, dict(node.meta)
        first.meta.pop("example_value")
        node.replace_all_uses_with(first)
        self.graph.erase_node(node)

    def _unfuse(self, node: fx.Node) -> None:
        """A kernel that SDPA was lowered to, whose other results nobody reads."""
        first = next((u for u in node.users if is_item(u, 0)), None)
        if first is None or any(u.users for u in node.users if u is not first):
            return
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        given = {
            a.name: argument(node, n, a.name, a.default_value if a.has_default_value() else None)
            for n, a in enumerate(schema)
        }
        keywords = {
            "attn_mask": given.get("attn_mask", given.get("attn_bias")),
            "dropout_p": given.get("dropout_p") or 0.0,
            "is_causal": bool(given.get("is_causal")),
            "scale": given.get("scale"),
        }
        operands = [given[name] for name in ("query", "key", "value")]
        q, k = (tensor_of(o) for o in operands[:2])
        if q is None or k is None or q.dim() != 4 or isinstance(given.get("is_causal"), fx.Node):
            return
        if q.shape[1] != k.shape[1]:
            keywords["enable_gqa"] = True
        with self.graph.inserting_before(node):
            made = call(
                self.graph, _aten.scaled_dot_product_attention.default, *operands, **keywords
            )
        made.meta.update(first.meta)
        self._fused.append((made, node.target, given, node.meta))
        first.replace_all_uses_with(made)
        for user in list(node.users):
            self.graph.erase_node(user)
        self.graph.erase_node(node)

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
