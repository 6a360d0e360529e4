"""``explain``: what the compiler would do to a model, and why."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import fx, nn

from sparse_compiler import models
from sparse_compiler.backend import act_on_declines, build_context, emit_artifact, parse_options
from sparse_compiler.graph_breaks import compile_graph
from sparse_compiler.ir.report import Report, SiteReport
from sparse_compiler.passes.context import PassContext

__all__ = ["Explanation", "explain", "report_of", "sites_table"]


@dataclass(frozen=True)
class Explanation:
    """The reports of all graphs that a call of a model gave.

    Args:
        reports: one for each graph, in the order in which Dynamo traced them.
    """

    reports: tuple[Report, ...]

    @property
    def sites(self) -> list[SiteReport]:
        """Every attention: layer, source, shapes, mask, decision, code, reason, pattern."""
        return [site for report in self.reports for site in report.sites]

    @property
    def graphs(self) -> list[dict[str, str]]:
        """Text of each graph after each pass, by pass name."""
        return [report.graphs for report in self.reports]

    @property
    def kernels(self) -> list[str]:
        """Generated kernels in use when the explanation was made."""
        return sorted({kernel for report in self.reports for kernel in report.kernels})

    @property
    def rewritten(self) -> int:
        return sum(report.rewritten for report in self.reports)

    def to_json(self, *, indent: int | None = 2) -> str:
        """All of it as JSON: a list with one object per graph."""
        return json.dumps([report.as_dict() for report in self.reports], indent=indent, default=str)

    def __str__(self) -> str:
        console = Console(width=160, no_color=True, force_terminal=False)
        with console.capture() as capture:
            console.print(sites_table(self.sites))
        return capture.get()


def sites_table(sites: Sequence[SiteReport], title: str = "Attention sites") -> Table:
    """A table for people: one line per site, alike ones together."""
    table = Table(title=title)
    for name in ("layer", "q / k", "mask", "decision", "pattern or reason"):
        table.add_column(name, overflow="fold")
    groups: dict[tuple[str, ...], list[SiteReport]] = {}
    for site in sites:
        text = site.pattern or f"{site.code}: {site.reason}"
        if site.mask_removed:
            text += " (mask proved away)"
        shape = f"{site.shapes['query']} / {site.shapes['key']}"
        groups.setdefault((shape, site.mask, site.decision, text), []).append(site)
    for (shape, mask, decision, text), members in groups.items():
        layer = members[0].layer or members[0].name
        if len(members) > 1:
            layer += f" .. {members[-1].layer or members[-1].name} ({len(members)})"
        table.add_row(layer, shape, mask, decision, text)
    return table


def explain(
    model: nn.Module | Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
) -> Explanation:
    """Trace one call and report every decision.

    The call really runs (through the rewritten graphs, with an eager inner compiler), so it costs
    about one forward pass. Fallback warnings and errors are left out: they are in the report.

    Args:
        model: a module or function; compiled models and wrappers work too.
        args, kwargs: of the call to explain.
        options: as for ``torch.compile(..., backend="minference", options=...)``.
    """
    config = parse_options({**(options or {}), "fallback": "silent"})
    reports: list[Report] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def decided(ctx: PassContext) -> None:
            act_on_declines(ctx, example_inputs)
            emit_artifact(ctx.report)

        compiled, report = compile_graph(
            *(gm, example_inputs),
            make_context=lambda gm: build_context(gm, config, keep_graphs=True),
            inner=lambda gm, inputs, ctx: gm.forward,
            decided=decided,
        )
        reports.append(report)
        return compiled

    target = getattr(model, "_orig_mod", model)

    # A function of its own, so that nothing compiled for the model before is looked up or evicted.
    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    torch.compile(call, backend=backend)(*args, **(kwargs or {}))
    _name_kernels(reports)
    return Explanation(tuple(reports))


def _name_kernels(reports: list[Report]) -> None:
    from sparse_compiler.runtime.registry import loaded_kernels

    kernels = loaded_kernels()
    for report in reports:
        if report.rewritten:
            report.kernels = list(kernels)


def report_of(model: nn.Module) -> Explanation:
    """The reports of what has already been compiled for ``model``; empty before its first call."""
    return Explanation(tuple(graph.report for graph in models.graphs_of(model)))
