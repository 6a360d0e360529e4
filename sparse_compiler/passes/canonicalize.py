"""Read each spelling of attention as one normal form; annotates, edits nothing."""

from __future__ import annotations

from torch import fx

from sparse_compiler.ir.report import PassReport
from sparse_compiler.passes.context import META, PassContext, SiteState
from sparse_compiler.passes.matchers import matchers
from sparse_compiler.passes.sdpa import fix_sizes

__all__ = ["canonicalize"]


def canonicalize(gm: fx.GraphModule, ctx: PassContext) -> PassReport:
    """Annotate the node that holds an attention's result with its ``AttentionForm``."""
    found = 0
    tensors = ctx.tensors(gm)
    fix_sizes(gm.graph)
    for node in gm.graph.nodes:
        for matcher in matchers():
            form = matcher(node, tensors)
            if form is None:
                continue
            result = form.output.node
            if META not in result.meta:
                result.meta[META] = SiteState(form=form)
                found += 1
            break
    return PassReport("canonicalize", touched=found)
