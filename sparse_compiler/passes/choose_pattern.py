"""Give each head of a site a pattern, or decline the site with every reason that holds."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from sparse_compiler.config import ANY, PatternTable
from sparse_compiler.ir.mask import Proved
from sparse_compiler.ir.pattern import HeadPattern, LayerPatterns, fewest_queries
from sparse_compiler.ir.report import Code, Condition, PassReport
from sparse_compiler.ir.shape import DTYPE_BYTES, NEVER, SiteShape
from sparse_compiler.ir.site import AttentionSite
from sparse_compiler.passes.context import Capability, Decision, PassContext, SiteState
from sparse_compiler.patterns import policy, registry

__all__ = ["choose_pattern"]

_LONG = 131072  # tokens, where a size is dynamic


def choose_pattern(gm: fx.GraphModule, ctx: PassContext) -> PassReport:
    """Fill ``state.decision`` where nothing speaks against it, and the site's report."""
    chosen = 0
    for _, state in ctx.states(gm):
        _choose(state, ctx)
        chosen += state.decision is not None
        report = state.report
        if report is None:
            continue
        report.conditions = list(state.conditions)
        if state.decision is not None:
            report.decision = "rewritten"
            report.pattern = state.decision.patterns.describe()
        else:
            report.code, report.reason = state.conditions[0].code, state.conditions[0].reason
    return PassReport("choose_pattern", touched=chosen)


def _choose(state: SiteState, ctx: PassContext) -> None:
    site = state.site
    if ctx.blocked is not None:
        state.conditions.insert(0, ctx.blocked)
    if site is not None:
        _check_gradients(state, site, ctx)
    if state.advice.dense:
        # Before all others: whatever else is wrong, nothing more was wanted.
        reason = f"{state.advice.dense} keeps this layer dense"
        state.conditions.insert(0, Condition(Code.HINT_DENSE, reason))
    if site is None:
        return
    capability = _check_executor(state, site, ctx)
    _check_call(state, site)
    auto = registry.get("vertical_slash").default() if capability is None else capability.auto
    known = len(state.conditions)
    patterns = _patterns(state, site, ctx, auto)
    of_patterns = state.conditions[known:]
    del state.conditions[known:]
    minimum = 0
    if capability is not None:
        if patterns is not None:
            capability = replace(capability, **vars(capability.tile(_shape(state, site), patterns)))
        minimum = _minimum(ctx, capability)
        _check_sizes(state, site, minimum, capability)
    state.conditions += of_patterns
    if capability is not None and patterns is not None and not state.conditions:
        state.decision = Decision(patterns, capability, minimum)


def _shape(state: SiteState, site: AttentionSite) -> SiteShape | None:
    """Sizes of the call; a dynamic length counts as a long one. None for what no model describes."""
    heads, num_q = (_likely(size, _LONG) for size in site.query_shape[1:3])
    batch, kv_heads = (_likely(size, 1) for size in site.key_shape[:2])
    num_k = _likely(site.key_shape[2], _LONG)
    q, v = site.query.example, site.value.example
    dtype = str(q.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES or min(batch, heads, num_q, num_k) < 1 or heads % kv_heads:
        return None
    return SiteShape(
        batch,
        heads,
        kv_heads,
        min(num_q, num_k),
        num_k,
        int(q.shape[3]),
        int(v.shape[3]),
        dtype=dtype,
        causal=_causal(state),
    )


def _causal(state: SiteState) -> bool:
    """Whether later keys, and nothing else by row, are hidden; assumed of a mask nobody proved.

    A row of a packed document sees no key of the document before: patterns of columns and distances
    that one probe chooses for all rows serve only the last document, so blocks are chosen by row.
    """
    return not isinstance(state.proof, Proved) or state.proof.fact.banded


def _likely(size: int | torch.SymInt, otherwise: int) -> int:
    return size if isinstance(size, int) else otherwise


def _minimum(ctx: PassContext, capability: Capability) -> int:
    tokens = ctx.config.min_tokens
    return capability.min_tokens if tokens == "auto" else tokens


def _check_gradients(state: SiteState, site: AttentionSite, ctx: PassContext) -> None:
    tensors = [site.query.example, site.key.example, site.value.example]
    if ctx.grad_enabled and any(t.requires_grad for t in tensors):
        # First of all conditions: the others may change once gradients are off.
        state.conditions.insert(
            0,
            Condition(
                Code.GRAD_ENABLED,
                "q, k or v requires a gradient and there is none through sparse attention; "
                "call the model under torch.inference_mode()",
            ),
        )


def _check_executor(state: SiteState, site: AttentionSite, ctx: PassContext) -> Capability | None:
    q, k, v = site.query.example, site.key.example, site.value.example
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        kinds = [f"{t.dtype} on {t.device}" for t in (q, k, v)]
        state.fail(Code.DTYPE, f"q, k and v are {', '.join(kinds)}")
        return None
    capability = ctx.capability(q.device.type)
    if isinstance(capability, str):
        state.fail(Code.EXECUTOR, capability)
        return None
    obstacles = capability.obstacles(
        q.dtype, int(q.shape[3]), int(v.shape[3]), site.groups, site.softcap, q.device.type
    )
    for obstacle in obstacles:
        state.fail(Code.EXECUTOR, f"executor {capability.name}: {obstacle}")
    return capability


def _check_call(state: SiteState, site: AttentionSite) -> None:
    if site.dropout:
        state.fail(Code.DROPOUT, f"dropout {site.dropout} is active; call model.eval()")
    num_q, num_k = site.query_shape[2], site.key_shape[2]
    if not isinstance(state.proof, Proved):
        return
    alone = state.proof.fact.trivial
    if alone and _differ(num_q, num_k) and not _is(num_q, 1):
        state.fail(Code.CROSS, f"{num_q} queries see all of {num_k} keys: cross-attention")


def _check_sizes(
    state: SiteState, site: AttentionSite, minimum: int, capability: Capability
) -> None:
    num_q, num_k = site.query_shape[2], site.key_shape[2]
    if _is(num_q, 1):
        state.fail(Code.DECODE, "one query row: a decode step")
        return
    if minimum >= NEVER:
        state.fail(Code.SHORT, "the device's cost model expects dense to win at every length")
    elif isinstance(num_k, int) and num_k < minimum:
        state.fail(Code.SHORT, f"{num_k} keys are fewer than min_tokens = {minimum}")
    wanted = fewest_queries(capability.min_queries, minimum)
    if isinstance(num_q, int) and num_q < wanted:
        state.fail(Code.SHORT, f"{num_q} query rows are fewer than {wanted}")


def _is(size: int | torch.SymInt, value: int) -> bool:
    return isinstance(size, int) and size == value


def _differ(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are certainly not the same symbol or number."""
    if isinstance(a, int) and isinstance(b, int):
        return a != b
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return a.node.expr != b.node.expr
    return True


def _patterns(
    state: SiteState, site: AttentionSite, ctx: PassContext, auto: HeadPattern
) -> LayerPatterns | None:
    """The heads' patterns, or None after noting why there are none."""
    heads = site.query_shape[1]
    causal = _causal(state)
    option = ctx.config.pattern
    biased = isinstance(state.proof, Proved) and bool(state.proof.fact.bias)
    # Lists of all key blocks take far more memory than a band that covers everything; so do lists
    # for a budget of which only the run time knows the length.
    (budget, recall), length = _wanted(ctx), site.key_shape[2]
    unlisted = biased or (budget is not None and (budget >= 1 or not isinstance(length, int)))

    def zero_config(option: str) -> tuple[HeadPattern, ...]:
        return tuple(
            policy.uniform(
                option, heads, causal=causal, auto=auto, unlisted=unlisted, recall=recall
            )
        )

    per_layer = ctx.tables is not None or (not isinstance(option, str) and set(option) != {ANY})
    if per_layer and site.layer is None:
        _layer_unknown(state)
        origin = "policy"
        found = zero_config("auto")
    elif ctx.tables is not None:
        found = _from_tables(state, site, heads, ctx)
        origin = ctx.config.config or "config"
    elif option == "auto" and (advised := _advised(state, recall)) is not None:
        found, origin = (advised,) * heads, state.advice.origin
    elif isinstance(option, str):
        origin = "policy" if option == "auto" else "option"
        found = zero_config(option)
    else:
        found, origin = _from_option(state, site, heads, option), "option"
    if found is None:
        return None
    if all(head.name == "dense" for head in found):
        state.fail(Code.CONFIG_DENSE, f"{origin} asks for dense attention")
        return None
    for name in dict.fromkeys(head.name for head in found):
        if registry.get(name).needs_causal and not causal:
            state.fail(
                Code.PATTERN_NEEDS_CAUSAL,
                f"pattern {name} is defined for causal masks only",
            )
    return LayerPatterns(found, origin, budget)


def _wanted(ctx: PassContext) -> tuple[float | None, float | None]:
    """(budget, share of the mass to keep), at most one of them; all of the mass is every pair."""
    recall = ctx.config.target_recall
    return (1.0, None) if recall == 1.0 else (ctx.config.budget, recall)


def _advised(state: SiteState, recall: float | None) -> HeadPattern | None:
    """What a hint says, with the numbers for ``recall``; None where its pattern cannot say that."""
    head = state.advice.pattern
    if head is None or recall is None or head.name == "dense":
        return head
    return registry.get(head.name).from_recall(recall)


def _known_heads(state: SiteState, site: AttentionSite) -> bool:
    if site.head_offset < 0:
        state.fail(
            Code.HEADS_UNKNOWN,
            "patterns are given per head, but the inputs are sharded and the local heads' numbers "
            "are not known",
        )
    return site.head_offset >= 0


def _layer_unknown(state: SiteState) -> None:
    """Note that the policy answers, which is right for every layer that the graph may serve."""
    if state.report is not None:
        reason = (
            "patterns are given per layer, but the graph does not say which layer this is (one graph "
            "may serve several); the zero-config policy chose"
        )
        state.report.notes.append(Condition(Code.LAYER_UNKNOWN, reason))


def _from_tables(
    state: SiteState, site: AttentionSite, heads: int, ctx: PassContext
) -> tuple[HeadPattern, ...] | None:
    tables = ctx.tables or []
    if not _known_heads(state, site) or site.layer is None:
        return None
    if site.layer >= len(tables):
        state.fail(
            Code.LAYER_MISSING, f"layer {site.layer} of a configuration of {len(tables)} layers"
        )
        return None
    table = tables[site.layer]
    extra = [head for head in table if head >= site.global_heads]
    if extra:
        state.fail(
            Code.SHAPES,
            f"the configuration names head {extra[0]} and the layer has {site.global_heads}",
        )
        return None
    missing = registry.get("vertical_slash").default()
    return tuple(table.get(site.head_offset + h, missing) for h in range(heads))


def _from_option(
    state: SiteState, site: AttentionSite, heads: int, table: PatternTable
) -> tuple[HeadPattern, ...] | None:
    needs_head = any(set(row) != {ANY} for row in table.values())
    if needs_head and not _known_heads(state, site):
        return None
    row = table.get(site.layer if site.layer is not None else ANY, table.get(ANY))
    if row is None:
        state.fail(Code.LAYER_MISSING, f"option 'pattern' has no entry for layer {site.layer}")
        return None
    found = []
    for h in range(heads):
        spec = row.get(site.head_offset + h if site.head_offset >= 0 else ANY, row.get(ANY))
        if spec is None:
            state.fail(Code.LAYER_MISSING, f"option 'pattern' has no entry for head {h}")
            return None
        name, first, second = spec
        default = registry.get(name).default()
        found.append(default if first < 0 else HeadPattern(name, first, second))
    return tuple(found)
