"""Runs the passes, times them, and checks what each one promised."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sparse_compiler.config import check_invariants
from sparse_compiler.errors import GraphInvariantBroken
from sparse_compiler.ir.report import PassReport
from sparse_compiler.ir.site import example_of
from sparse_compiler.passes.canonicalize import canonicalize
from sparse_compiler.passes.choose_pattern import choose_pattern
from sparse_compiler.passes.context import PassContext
from sparse_compiler.passes.expand import expand_composites
from sparse_compiler.passes.find_attention import find_attention
from sparse_compiler.passes.flex import forget_flex, read_flex
from sparse_compiler.passes.prove_masks import prove_masks
from sparse_compiler.passes.purity import is_collective, is_mutating
from sparse_compiler.passes.rewrite_sparse import rewrite_sparse

__all__ = ["PIPELINE", "Pass", "copied", "run_pipeline"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass:
    """One stage.

    Args:
        run: ``(gm, ctx) -> PassReport``.
        requires, establishes: names of facts; the order of ``PIPELINE`` must supply them.
        edits: may change the graph; every other pass only annotates.
    """

    run: Callable[[fx.GraphModule, PassContext], PassReport]
    requires: frozenset[str]
    establishes: frozenset[str]
    edits: bool = False


PIPELINE: tuple[Pass, ...] = (
    Pass(expand_composites, frozenset(), frozenset({"opened"}), edits=True),
    Pass(read_flex, frozenset({"opened"}), frozenset({"flex"}), edits=True),
    Pass(canonicalize, frozenset({"opened", "flex"}), frozenset({"forms"})),
    Pass(find_attention, frozenset({"forms"}), frozenset({"sites"})),
    Pass(prove_masks, frozenset({"sites"}), frozenset({"proofs"})),
    Pass(choose_pattern, frozenset({"sites", "proofs"}), frozenset({"decisions"})),
    Pass(rewrite_sparse, frozenset({"decisions"}), frozenset({"rewritten"}), edits=True),
    Pass(forget_flex, frozenset({"flex", "rewritten"}), frozenset(), edits=True),
)


def _check_order(pipeline: tuple[Pass, ...]) -> None:
    known: frozenset[str] = frozenset()
    for stage in pipeline:
        missing = stage.requires - known
        if missing:
            raise GraphInvariantBroken(
                f"pass {stage.run.__name__}",
                f"after passes that establish {sorted(missing)}",
                known,
            )
        known |= stage.establishes


_check_order(PIPELINE)


def run_pipeline(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Run every pass on ``gm`` in place, on a copy for a dry run; fills ``ctx.report``.

    Returns:
        The module that the passes edited.
    Raises:
        GraphInvariantBroken: a pass broke a promise (a bug of the pass).
    """
    if ctx.config.dryrun:
        gm = copied(gm)
    checking = check_invariants()
    for stage in PIPELINE:
        name = stage.run.__name__
        before = _facts(gm) if checking else None
        started = time.perf_counter()
        report = stage.run(gm, ctx)
        report = replace(report, seconds=time.perf_counter() - started)
        ctx.report.passes.append(report)
        logger.debug("%s: %d touched in %.1f ms", name, report.touched, report.seconds * 1e3)
        if before is not None:
            before.effects.subtract(report.removed_effects)
            _check(name, stage, before, _facts(gm), gm)
        if ctx.keep_graphs:
            ctx.report.graphs[name] = str(gm.graph)
    return gm


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A module with a graph of its own and the same tensors and submodules."""
    graph = fx.Graph()
    found: Any = graph.graph_copy(gm.graph, {}, return_output_node=True)
    if found is not None:
        values, old = found
        graph.output(values).meta.update(old.meta)
    graph.set_codegen(gm.graph._codegen)
    made = fx.GraphModule(gm, graph)
    made.meta.update(gm.meta)
    return made


@dataclass(frozen=True)
class _Facts:
    """What no pass may change."""

    num_nodes: int
    effects: Counter[str]
    outputs: tuple[Any, ...]


def _facts(gm: fx.GraphModule) -> _Facts:
    nodes = list(gm.graph.nodes)
    effects = Counter(str(n.target) for n in nodes if is_mutating(n) or is_collective(n))
    outputs: list[Any] = []
    for node in nodes:
        if node.op == "output":
            outputs = [_describe(n) for n in node.all_input_nodes]
    return _Facts(len(nodes), effects, tuple(outputs))


def _describe(node: fx.Node) -> Any:
    example = example_of(node)
    if isinstance(example, torch.Tensor):
        # The sizes themselves: as text they are compared later, when a guard may have fixed some.
        return example.dtype, list(example.shape), example.device
    return None


def _check(name: str, stage: Pass, before: _Facts, after: _Facts, gm: fx.GraphModule) -> None:
    if not stage.edits and after.num_nodes != before.num_nodes:
        raise GraphInvariantBroken(f"pass {name}", "an annotation only", "an edited graph")
    # Not `!=`: counts of 0 are no difference.
    if +before.effects != after.effects or -before.effects:
        changed = (before.effects - after.effects) + (after.effects - before.effects)
        raise GraphInvariantBroken(
            f"pass {name}", "without effect on mutating and collective nodes", dict(changed)
        )
    if str(before.outputs) != str(after.outputs):
        raise GraphInvariantBroken(
            f"pass {name}", f"true to outputs {before.outputs}", after.outputs
        )
    gm.graph.lint()
