"""Turn each normal form into an attention site: operands, groups, layer, placement, source line."""

from __future__ import annotations

import re
from typing import Any

import sympy
from torch import fx

from sparse_compiler.ir.report import Code, PassReport, SiteReport
from sparse_compiler.ir.site import AttentionSite, Operand, Step, example_of
from sparse_compiler.passes.architectures import advice
from sparse_compiler.passes.context import PassContext, SiteState
from sparse_compiler.passes.form import AttentionForm, Element
from sparse_compiler.passes.layers import layer_numbers, module_path
from sparse_compiler.passes.layout import Wanted, inverse_steps, layout
from sparse_compiler.passes.symbolic_tensor import NotUnderstood, SymbolicTensors

__all__ = ["find_attention"]


def find_attention(gm: fx.GraphModule, ctx: PassContext) -> PassReport:
    """Add an ``AttentionSite`` and a ``SiteReport`` to every annotated node."""
    states = ctx.states(gm)
    sharded = _has_distributed_inputs(gm)
    tensors = ctx.tensors(gm)
    for node, state in states:
        state.advice = advice(node)
    numbers = {node: state.advice.layer for node, state in states}
    layers = layer_numbers(list(numbers), numbers.get)
    for node, state in states:
        form: AttentionForm = state.form
        state.report = SiteReport(
            name=node.name,
            layer=module_path(node),
            source=_source_line(node),
            shapes=dict.fromkeys(("query", "key", "value"), "?"),
            spelling=form.spelling,
        )
        ctx.report.sites.append(state.report)
        code, reason = form.obstacle
        if code:
            state.fail(Code(code), reason)
            continue
        try:
            state.site = _site(node, state, layers[node], sharded, tensors)
        except NotUnderstood as problem:
            state.fail(Code.SHAPES, str(problem))
            continue
        for name in ("query", "key", "value"):
            # Heads as they are stored, not as they were repeated for the call.
            state.report.shapes[name] = str(list(getattr(state.site, name).shape))
    return PassReport("find_attention", touched=len(states))


class _Operands:
    """Finds the tensors of one form."""

    def __init__(self, form: AttentionForm, node: fx.Node, tensors: SymbolicTensors) -> None:
        self.form, self.node, self.tensors = form, node, tensors
        # What the operands held when the first inner node read them is what counts.
        self.reader = min((node, *form.inner))

    def of(self, element: Element, name: str, axes: str, **more: Any) -> tuple[Operand, int]:
        """The operand of ``element`` over axes named by letters of ``bhqkdv``; ``1`` is none."""
        own = self.form.axes
        table = dict(
            zip(
                "bhqkdv",
                zip(
                    (own.batch, own.head, own.query, own.key, own.dim, own.value_dim),
                    own.sizes,
                    strict=True,
                ),
                strict=True,
            )
        )
        table["1"] = (None, sympy.Integer(1))  # type: ignore[assignment]
        symbols, sizes = zip(*(table[letter] for letter in axes), strict=True)
        wanted = Wanted(symbols, sizes, head=axes.find("h"), **more)
        found = layout(element, wanted, self.tensors, self.reader, self.node)
        if found is None:
            raise NotUnderstood(
                f"{name} is {element.node.name}{list(map(str, element.index))}: no tensor over {axes}"
            )
        return found

    def keys_and_values(self) -> tuple[Operand, Operand, int]:
        """K, V and the query heads for each of their heads."""
        form = self.form
        key, groups = self.of(form.key, "k", "bhkd", shared=True, optional=(0,))
        value, own = self.of(form.value, "v", "bhkv", shared=True, optional=(0,))
        if groups != own:
            key, groups = self.repeated(key, groups), 1
            value = self.repeated(value, own)
        return self.in_batch(key), self.in_batch(value), groups

    def repeated(self, operand: Operand, groups: int) -> Operand:
        """Every head of its own; where K and V are shared by different numbers of heads."""
        if groups == 1:
            return operand
        if int(operand.shape[1]) == 1:
            return Operand(operand.node, (*operand.steps, ("expand", (-1, groups, -1, -1))))
        return Operand(operand.node, (*operand.steps, ("repeat_interleave", (groups, 1))))

    def in_batch(self, operand: Operand) -> Operand:
        """One that all batch entries share is read by each of them."""
        batch = self.form.axes.sizes[0]
        if self.tensors.size(operand.shape[0]) == batch:
            return operand
        if not isinstance(batch, sympy.Integer):
            raise NotUnderstood(f"{operand.node.name} is shared by a batch of size {batch}")
        return Operand(operand.node, (*operand.steps, ("expand", (int(batch), -1, -1, -1))))

    def output(self) -> tuple[Step, ...]:
        """Views from [B, H, Lq, Dv] to the node that is replaced."""
        return self._steps_to(self.form.output, self.form.axes.value_dim)

    def log_sums(self) -> tuple[tuple[fx.Node, tuple[Step, ...]], ...]:
        """The nodes that hold the log-sum-exp, and views from [B, H, Lq] to them."""
        return tuple((e.node, self._steps_to(e)) for e in self.form.log_sums)

    def _steps_to(self, element: Element, *last: sympy.Symbol) -> tuple[Step, ...]:
        own = self.form.axes
        symbols = (own.batch, own.head, own.query, *last)
        sizes = (*own.sizes[:3], *own.sizes[5 : 5 + len(last)])
        steps = inverse_steps(element, Wanted(symbols, sizes, head=1), self.tensors)
        if steps is None:
            index = list(map(str, element.index))
            raise NotUnderstood(
                f"the result {element.node.name}{index} is no view of [B, H, Lq, ..]"
            )
        return steps


def _site(
    node: fx.Node,
    state: SiteState,
    layer: int | None,
    sharded: bool,
    tensors: SymbolicTensors,
) -> AttentionSite:
    form: AttentionForm = state.form
    operands = _Operands(form, node, tensors)
    query = operands.in_batch(operands.of(form.query, "q", "bhqd", optional=(0,))[0])
    key, value, groups = operands.keys_and_values()
    factors = tuple(
        (operands.of(e, "a factor", "bhq1", optional=(0, 1, 2))[0], divides)
        for e, divides in form.factors
    )
    sinks = None if form.sinks is None else operands.of(form.sinks, "sinks", "h")[0]
    heads, kv_heads = int(query.shape[1]), int(key.shape[1])
    if heads != kv_heads * groups or int(value.shape[1]) != kv_heads:
        raise NotUnderstood(f"{heads} query heads do not share {kv_heads} key heads evenly")
    log_sums = operands.log_sums()
    first = min((node, *(old for old, _ in log_sums)))
    late = [o.node for o in (query, key, value) if not o.node < first]
    if late:
        raise NotUnderstood(f"{late[0].name} is computed after {first.name} is read")
    return AttentionSite(
        node=node,
        query=query,
        key=key,
        value=value,
        output=operands.output(),
        masked=bool(form.terms),
        is_causal=form.is_causal,
        scale=_number(form.scale, default=int(query.shape[3]) ** -0.5),
        factors=factors,
        groups=groups,
        dropout=_number(form.dropout, default=0.0),
        softcap=form.softcap,
        sinks=sinks,
        log_sums=log_sums,
        spelling=form.spelling,
        layer=layer,
        path=module_path(node),
        source=state.report.source if state.report else "",
        head_offset=-1 if sharded else 0,
        global_heads=-1 if sharded else heads,
    )


def _number(value: Any, default: float) -> float:
    """A float argument; a symbolic one is fixed by a guard, since it is a constant of the module."""
    if value is None:
        return default
    if isinstance(value, fx.Node):
        value = example_of(value)
    return float(value)


def _source_line(node: fx.Node) -> str:
    """``file:line`` of the innermost frame of the call."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    if not frames:
        return ""
    file, line = frames[-1]
    return f"{'/'.join(file.split('/')[-3:])}:{line}"


def _has_distributed_inputs(gm: fx.GraphModule) -> bool:
    """Whether any input is a DTensor: then local heads are not the model's heads."""
    return any(
        node.op == "placeholder" and type(example_of(node)).__name__ == "DTensor"
        for node in gm.graph.nodes
    )
