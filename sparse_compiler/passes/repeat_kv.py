"""Sees through repeated K/V heads, so that grouped-query attention keeps its small K and V."""

from __future__ import annotations

import sympy
from torch import fx

from sparse_compiler.passes.symbolic_reader import Index, operation, tensor_of
from sparse_compiler.passes.symbolic_tensor import NotUnderstood, SymbolicTensors
from sparse_compiler.passes.symbolic_values import floor_divide
from sparse_compiler.passes.symbolic_views import VIEWS

__all__ = ["see_through_repeat"]

# They keep every element and its index (with an unchanged dtype).
_KEEPING = frozenset({"contiguous", "clone", "detach", "alias", "to", "type", "type_as"})


def see_through_repeat(
    node: fx.Node, tensors: SymbolicTensors | None = None
) -> tuple[fx.Node, int]:
    """The tensor whose heads `node` repeats, and how often.

    Args:
        node: K or V, [B, Hq, L, D] with Hq an int; B and L may be symbolic.
        tensors: a reader of the node's graph to reuse; one is made if not given.
    Returns:
        (base, G) with base [B, Hkv, L, D] and ``node[b, h, l, d] == base[b, h // G, l, d]``;
        (node, 1) if nothing is repeated that way, in particular where heads are tiled (``h %
        Hkv``, Hkv > 1).
    """
    value = tensor_of(node)
    if value is None or value.dim() != 4 or not isinstance(value.shape[1], int):
        return node, 1
    reader = tensors or SymbolicTensors(node.graph)
    sizes = reader.shape(node)
    axes = tuple(reader.new_index(n, s) for n, s in zip("bhld", sizes, strict=True))
    best = (node, 1)
    source, index, consumer = node, axes, node
    while True:
        groups = _groups(reader, source, index, sizes, axes)
        # A cache that was written before it is read here (static caches) may be handed out.
        if groups > best[1] and not reader.mutations.written_after(source, consumer):
            best = (source, groups)
        step = _step(reader, source, index)
        if step is None:
            return best
        consumer, (source, index) = source, step


def _step(reader: SymbolicTensors, node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """One operation backward; None where the value is made or may change after it was made."""
    if node.op not in ("call_function", "call_method") or reader.mutations.written_after(node):
        return None
    name = operation(node) or ""
    try:
        if name in _KEEPING:
            source = node.args[0]
            same = isinstance(source, fx.Node) and reader.dtype(source) == reader.dtype(node)
            if not isinstance(source, fx.Node) or not same:
                return None
            if name == "type_as" or reader.shape(source) == reader.shape(node):
                return source, index
            return None
        view = VIEWS.get(name)
        return view(reader, node, index) if view is not None else None
    except NotUnderstood:
        return None


def _groups(reader: SymbolicTensors, node: fx.Node, index: Index, sizes: Index, axes: Index) -> int:
    """G if `node` is [B, Hkv, L, D] read at (b, h // G, l, d); 0 otherwise."""
    shape = reader.shape(node)
    if len(shape) != 4 or not isinstance(shape[1], sympy.Integer):
        return 0
    for axis in (0, 2, 3):
        is_axis = index[axis] == axes[axis] or shape[axis] == 1
        if not is_axis or shape[axis] != sizes[axis]:
            return 0
    num_q, num_kv = int(sizes[1]), int(shape[1])
    if num_kv == 0 or num_q % num_kv:
        return 0
    groups = num_q // num_kv
    if num_kv == 1:
        return groups
    wanted = floor_divide(axes[1], sympy.Integer(groups))
    claim = sympy.Eq(index[1], wanted, evaluate=False)
    return groups if index[1] == wanted or reader.certain(claim) else 0
