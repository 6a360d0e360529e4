"""What the passes share: the options, the tables, what the executor can do, and the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from sparse_compiler.config import SparseConfig
from sparse_compiler.ir.mask import MaskProof
from sparse_compiler.ir.pattern import HeadPattern, LayerPatterns
from sparse_compiler.ir.report import Code, Condition, Report, SiteReport
from sparse_compiler.ir.shape import SiteShape, Tile
from sparse_compiler.ir.site import AttentionSite
from sparse_compiler.passes.architectures import Advice
from sparse_compiler.passes.symbolic_tensor import SymbolicTensors

__all__ = ["META", "Capability", "Decision", "PassContext", "SiteState"]

META = "sparse_compiler"
"""Key of ``node.meta`` under which the passes keep a ``SiteState``."""


@dataclass(frozen=True)
class Capability:
    """What the choosing pass knows of the executor of one device, without importing it.

    Args:
        name: of the executor.
        block_q, block_k: blocking that it wants.
        min_tokens, min_queries: below these dense attention is expected to win.
        auto: what a causal head gets when nobody said anything about it.
        obstacles: ``(dtype, head_dim, value_dim, groups, softcap) -> reasons``.
        tile: the blocking that it wants for one site, which replaces the three numbers above.
    """

    name: str
    block_q: int
    block_k: int
    min_tokens: int
    min_queries: int
    auto: HeadPattern
    obstacles: Callable[..., list[str]]
    tile: Callable[[SiteShape | None, LayerPatterns], Tile]


@dataclass(frozen=True)
class Decision:
    """How a site will be rewritten."""

    patterns: LayerPatterns
    capability: Capability
    min_tokens: int


@dataclass
class SiteState:
    """Facts gathered about one attention node; each pass fills its own field."""

    form: Any = None
    advice: Advice = field(default_factory=Advice)
    site: AttentionSite | None = None
    proof: MaskProof | None = None
    decision: Decision | None = None
    report: SiteReport | None = None
    conditions: list[Condition] = field(default_factory=list)

    def fail(self, code: Code, reason: str) -> None:
        """Note one failed condition; the first one becomes the site's code."""
        self.conditions.append(Condition(code, reason))


@dataclass
class PassContext:
    """Shared by the passes over one graph.

    Args:
        config: checked options.
        capability: device type -> executor facts, or the reason why there is none.
        tables: per layer, head -> pattern, from a configuration file; None without one.
        grad_enabled: whether autograd records while the graph will run.
        blocked: (code, reason) that keeps the whole graph dense, or None.
        report: filled as the passes go.
        site_numbers: hands out a number for each rewritten site.
        keep_graphs: keep the text of the graph after each pass.
    """

    config: SparseConfig
    capability: Callable[[str], Capability | str]
    tables: list[dict[int, HeadPattern]] | None
    grad_enabled: bool
    blocked: Condition | None
    report: Report
    site_numbers: Callable[[], int]
    keep_graphs: bool = False
    _reader: tuple[fx.Graph, SymbolicTensors] | None = None

    def tensors(self, gm: fx.GraphModule) -> SymbolicTensors:
        """The reader of the graph's tensors, shared by the passes until one edits the graph."""
        if self._reader is None or self._reader[0] is not gm.graph:
            self._reader = (gm.graph, SymbolicTensors(gm.graph))
        return self._reader[1]

    def edited(self) -> None:
        """The graph was edited: what was read of it is forgotten."""
        self._reader = None

    def states(self, gm: fx.GraphModule) -> list[tuple[fx.Node, SiteState]]:
        """Annotated nodes in graph order."""
        return [(node, node.meta[META]) for node in gm.graph.nodes if META in node.meta]
