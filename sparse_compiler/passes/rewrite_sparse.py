"""Put the operators in place of attention, and plain SDPA where only the mask could be proved."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource

from sparse_compiler.ir.mask import MaskFact, Proved
from sparse_compiler.ir.pattern import LayerPatterns
from sparse_compiler.ir.report import Code, PassReport
from sparse_compiler.ir.site import AttentionSite
from sparse_compiler.passes.canonicalize import match_sdpa
from sparse_compiler.passes.context import META, Decision, PassContext, SiteState
from sparse_compiler.passes.remove_dead import remove_dead
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import Limits

__all__ = ["rewrite_sparse"]


class _SizeMissing(Exception):
    """A size symbol that no input of the graph carries."""


def rewrite_sparse(gm: fx.GraphModule, ctx: PassContext) -> PassReport:
    """Edit the graph as decided; dead producers of masks and repeated heads go."""
    changed = 0
    if not ctx.config.dryrun:
        # One attention may feed the next: sites name nodes that an earlier rewrite has replaced.
        replaced: dict[fx.Node, fx.Node] = {}
        for node, state in ctx.states(gm):
            if state.site is not None:
                state.site = _current(state.site, replaced)
            changed += _rewrite(gm, node, state, ctx, replaced)
        if changed:
            gm.graph.lint()
            gm.recompile()
    for node in gm.graph.nodes:
        node.meta.pop(META, None)
    return PassReport("rewrite_sparse", touched=changed)


def _current(site: AttentionSite, replaced: dict[fx.Node, fx.Node]) -> AttentionSite:
    names = ("query", "key", "value")
    nodes = {name: getattr(site, name) for name in names}
    return replace(site, **{name: replaced.get(node, node) for name, node in nodes.items()})


def _rewrite(
    gm: fx.GraphModule,
    node: fx.Node,
    state: SiteState,
    ctx: PassContext,
    replaced: dict[fx.Node, fx.Node],
) -> bool:
    site, report = state.site, state.report
    if site is None or report is None or not isinstance(state.proof, Proved):
        return False
    fact = state.proof.fact
    if state.decision is not None:
        try:
            replaced[node] = _sparse(gm, site, fact, state.decision, ctx, report)
            return True
        except _SizeMissing as missing:
            reason = f"size {missing} in the mask is not an input of the graph"
            state.fail(Code.SIZES, reason)
            report.decision, report.code, report.reason = "declined", Code.SIZES, reason
            report.pattern, report.conditions = "", list(state.conditions)
    return _plain(gm, site, fact, report)


def _plain(gm: fx.GraphModule, site: AttentionSite, fact: MaskFact, report: Any) -> bool:
    """SDPA without its mask, where a flag says the same."""
    band = fact.band
    aligned = band.causal and band.left is None and band.q_offset == 0
    if site.mask is None or fact.key_padding is not None or not (band.full or aligned):
        return False
    node = site.node
    form = match_sdpa(node)
    if form is None:
        return False
    kwargs = {"dropout_p": form.dropout, "is_causal": aligned, "scale": form.scale}
    if form.gqa:
        kwargs["enable_gqa"] = True
    mask = site.mask
    node.args, node.kwargs = (form.query, form.key, form.value), kwargs
    report.mask_removed = True
    remove_dead(gm.graph, [mask])
    return True


def _sparse(
    gm: fx.GraphModule,
    site: AttentionSite,
    fact: MaskFact,
    decision: Decision,
    ctx: PassContext,
    report: Any,
) -> fx.Node:
    graph, node = gm.graph, site.node
    patterns, capability = decision.patterns, decision.capability
    num_k = site.key_shape[2]
    slots = _slots(patterns)
    limits = _limits(patterns, capability.block_q, capability.block_k, num_k)
    with graph.inserting_before(node):
        sizes = [_size(graph, size) for size in _band_sizes(fact)]
        key_mask = _key_mask(graph, fact, site)
        params = _parameters(gm, patterns, slots, site)
        report.number = ctx.site_numbers()
        budget = -1.0 if patterns.budget is None else patterns.budget
        choice = (budget, decision.min_tokens, capability.name, report.number)
        blocking = (capability.block_q, capability.block_k)
        chosen = [registry.get(name) for name in patterns.names]
        readers = [pattern.number for pattern in chosen if pattern.reads_summary]
        ops = torch.ops.sparse_compiler
        band = (None, key_mask, *sizes)
        summary = graph.call_function(
            ops.summarize_keys.default,
            (site.key, None, key_mask, capability.block_k, readers, *choice),
        )
        index = graph.call_function(
            ops.select.default,
            (
                *(site.query, site.key, summary, params, *band, site.scale, *blocking),
                [pattern.number for pattern in chosen],
                [sum(s >= 0 for s, _ in slots), sum(t >= 0 for _, t in slots)],
                limits,
                *choice,
            ),
        )
        lists = [graph.call_function(operator.getitem, (index, i)) for i in range(11)]
        both = graph.call_function(
            ops.attend.default,
            (
                *(site.query, site.key, site.value, *lists, *band, site.scale, site.softcap),
                *blocking,
                *choice,
            ),
        )
        out = graph.call_function(operator.getitem, (both, 0))
    out.meta = {k: v for k, v in node.meta.items() if k != META}
    operands = list(node.all_input_nodes)
    node.replace_all_uses_with(out)
    graph.erase_node(node)
    remove_dead(graph, operands)
    return out


def _band_sizes(fact: MaskFact) -> tuple[Any, Any, Any]:
    """(q_offset, left, right) as the operators want them: -1 is unbounded."""
    band = fact.band
    return (
        band.q_offset,
        -1 if band.left is None else band.left,
        -1 if band.right is None else band.right,
    )


def _slots(patterns: LayerPatterns) -> list[tuple[int, int]]:
    """(band slot, block slot) of each head, -1 where it has none."""
    found, band, listed = [], 0, 0
    for head in patterns.heads:
        if registry.get(head.name).component == "band":
            found.append((band, -1))
            band += 1
        else:
            found.append((-1, listed))
            listed += 1
    return found


def _limits(patterns: LayerPatterns, block_q: int, block_k: int, num_k: Any) -> list[int]:
    """Host-side bounds for the capacities; no bound where only the run time knows the numbers."""
    joined = Limits()
    for head in dict.fromkeys(patterns.heads):
        pattern = registry.get(head.name)
        if patterns.budget is not None:
            if patterns.budget >= 1 or not isinstance(num_k, int):
                return [-1, -1, -1]
            head = pattern.from_budget(patterns.budget, num_k, block_q)
        joined = joined.join(pattern.limits(head, block_q, block_k))
    return [joined.columns, joined.distances, joined.blocks]


def _parameters(
    gm: fx.GraphModule, patterns: LayerPatterns, slots: list[tuple[int, int]], site: AttentionSite
) -> fx.Node:
    """The parameter tensor as a buffer of the module; equal ones are shared between layers."""
    rows = [
        [registry.get(head.name).number, head.first, head.second, *slot]
        for head, slot in zip(patterns.heads, slots, strict=True)
    ]
    device = site.query.meta["example_value"].device
    # A digest of the contents: two different tables never share a name, and the same model gives the
    # same graph in every process, so that Inductor's cache on disk is hit.
    digest = hashlib.sha256(f"{device} {rows}".encode()).hexdigest()
    name = f"_sparse_parameters_{digest[:32]}"
    if not hasattr(gm, name):
        gm.register_buffer(name, torch.tensor(rows, dtype=torch.int32, device=device))
        # AOTAutograd wants to know where each tensor of a Dynamo graph came from.
        sources = getattr(gm, "_param_name_to_source", None)
        if sources is not None:
            sources[name] = ConstantSource(source_name=name)
    node = gm.graph.get_attr(name)
    node.meta["example_value"] = getattr(gm, name)
    return node


def _key_mask(graph: fx.Graph, fact: MaskFact, site: AttentionSite) -> fx.Node | None:
    """Bool [B, Lk] from the padding tensor of the mask, or None."""
    if fact.key_padding is None:
        return None
    node = next(n for n in graph.nodes if n.name == fact.key_padding)
    if not fact.key_padding_is_bool:
        node = graph.call_method("to", (node, torch.bool))
    query = graph.call_method("size", (site.query, 0))
    return graph.call_method("expand", (node, query, -1))


_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
}


def _size(graph: fx.Graph, size: Any) -> Any:
    """An int, or nodes that compute a symbolic size from the graph's size inputs.

    Raises:
        _SizeMissing: a symbol has no input, or an operation is not a sum or product.
    """
    if isinstance(size, int):
        return size
    if isinstance(size, sympy.Integer):
        return int(size)
    if isinstance(size, sympy.Symbol):
        return _symbol(graph, size)
    operation = next((f for kind, f in _ARITHMETIC.items() if isinstance(size, kind)), None)
    if operation is None:
        raise _SizeMissing(size)
    parts = [_size(graph, part) for part in size.args]
    total = parts[0]
    for part in parts[1:]:
        both = isinstance(total, int) and isinstance(part, int)
        total = operation(total, part) if both else graph.call_function(operation, (total, part))
    return total


def _symbol(graph: fx.Graph, symbol: sympy.Symbol) -> fx.Node:
    for node in graph.nodes:
        if node.op != "placeholder":
            break
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt) and value.node.expr == symbol:
            return node
    raise _SizeMissing(symbol)
