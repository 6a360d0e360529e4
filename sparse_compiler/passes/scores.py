"""Whether a tensor that is added to the logits is a score, and no mask in disguise.

A score of row and key that the model computes (a query's product with position embeddings, say) may be
handed to the operators as it is. A mask that data decide must not: a pattern would spend its budget on
pairs that it hides. So what is added must come from products and look-ups through operations that
rearrange or combine numbers, and nowhere from a constant that hides, a comparison or a scatter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparse_compiler.ir.site import example_of
from sparse_compiler.passes.operations import CASTS, operation
from sparse_compiler.passes.origins import is_parameter
from sparse_compiler.passes.products import is_product
from sparse_compiler.passes.symbolic_reader import argument, tensor_of
from sparse_compiler.passes.symbolic_tensor import NotUnderstood, SymbolicTensors
from sparse_compiler.passes.symbolic_views import VIEWS

__all__ = ["is_score"]

_MADE = frozenset({"linear", "embedding", "conv1d", "conv2d", "layer_norm", "rms_norm"})
_MOVED = CASTS | {
    *("gather", "index_select", "take_along_dim", "roll", "cat", "concat", "stack"),
    *("split", "chunk", "unbind"),
}
_COMBINED = frozenset(
    {"add", "sub", "mul", "div", "truediv", "neg", "iadd", "isub", "imul", "itruediv"}
    | {"__add__", "__radd__", "__sub__", "__mul__", "__rmul__", "__truediv__", "add_", "mul_"}
)
_FILLED = frozenset({"masked_fill", "where", "pad"})
# A finite constant further down than any score is a way to hide.
_LEAST = -1e3
_LIMIT = 64


def is_score(tensors: SymbolicTensors, node: fx.Node) -> bool:
    """Whether ``node`` [.., Lq, Lk] is computed from products and look-ups and hides nothing."""
    work, seen = [node], set()
    while work:
        current = work.pop()
        if current in seen:
            continue
        seen.add(current)
        if len(seen) > _LIMIT:
            return False
        sources = _sources(tensors, current)
        if sources is None:
            return False
        work += sources
    return True


def _sources(tensors: SymbolicTensors, node: fx.Node) -> list[fx.Node] | None:
    """What a node's numbers come from; None where they may be a mask's."""
    if is_parameter(node) or is_product(node):
        return []
    name = operation(node) or getattr(node.target, "__name__", "")
    if name in _MADE:
        return []
    if name in _FILLED and not _fills_visibly(node, name):
        return None
    if name in VIEWS or name in _MOVED or name in _COMBINED or name in _FILLED:
        floats: list[fx.Node] = []
        fx.map_arg((node.args, node.kwargs), floats.append)
        if name in CASTS and floats and not _is_float(floats[0]):
            return None  # a mask of bools or ints as numbers
        return [n for n in floats if _is_float(n) and not _is_constant(tensors, n)]
    return None


def _is_float(node: fx.Node) -> bool:
    value = tensor_of(node)
    if value is None:  # the parts of a split
        return not isinstance(example_of(node), int | float | torch.SymInt)
    return value.dtype.is_floating_point


def _is_constant(tensors: SymbolicTensors, node: fx.Node) -> bool:
    """A tensor of one number that hides nothing."""
    value = tensor_of(node)
    if value is None or value.dim():
        return False
    try:
        found: Any = tensors.evaluate(node, ())
    except NotUnderstood:
        return False
    return isinstance(found, float | int) and found >= _LEAST


def _fills_visibly(node: fx.Node, name: str) -> bool:
    """Whether the numbers that a fill or choice puts in are no way to hide."""
    if name == "pad":
        filled: list[Any] = [argument(node, 3, "value", 0)]
    elif name == "masked_fill":
        filled = [argument(node, 2, "value")]
    else:
        filled = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, int | float)]
    return all(
        v is None or (isinstance(v, int | float) and _LEAST <= v < float("inf"))
        for v in filled
        if not isinstance(v, fx.Node)
    ) and not (name == "masked_fill" and isinstance(filled[0], fx.Node))
