"""Compiles the graphs of a model that breaks into several, so that its mask crosses the breaks.

A graph that is given a tagged mask is compiled twice: assuming what the tag says, and as it is for
every other mask. Which of the two runs is decided at each call (`mask_tags.GivenGraph`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext

from sparse_compiler import mask_tags
from sparse_compiler.ir.report import Report
from sparse_compiler.passes.context import PassContext
from sparse_compiler.passes.given_masks import (
    Given,
    Returned,
    assume_masks,
    rests_on_given,
    return_masks,
)
from sparse_compiler.passes.manager import run_pipeline
from sparse_compiler.passes.mutation import MutationMap

__all__ = ["compile_graph"]

MakeContext = Callable[[fx.GraphModule], PassContext]
Inner = Callable[[fx.GraphModule, Sequence[Any], PassContext], Callable[..., Any]]
Decided = Callable[[PassContext], None]


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    make_context: MakeContext,
    inner: Inner,
    decided: Decided,
) -> tuple[Callable[..., Any], Report]:
    """Run the passes over a graph and compile what they leave.

    Args:
        gm: the traced graph; edited in place unless the options ask for a dry run.
        example_inputs: its inputs. Masks are recognised among real tensors only.
        make_context: of a graph, for the passes.
        inner: compiles ``(gm, example inputs)``.
        decided: called once with the context whose report counts, before anything is compiled.
    Returns:
        The callable that stands for the graph, and the report of what it does.
    """
    ctx = make_context(gm)
    masks: dict[int, Given] = {}
    if _crosses(ctx):
        mask_tags.tag_buffers(gm, example_inputs)
        masks = mask_tags.recognise(example_inputs)
    written = _written(gm) if masks else []
    if written is None:
        masks, written = {}, []
    assumed = _Assumed.of(gm, masks, make_context) if masks else None
    returned = _run(gm, ctx)
    if assumed is None or not assumed.gained:
        if assumed is not None and not ctx.report.rewritten:
            # What keeps the sites dense is something else than their mask.
            ctx.report = assumed.ctx.report
        decided(ctx)
        return _tagging(inner(gm, example_inputs, ctx), gm, returned), ctx.report
    decided(assumed.ctx)
    inputs = [*example_inputs, *_examples(assumed.added)]
    fast = inner(assumed.gm, inputs, assumed.ctx)
    plain = inner(gm, example_inputs, ctx)
    call = mask_tags.GivenGraph(
        _tagging(fast, assumed.gm, assumed.returned), _tagging(plain, gm, returned), masks, written
    )
    return call, assumed.ctx.report


@dataclass(frozen=True)
class _Assumed:
    """The variant of a graph that assumes what its masks are.

    Args:
        gm: a copy of the graph after the passes: Dynamo goes on to read the inputs of its own.
        ctx: of the passes.
        added: inputs behind the graph's own.
        returned: outputs that are masks.
    """

    gm: fx.GraphModule
    ctx: PassContext
    added: list[fx.Node]
    returned: list[Returned]

    @classmethod
    def of(
        cls, gm: fx.GraphModule, masks: Mapping[int, Given], make_context: MakeContext
    ) -> _Assumed:
        gm = _copy(gm)
        added = assume_masks(gm, masks)
        ctx = make_context(gm)
        return cls(gm, ctx, added, _run(gm, ctx))

    @property
    def gained(self) -> bool:
        """Whether a site was rewritten, or a mask passed on, thanks to what was assumed."""
        for site in self.ctx.report.sites:
            if site.mask_given and (site.decision == "rewritten" or site.mask_removed):
                return True
        outputs = _outputs(self.gm)
        return any(rests_on_given([outputs[mask.position]]) for mask in self.returned)


def _crosses(ctx: PassContext) -> bool:
    """Whether the graph may be changed, and for inference only."""
    return not (ctx.config.dryrun or ctx.grad_enabled or ctx.blocked is not None)


def _run(gm: fx.GraphModule, ctx: PassContext) -> list[Returned]:
    run_pipeline(gm, ctx)
    return return_masks(gm, ctx) if _crosses(ctx) else []


def _tagging(
    compiled: Callable[..., Any], gm: fx.GraphModule, returned: list[Returned]
) -> Callable[..., Any]:
    if not returned:
        return compiled
    added = sum((m.key_mask is not None) + (m.bounds is not None) for m in returned)
    return mask_tags.TaggingGraph(compiled, len(_outputs(gm)) - added, returned)


def _outputs(gm: fx.GraphModule) -> Sequence[Any]:
    output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    found = output.args[0]
    return found if isinstance(found, tuple | list) else (found,)


def _written(gm: fx.GraphModule) -> list[int] | None:
    """Positions of the inputs that the graph writes to; None if it writes to a tensor of its own,
    which could be a view of a mask for all that the caller can see."""
    mutations = MutationMap(gm.graph)
    if any(mutations.written(node) for node in gm.graph.find_nodes(op="get_attr")):
        return None
    inputs = gm.graph.find_nodes(op="placeholder")
    return [at for at, node in enumerate(inputs) if mutations.written(node)]


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A module of its own over the same tensors, with what Dynamo noted on the original."""
    copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    copied.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(gm, name):
            setattr(copied, name, dict(getattr(gm, name)))
    for old, new in zip(gm.graph.nodes, copied.graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return copied


def _examples(added: Sequence[fx.Node]) -> list[torch.Tensor]:
    """Examples of the added inputs, for the inner compiler: fake ones, whose sizes may be symbols."""
    values = [node.meta["example_value"] for node in added]
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return values
    with context.fake_mode:
        return [torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in values]
