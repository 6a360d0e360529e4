"""Turn each normal form into an attention site: groups, layer, placement, source line."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from sparse_compiler.ir.report import Code, PassReport, SiteReport
from sparse_compiler.ir.site import AttentionSite
from sparse_compiler.passes.canonicalize import AttentionForm
from sparse_compiler.passes.context import PassContext, SiteState
from sparse_compiler.passes.repeat_kv import see_through_repeat
from sparse_compiler.passes.symbolic_tensor import SymbolicTensors

__all__ = ["find_attention", "layer_of"]


def find_attention(gm: fx.GraphModule, ctx: PassContext) -> PassReport:
    """Add an ``AttentionSite`` and a ``SiteReport`` to every annotated node."""
    states = ctx.states(gm)
    sharded = _has_distributed_inputs(gm)
    reader = SymbolicTensors(gm.graph)
    for node, state in states:
        path, layer = layer_of(node)
        state.report = SiteReport(
            name=node.name,
            layer=path,
            source=_source_line(node),
            shapes={
                name: _shape_text(getattr(state.form, name)) for name in ("query", "key", "value")
            },
        )
        ctx.report.sites.append(state.report)
        state.site = _site(node, state, (path, layer), sharded, reader)
        if state.site is not None:
            # Heads as they are stored, not as they were repeated for the call.
            state.report.shapes["key"] = _shape_text(state.site.key)
            state.report.shapes["value"] = _shape_text(state.site.value)
    return PassReport("find_attention", touched=len(states))


def _site(
    node: fx.Node,
    state: SiteState,
    place: tuple[str, int | None],
    sharded: bool,
    reader: SymbolicTensors,
) -> AttentionSite | None:
    path, layer = place
    form: AttentionForm = state.form
    tensors = [_example(n) for n in (form.query, form.key, form.value)]
    if not all(isinstance(t, torch.Tensor) for t in tensors):
        state.fail(Code.SHAPES, "the graph does not say what q, k and v are")
        return None
    if any(t.dim() != 4 for t in tensors):
        ranks = [t.dim() for t in tensors]
        state.fail(Code.RANK, f"q, k and v have ranks {ranks}; supported is 4, [B, heads, L, D]")
        return None
    key, groups_k = see_through_repeat(form.key, reader)
    value, groups_v = see_through_repeat(form.value, reader)
    if groups_k != groups_v:
        key, value = form.key, form.value
    q, k, v = (_example(n) for n in (form.query, key, value))
    # Heads and head sizes are constants of a model: a symbolic one is fixed by a guard.
    heads, kv_heads = int(q.shape[1]), int(k.shape[1])
    if heads % kv_heads or int(v.shape[1]) != kv_heads:
        state.fail(Code.SHAPES, f"{heads} query heads do not share {kv_heads} key heads evenly")
        return None
    if int(q.shape[3]) != int(k.shape[3]) or k.shape[2] != v.shape[2] or q.shape[0] != k.shape[0]:
        state.fail(Code.SHAPES, f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
        return None
    return AttentionSite(
        node=node,
        query=form.query,
        key=key,
        value=value,
        mask=form.mask,
        is_causal=form.is_causal,
        scale=_number(form.scale, default=int(q.shape[3]) ** -0.5),
        groups=heads // kv_heads,
        dropout=_number(form.dropout, default=0.0),
        softcap=form.softcap,
        layer=layer,
        path=path,
        source=state.report.source if state.report else "",
        head_offset=-1 if sharded else 0,
        global_heads=-1 if sharded else heads,
    )


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _number(value: Any, default: float) -> float:
    """A float argument; a symbolic one is fixed by a guard, since it is a constant of the module."""
    if value is None:
        return default
    if isinstance(value, fx.Node):
        value = _example(value)
    return float(value)


def layer_of(node: fx.Node) -> tuple[str, int | None]:
    """Module path of the call and the layer number in it; ("", None) where unknown.

    The number is the last integer component of the path, e.g. 3 in ``model.layers.3.self_attn``.
    """
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "", None
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"^L\['(\w+)'\]\.?", "", path)
    path = re.sub(r"_modules\['([^']+)'\]", r"\1", path)
    numbers = [part for part in path.split(".") if part.isdecimal()]
    return path, int(numbers[-1]) if numbers else None


def _source_line(node: fx.Node) -> str:
    """``file:line`` of the innermost frame of the call."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    if not frames:
        return ""
    file, line = frames[-1]
    return f"{'/'.join(file.split('/')[-3:])}:{line}"


def _shape_text(node: fx.Node) -> str:
    example = _example(node)
    return str(list(example.shape)) if isinstance(example, torch.Tensor) else "?"


def _has_distributed_inputs(gm: fx.GraphModule) -> bool:
    """Whether any input is a DTensor: then local heads are not the model's heads."""
    return any(
        node.op == "placeholder" and type(_example(node)).__name__ == "DTensor"
        for node in gm.graph.nodes
    )
