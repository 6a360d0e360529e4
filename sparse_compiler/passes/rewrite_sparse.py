"""Put the operators in place of attention, and plain SDPA where only the mask could be proved."""

from __future__ import annotations

import hashlib
import itertools
import operator
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource

from sparse_compiler.ir.mask import MaskFact, Proved
from sparse_compiler.ir.pattern import LayerPatterns
from sparse_compiler.ir.report import Code, PassReport
from sparse_compiler.ir.site import AttentionSite, Operand, Step, example_of
from sparse_compiler.passes.context import META, Decision, PassContext, SiteState
from sparse_compiler.passes.grid import call
from sparse_compiler.passes.mask_operands import MaskEmitter
from sparse_compiler.passes.purity import is_pure
from sparse_compiler.passes.remove_dead import remove_dead
from sparse_compiler.passes.sdpa import is_sdpa, sdpa_arguments
from sparse_compiler.passes.sizes import SizeMissing
from sparse_compiler.passes.symbolic_reader import operation, size_expr, tensor_of
from sparse_compiler.passes.symbolic_tensor import HANDLERS, NotUnderstood
from sparse_compiler.passes.symbolic_views import VIEWS
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import Limits

__all__ = ["rewrite_sparse"]

# They fail, or read other elements, where the strides are not what they were.
_ONLY_VIEWS = frozenset({"view", "view_as", "as_strided"})


def rewrite_sparse(gm: fx.GraphModule, ctx: PassContext) -> PassReport:
    """Edit the graph as decided; dead producers of masks and repeated heads go."""
    changed, effects = 0, ()
    if not ctx.config.dryrun:
        rewriter = _Rewriter(gm, ctx)
        changed, effects = rewriter.run()
        if changed:
            gm.graph.lint()
            gm.recompile()
    for node in gm.graph.nodes:
        node.meta.pop(META, None)
    ctx.edited()
    return PassReport("rewrite_sparse", touched=changed, removed_effects=effects)


class _Rewriter:
    """Rewrites the sites of one graph one after the other; what they leave behind goes at the end."""

    def __init__(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        self.gm, self.graph, self.ctx = gm, gm.graph, ctx
        self.masks = MaskEmitter(gm.graph, ctx.tensors(gm))
        # One attention may feed the next: sites name nodes that an earlier rewrite has replaced.
        self.replaced: dict[fx.Node, fx.Node] = {}
        self.left: list[fx.Node] = []
        self.owned: set[fx.Node] = set()
        self.examples: dict[Any, Any] = {}

    def run(self) -> tuple[int, tuple[str, ...]]:
        changed = sum(self._rewrite(node, state) for node, state in self.ctx.states(self.gm))
        # Last of all: until here every node that a site names must stay.
        left = [n for n in self.left if n not in self.replaced]
        if changed:
            # What nobody read to begin with: the decoder's mask of a model that has no use for it.
            known = (n for n in self.graph.nodes if not n.users and operation(n) in HANDLERS)
            left += [n for n in known if is_pure(n)]
        return changed, remove_dead(self.graph, left, self.owned)[1]

    def _rewrite(self, node: fx.Node, state: SiteState) -> bool:
        site, report = state.site, state.report
        if site is None or report is None or not isinstance(state.proof, Proved):
            return False
        fact = state.proof.fact
        if state.decision is not None:
            try:
                self._sparse(state, site, fact, state.decision)
                return True
            except (SizeMissing, NotUnderstood) as missing:
                what = "the strides" if isinstance(missing, _StridesUnknown) else "the mask"
                reason = f"{what} cannot be computed from the graph's inputs: {missing}"
                state.fail(Code.SIZES, reason)
                report.decision, report.code, report.reason = "declined", Code.SIZES, reason
                report.pattern, report.conditions = "", list(state.conditions)
        return self._plain(site, fact, report)

    def _plain(self, site: AttentionSite, fact: MaskFact, report: Any) -> bool:
        """SDPA without its mask, where a flag says the same."""
        band, node = fact.band, site.node
        aligned = band.causal and band.left is None and band.q_offset == 0
        alone = fact.key_padding is None and not fact.bounded and not fact.bias
        if not is_sdpa(node) or not alone or not (band.full or aligned):
            return False
        given = sdpa_arguments(node)
        mask = given["attn_mask"]
        if not isinstance(mask, fx.Node):
            return False
        kwargs = {"dropout_p": given["dropout_p"], "is_causal": aligned, "scale": given["scale"]}
        if given["enable_gqa"]:
            kwargs["enable_gqa"] = True
        node.args, node.kwargs = (given["query"], given["key"], given["value"]), kwargs
        report.mask_removed = True
        self.left.append(mask)
        return True

    def _sparse(
        self, state: SiteState, site: AttentionSite, fact: MaskFact, decision: Decision
    ) -> None:
        graph, node, report = self.graph, site.node, state.report
        with graph.inserting_before(site.anchor):
            # First what may fail, so that nothing else has been inserted then.
            for old in (node, *(n for n, _ in site.log_sums)):
                _check_strides(old)
            mask = self.masks.operands(state.form.axes, fact, site)
            sinks = None if site.sinks is None else self._emit(site.sinks)
            q, k, v = (self._emit(o) for o in (site.query, site.key, site.value))
            q = self._scaled(q, site)
            number = self.ctx.site_numbers()
            both = self._call_operators(site, decision, (q, k, v), mask, sinks, number)
            out = self._result(self._item(both, 0), site.output, node)
            log_sum = self._item(both, 1) if site.log_sums else None
        if report is not None:
            report.number = number
        example = out.meta.get("example_value")
        out.meta = {k: v for k, v in node.meta.items() if k != META}
        out.meta.setdefault("example_value", example)
        self.left += [*state.form.inner, *node.all_input_nodes]
        self.left += [t.where.node for t in state.form.terms]
        self.owned |= set(state.form.inner)
        self._replace(node, out)
        for old, steps in site.log_sums:
            assert log_sum is not None
            with graph.inserting_after(log_sum):
                new = self._result(log_sum, steps, old)
            new.meta["example_value"] = example_of(old)
            self.left += old.all_input_nodes
            self._replace(old, new)

    def _result(self, value: fx.Node, steps: tuple[Step, ...], node: fx.Node) -> fx.Node:
        """What the operators return, as the node that it replaces holds it."""
        for method, arguments in steps:
            value = call(self.graph, method, value, *arguments)
        return self._laid_out(self._like(value, node), node)

    def _laid_out(self, out: fx.Node, node: fx.Node) -> fx.Node:
        """The result with the strides of the node that it replaces, where a view relies on them."""
        old, new = tensor_of(node), tensor_of(out)
        if old is None or new is None or not _viewed(node):
            return out
        if [*map(size_expr, old.stride())] == [*map(size_expr, new.stride())]:
            return out
        order = _order_of(old)
        assert order is not None  # _check_strides has seen to it
        if order == sorted(order):
            return call(self.graph, "contiguous", out)
        out = call(self.graph, "contiguous", call(self.graph, "permute", out, order))
        return call(self.graph, "permute", out, [order.index(n) for n in range(old.dim())])

    def _replace(self, node: fx.Node, new: fx.Node) -> None:
        node.replace_all_uses_with(new)
        self.replaced[node] = new
        self.graph.erase_node(node)

    def _emit(self, operand: Operand) -> fx.Node:
        node = self.replaced.get(operand.node, operand.node)
        for method, arguments in operand.steps:
            node = call(self.graph, method, node, *arguments)
        return node

    def _scaled(self, query: fx.Node, site: AttentionSite) -> fx.Node:
        """The query times what multiplies the scores beside the scale."""
        dtype = site.query.example.dtype
        for factor, divides in site.factors:
            target = operator.truediv if divides else operator.mul
            query = call(self.graph, target, query, self._emit(factor))
        return call(self.graph, "to", query, dtype) if site.factors else query

    def _like(self, out: fx.Node, node: fx.Node) -> fx.Node:
        """The result in the dtype of the node that it replaces."""
        old = example_of(node)
        new = out.meta["example_value"]
        return (
            out if old is None or old.dtype == new.dtype else call(self.graph, "to", out, old.dtype)
        )

    def _call_operators(
        self,
        site: AttentionSite,
        decision: Decision,
        tensors: tuple[fx.Node, fx.Node, fx.Node],
        mask: Any,
        sinks: fx.Node | None,
        number: int,
    ) -> fx.Node:
        patterns, capability = decision.patterns, decision.capability
        q, k, v = tensors
        slots = _slots(patterns, mask.banded)
        blocking = (capability.block_q, capability.block_k)
        limits = _limits(patterns, *blocking, site.key_shape[2], mask.banded)
        params = _parameters(self.gm, patterns, slots, site)
        budget = -1.0 if patterns.budget is None else patterns.budget
        choice = (budget, decision.min_tokens, capability.name, number)
        chosen = [registry.get(name) for name in patterns.names]
        group = registry.summary_group(chosen, capability.block_k)
        ops = torch.ops.sparse_compiler
        summary = self._operator(
            ops.summarize_keys.default,
            *(k, mask.rows, mask.key_mask, group, *choice),
        )
        index = self._operator(
            ops.select.default,
            *(q, k, summary, params, *mask.band, site.scale, *blocking),
            [pattern.number for pattern in chosen],
            [sum(s >= 0 for s, _ in slots), sum(t >= 0 for _, t in slots)],
            limits,
            *choice,
        )
        lists = [self._item(index, i) for i in range(11)]
        return self._operator(
            ops.attend.default,
            *(q, k, v, *lists, *mask.band, site.scale, site.softcap, sinks, *blocking, *choice),
        )

    def _item(self, node: fx.Node, position: int) -> fx.Node:
        item = self.graph.call_function(operator.getitem, (node, position))
        item.meta["example_value"] = node.meta["example_value"][position]
        return item

    def _operator(self, target: Any, *args: Any) -> fx.Node:
        """A call of an operator; sites of equal sizes share its fake result, which is slow to make.

        The last argument, the site's number, says nothing about it. Nodes that others may write to
        have the fake results of the nodes that they replace.
        """
        key = (target, _signature(args[:-1]))
        if key not in self.examples:
            node = call(self.graph, target, *args)
            self.examples[key] = node.meta["example_value"]
            return node
        node = self.graph.call_function(target, args)
        node.meta["example_value"] = self.examples[key]
        return node


def _viewed(node: fx.Node) -> bool:
    """Whether an operation that may only view, never copy, reads ``node`` or a view of it."""
    work, seen = [node], set()
    while work:
        for user in work.pop().users:
            if operation(user) in _ONLY_VIEWS:
                return True
            if operation(user) in VIEWS and user not in seen:
                seen.add(user)
                work.append(user)
    return False


class _StridesUnknown(NotUnderstood):
    """A view relies on strides that no order of the dimensions has; the text names the node."""


def _check_strides(node: fx.Node) -> None:
    """Raises _StridesUnknown where `_laid_out` would not know what to do."""
    value = tensor_of(node)
    if value is not None and _viewed(node) and _order_of(value) is None:
        raise _StridesUnknown(f"{node.name} has strides {tuple(value.stride())}")


def _order_of(value: torch.Tensor) -> list[int] | None:
    """The dimensions as they lie in memory, the outermost first; None if that is not known.

    Symbolic strides are those of one order of the dimensions without gaps, or of none.
    """
    strides, sizes = ([size_expr(n) for n in ns] for ns in (value.stride(), value.shape))
    if all(s.is_Integer for s in strides) and not value.is_contiguous():
        return sorted(range(value.dim()), key=lambda n: -int(strides[n]))
    for order in itertools.permutations(range(value.dim())):
        expected: sympy.Expr = sympy.Integer(1)
        for n in reversed(order):
            if sizes[n] != 1 and sympy.expand(strides[n] - expected) != 0:
                break
            expected *= sizes[n]
        else:
            return list(order)
    return None


def _signature(value: Any) -> Any:
    """What the fake result of a call depends on, for an argument or several."""
    if isinstance(value, fx.Node):
        value = example_of(value)
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, *(size_expr(n) for n in value.shape)
    if isinstance(value, torch.SymInt):
        return size_expr(value)
    return tuple(map(_signature, value)) if isinstance(value, tuple | list) else value


def _slots(patterns: LayerPatterns, causal: bool) -> list[tuple[int, int]]:
    """(band slot, block slot) of each head, -1 where it has none."""
    found, band, listed = [], 0, 0
    for head in patterns.heads:
        if registry.get(head.name).component_for(causal) == "band":
            found.append((band, -1))
            band += 1
        else:
            found.append((-1, listed))
            listed += 1
    return found


def _limits(
    patterns: LayerPatterns, block_q: int, block_k: int, num_k: Any, causal: bool
) -> list[int]:
    """Host-side bounds for the capacities; no bound where only the run time knows the numbers."""
    joined = Limits()
    for head in dict.fromkeys(patterns.heads):
        pattern = registry.get(head.name)
        if patterns.budget is not None:
            if patterns.budget >= 1 or not isinstance(num_k, int):
                return [-1, -1, -1]
            head = pattern.from_budget(patterns.budget, num_k, block_q, causal)
        joined = joined.join(pattern.limits(head, block_q, block_k, causal))
    return [joined.columns, joined.distances, joined.blocks]


def _parameters(
    gm: fx.GraphModule, patterns: LayerPatterns, slots: list[tuple[int, int]], site: AttentionSite
) -> fx.Node:
    """The parameter tensor as a buffer of the module; equal ones are shared between layers."""
    rows = [
        [registry.get(head.name).number, head.first, head.second, *slot]
        for head, slot in zip(patterns.heads, slots, strict=True)
    ]
    device = site.query.example.device
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
    mode = getattr(site.query.example, "fake_mode", None)
    buffer = getattr(gm, name)
    node.meta["example_value"] = (
        buffer if mode is None else mode.from_tensor(buffer, static_shapes=True)
    )
    return node
