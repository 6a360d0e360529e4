"""Open calls of whole attention layers: what they compute, written in nodes that the matchers read.

``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` reach a backend as one call each, which
holds the projections, the masks and the attention. A call is replaced by what PyTorch's own Python
source does for its arguments; where that says something that no form can say (weights that are read,
keys that are added) the call stays as it is and gets a reason.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx
from torch.nn import functional as F

from sparse_compiler.ir.report import Code, PassReport
from sparse_compiler.passes.context import PassContext
from sparse_compiler.passes.grid import call
from sparse_compiler.passes.mutation import MutationMap
from sparse_compiler.passes.opaque import first_output, is_item, keep_closed
from sparse_compiler.passes.symbolic_reader import Mutated, argument, operation, tensor_of
from sparse_compiler.passes.symbolic_tensor import NotUnderstood, SymbolicTensors
from sparse_compiler.passes.symbolic_values import Choice

__all__ = ["Inserter", "expand_composites"]

_INHERITED = ("nn_module_stack", "stack_trace", "source_fn_stack")


class Closed(Exception):
    """The call cannot be opened; the text says what the user could change."""


class Inserter:
    """Emits nodes in the place of one call, which inherit the place in the source that it has.

    Args:
        node: the call; nodes are inserted before it.
    """

    def __init__(self, node: fx.Node) -> None:
        self.graph, self.node = node.graph, node
        self._meta = {k: node.meta[k] for k in _INHERITED if k in node.meta}
        self.made: list[fx.Node] = []

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.node):
            made = call(self.graph, target, *args, **kwargs)
        made.meta.update(self._meta)
        self.made.append(made)
        return made

    def undo(self) -> None:
        """Erase what was emitted; nobody else reads it yet."""
        for node in reversed(self.made):
            self.graph.erase_node(node)
        self.made.clear()


def expand_composites(gm: fx.GraphModule, ctx: PassContext) -> PassReport:
    """Open the calls that can be opened."""
    opened = 0
    effects = _without_writes(gm.graph)
    for node in list(gm.graph.nodes):
        expansion = _EXPANSIONS.get(node.target) if node.op == "call_function" else None
        if expansion is not None:
            opened += _open(node, expansion)
    if opened or effects:
        gm.graph.lint()
        gm.recompile()
        ctx.edited()
    return PassReport("expand_composites", touched=opened, removed_effects=effects)


def _open(node: fx.Node, expansion: Callable[[fx.Node, Inserter], fx.Node]) -> bool:
    """Replace one call; False, and a reason on the node, where it stays."""
    result = first_output(node)
    insert = Inserter(node)
    try:
        if result is None:
            return False
        _check_unread(node)
        out = expansion(node, insert)
        _check_like(out, result)
    except Closed as closed:
        insert.undo()
        keep_closed(node, Code.OPAQUE, str(closed))
        return False
    # The original's value: its sizes are spelled as the rest of the graph spells them.
    out.meta.update(result.meta)
    result.replace_all_uses_with(out)
    for user in list(node.users):
        node.graph.erase_node(user)
    node.graph.erase_node(node)
    return True


def _check_unread(node: fx.Node) -> None:
    for user in node.users:
        if tensor_of(node) is None and not is_item(user, 0) and user.users:
            raise Closed("its attention weights are read: pass need_weights=False")
        if tensor_of(node) is None and not is_item(user, 0) and not is_item(user, 1):
            raise Closed(f"{user.name} reads all of its results at once")


def _check_like(out: fx.Node, result: fx.Node) -> None:
    new, old = tensor_of(out), tensor_of(result)
    if new is None or old is None:
        raise Closed("the graph does not say what it computes")
    same = new.dtype == old.dtype and new.device == old.device and new.dim() == old.dim()
    if not same:
        kinds = [f"{t.dtype} of rank {t.dim()} on {t.device}" for t in (old, new)]
        raise Closed(f"it gives {kinds[0]} and its parts give {kinds[1]} (autocast)")


# -- writes that are none ----------------------------------------------------------------------------


def _without_writes(graph: fx.Graph) -> tuple[str, ...]:
    """Fresh zeros that are filled in place at once, as the layers' masks are, become a pure fill.

    Returns:
        Targets of the nodes that wrote.
    """
    nodes = [n for n in graph.nodes if operation(n) == "masked_fill_"]
    if not nodes:
        return ()
    gone, writes = [], MutationMap(graph)
    for node in nodes:
        zeros = argument(node, 0, "input")
        fresh = isinstance(zeros, fx.Node) and (operation(zeros) or "") in _FRESH
        if not fresh or set(zeros.users) != {node} or tensor_of(zeros) is None:
            continue
        target = "masked_fill" if node.op == "call_method" else _PURE.get(node.target)
        if target is None or writes.written_after(node):
            continue
        gone.append(str(node.target))
        node.target = target
    return tuple(gone)


_FRESH = frozenset({"zeros_like", "zeros", "new_zeros"})
_PURE = {
    torch.ops.aten.masked_fill_.Scalar: torch.ops.aten.masked_fill.Scalar,
    torch.ops.aten.masked_fill_.Tensor: torch.ops.aten.masked_fill.Tensor,
}

# -- F.multi_head_attention_forward ------------------------------------------------------------------

_MHA = inspect.signature(F.multi_head_attention_forward)


def _multi_head(node: fx.Node, insert: Inserter) -> fx.Node:
    """What ``F.multi_head_attention_forward`` gives first, [Lq, B, E] or [Lq, E]."""
    bound = _MHA.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    for name in ("bias_k", "bias_v", "static_k", "static_v"):
        if given[name] is not None:
            raise Closed(f"it is given {name}, a key or value that no token has")
    for name in ("add_zero_attn", "is_causal", "need_weights", "training"):
        if isinstance(given[name], fx.Node):
            raise Closed(f"{name} is computed by the graph ({given[name].name})")
    if given["add_zero_attn"]:
        raise Closed("add_zero_attn=True adds a key that no token has")
    query, key, value = (given[n] for n in ("query", "key", "value"))
    rank = _rank(query)
    if rank not in (2, 3) or not isinstance(given["embed_dim_to_check"], int):
        raise Closed(f"its query has rank {rank}")
    projections = _projected(insert, given)
    padding = given["key_padding_mask"]
    if rank == 2:
        projections = [insert("unsqueeze", p, 1) for p in projections]
        padding = None if padding is None else insert("unsqueeze", padding, 0)
    heads = given["num_heads"]
    size = given["embed_dim_to_check"] // heads
    q, k, v = (
        insert("permute", insert("unflatten", p, -1, (heads, size)), 1, 2, 0, 3)
        for p in projections
    )
    # The hint is_causal is acted on, as in PyTorch, only where nothing else is masked.
    hint = bool(given["is_causal"]) and padding is None and not given["need_weights"]
    mask = None if hint else _merged(insert, given["attn_mask"], padding, heads, q)
    dropout = given["dropout_p"] if given["training"] else 0.0
    out = insert(
        F.scaled_dot_product_attention, q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=hint
    )
    out = insert("flatten", insert("permute", out, 2, 0, 1, 3), 2)
    out = insert(F.linear, out, given["out_proj_weight"], given["out_proj_bias"])
    return insert("squeeze", out, 1) if rank == 2 else out


def _projected(insert: Inserter, given: dict[str, Any]) -> list[fx.Node]:
    """q, k and v [L, B, E] (or [L, E]), with as few products as the weights allow."""
    query, key, value = (given[n] for n in ("query", "key", "value"))
    weight, bias, size = given["in_proj_weight"], given["in_proj_bias"], given["embed_dim_to_check"]
    if given["use_separate_proj_weight"]:
        weights = [given[f"{n}_proj_weight"] for n in "qkv"]
        parts = [
            (n, w, _rows(insert, bias, i, size))
            for i, (n, w) in enumerate(zip((query, key, value), weights, strict=True))
        ]
        return [insert(F.linear, *part) for part in parts]
    if weight is None:
        raise Closed("it has no projection weights")
    if query is key and key is value:
        packed = insert(F.linear, query, weight, bias)
        return [insert("narrow", packed, -1, n * size, size) for n in range(3)]
    q = insert(F.linear, query, _rows(insert, weight, 0, size), _rows(insert, bias, 0, size))
    if key is value:
        both = [_rows(insert, p, 1, size, 2) for p in (weight, bias)]
        packed = insert(F.linear, key, *both)
        return [q, *(insert("narrow", packed, -1, n * size, size) for n in range(2))]
    parts = [
        (n, *(_rows(insert, p, i, size) for p in (weight, bias))) for i, n in ((1, key), (2, value))
    ]
    return [q, *(insert(F.linear, *part) for part in parts)]


def _rows(
    insert: Inserter, packed: fx.Node | None, start: int, size: int, count: int = 1
) -> fx.Node | None:
    """Rows of a packed weight or bias, in units of ``size``."""
    return None if packed is None else insert("narrow", packed, 0, start * size, count * size)


def _merged(
    insert: Inserter, mask: fx.Node | None, padding: fx.Node | None, heads: int, query: fx.Node
) -> fx.Node | None:
    """SDPA's mask for an ``attn_mask`` [L, S] or [B * H, L, S] and a padding [B, S], if any.

    Both are bool, True is hidden, or floats that are added.
    """
    parts = []
    if mask is not None:
        if _rank(mask) == 2:
            mask = insert("unsqueeze", insert("unsqueeze", mask, 0), 0)
        else:
            mask = insert("unflatten", mask, 0, (-1, heads))
        parts.append(mask)
    if padding is not None:
        parts.append(insert("unsqueeze", insert("unsqueeze", padding, 1), 1))
    hidden = [_dtype(part) == torch.bool for part in parts]
    if all(hidden):
        seen = [insert(torch.logical_not, part) for part in parts]
        return functools.reduce(lambda a, b: insert(operator.and_, a, b), seen) if seen else None
    dtype = _dtype(query)
    added = [_filled(insert, p, dtype) if h else p for p, h in zip(parts, hidden, strict=True)]
    return functools.reduce(lambda a, b: insert(operator.add, a, b), added)


def _filled(insert: Inserter, hidden: fx.Node, dtype: torch.dtype) -> fx.Node:
    """0 where seen, -inf where hidden."""
    zeros = insert(torch.zeros_like, hidden, dtype=dtype)
    return insert("masked_fill", zeros, hidden, float("-inf"))


def _dtype(node: fx.Node) -> torch.dtype:
    value = tensor_of(node)
    if value is None:
        raise Closed(f"{node.name} is not a tensor")
    return value.dtype


def _rank(node: Any) -> int:
    value = tensor_of(node) if isinstance(node, fx.Node) else None
    return 0 if value is None else value.dim()


# -- the fast paths of PyTorch's modules, [B, L, E] --------------------------------------------------


def _native(node: fx.Node, insert: Inserter) -> fx.Node:
    """``torch._native_multi_head_attention``."""
    given = _named(node, torch.ops.aten._native_multi_head_attention.default)
    query, key, value = (given[n] for n in ("query", "key", "value"))
    if query is not key or key is not value:
        raise Closed("its query, key and value differ")
    return _fast(insert, query, given["num_head"], given)


def _fast(insert: Inserter, x: fx.Node, heads: int, given: dict[str, Any]) -> fx.Node:
    """Self-attention [B, L, E] with projections; the mask hides wherever it is not zero.

    ``mask_type`` is 0 for a mask [L, L], 1 for a padding [B, L], 2 for both in one [B|1, H, L, L].
    """
    embed_dim, mask, mask_type = (given[n] for n in ("embed_dim", "mask", "mask_type"))
    value = tensor_of(x)
    if value is None or value.dim() != 3 or value.is_nested:
        raise Closed("its input is a nested tensor: pass enable_nested_tensor=False")
    size = embed_dim // heads
    packed = insert(F.linear, x, given["qkv_weight"], given["qkv_bias"])
    q, k, v = (
        insert(
            "transpose",
            insert(
                "unflatten",
                insert("narrow", packed, -1, n * embed_dim, embed_dim),
                -1,
                (heads, size),
            ),
            1,
            2,
        )
        for n in range(3)
    )
    seen = None
    if mask is not None:
        expected = {0: 2, 1: 2, 2: 4}.get(mask_type if mask_type is not None else -1)
        if _rank(mask) != expected:
            raise Closed(f"its mask has rank {_rank(mask)} and type {mask_type}")
        seen = _zero(insert, mask)
        for dim in {0: (0, 0), 1: (1, 1), 2: ()}[mask_type or 0]:
            seen = insert("unsqueeze", seen, dim)
    out = insert(F.scaled_dot_product_attention, q, k, v, attn_mask=seen)
    out = insert("flatten", insert("transpose", out, 1, 2), 2)
    return insert(F.linear, out, given["proj_weight"], given["proj_bias"])


def _zero(insert: Inserter, mask: fx.Node) -> fx.Node:
    """Where a mask is zero; a sum of masks that are nowhere positive is so where both are."""
    if operation(mask) == "add" and len(mask.args) == 2 and not mask.kwargs:
        parts = [part for part in mask.args if isinstance(part, fx.Node)]
        if len(parts) == 2 and all(_never_positive(part) for part in parts):
            return insert(operator.and_, *(_zero(insert, part) for part in parts))
    hidden = mask if _dtype(mask) == torch.bool else insert("to", mask, torch.bool)
    return insert(torch.logical_not, hidden)


def _never_positive(node: fx.Node) -> bool:
    """Whether every element is a constant that is at most 0."""
    tensors = SymbolicTensors(node.graph)
    try:
        index = [tensors.new_index("i", size) for size in tensors.shape(node)]
        value: Any = tensors.evaluate(node, index)
    except (NotUnderstood, Mutated):
        return False
    seen = (value.yes, value.no) if isinstance(value, Choice) else (value,)
    return all(isinstance(v, int | float | sympy.Integer) and v <= 0 for v in seen)


def _encoder_layer(node: fx.Node, insert: Inserter) -> fx.Node:
    """``torch._transformer_encoder_layer_fwd``."""
    given = _named(node, torch.ops.aten._transformer_encoder_layer_fwd.default)
    first = given["norm_first"]
    source = given["src"]

    def norm(x: fx.Node, n: int) -> fx.Node:
        weight, bias = given[f"norm_weight_{n}"], given[f"norm_bias_{n}"]
        return insert(F.layer_norm, x, (given["embed_dim"],), weight, bias, given["eps"])

    x = norm(source, 1) if first else source
    x = _fast(insert, x, given["num_heads"], given)
    x = insert(operator.add, source, x)
    x = x if first else norm(x, 1)
    inner = norm(x, 2) if first else x
    inner = insert(F.linear, inner, given["ffn_weight_1"], given["ffn_bias_1"])
    inner = insert(F.gelu if given["use_gelu"] else F.relu, inner)
    inner = insert(F.linear, inner, given["ffn_weight_2"], given["ffn_bias_2"])
    x = insert(operator.add, x, inner)
    return x if first else norm(x, 2)


def _named(node: fx.Node, overload: Any) -> dict[str, Any]:
    """The call's arguments by the names of its schema, defaults included."""
    return {
        a.name: argument(node, n, a.name, a.default_value if a.has_default_value() else None)
        for n, a in enumerate(overload._schema.arguments)
    }


_EXPANSIONS: dict[Any, Callable[[fx.Node, Inserter], fx.Node]] = {
    F.multi_head_attention_forward: _multi_head,
    torch._native_multi_head_attention: _native,  # type: ignore[attr-defined]
    torch.ops.aten._native_multi_head_attention.default: _native,
    torch._transformer_encoder_layer_fwd: _encoder_layer,  # type: ignore[attr-defined]
    torch.ops.aten._transformer_encoder_layer_fwd.default: _encoder_layer,
}
