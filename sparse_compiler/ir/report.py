"""What the compiler decided and why; the value that ``explain`` shows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

__all__ = ["Code", "Condition", "PassReport", "Report", "SiteReport"]


class Code(StrEnum):
    """Why a site stays dense; each value's comment says what a user can do."""

    # Expected: nothing is wrong, sparse attention would not pay or was not asked for.
    SHORT = "SHORT"  # fewer tokens than min_tokens, or too few query rows
    DECODE = "DECODE"  # one query row; a decode step reads every key once anyway
    CROSS = "CROSS"  # queries and keys come from different sequences
    GRAD_ENABLED = "GRAD_ENABLED"  # call the model under torch.inference_mode()
    CONFIG_DENSE = "CONFIG_DENSE"  # option or configuration says dense
    HINT_DENSE = "HINT_DENSE"  # an architecture hint, a plug-in, keeps this layer dense
    # Unexpected: the option fallback acts on these.
    CHAIN = "CHAIN"  # an attention written out in a way that the matcher cannot read
    WEIGHTS = "WEIGHTS"  # the attention weights are an output: call with output_attentions=False
    OPAQUE = (
        "OPAQUE"  # one call that holds a whole attention layer, used in a way that keeps it closed
    )
    FLEX = "FLEX"  # flex_attention whose functions or block lists cannot be read
    MASK_UNKNOWN = "MASK_UNKNOWN"  # the mask's producers were not understood
    # The mask is an input: pass a 2-D padding mask, or remove the graph break
    # (TORCH_LOGS=graph_breaks).
    MASK_INPUT = "MASK_INPUT"
    MASK_REFUTED = "MASK_REFUTED"  # understood, and not a mask that the executors know
    DROPOUT = "DROPOUT"  # dropout is active: call model.eval()
    RANK = "RANK"  # q, k, v are not [B, heads, L, D]
    SHAPES = "SHAPES"  # head counts or sizes do not fit together
    DTYPE = "DTYPE"  # q, k and v differ in dtype or device
    EXECUTOR = "EXECUTOR"  # no executor takes this device, dtype or head size
    PATTERN_NEEDS_CAUSAL = "PATTERN_NEEDS_CAUSAL"  # the pattern is defined for causal masks only
    LAYER_UNKNOWN = "LAYER_UNKNOWN"  # per-layer patterns, but the graph does not name the layer
    LAYER_MISSING = "LAYER_MISSING"  # the configuration has no such layer
    HEADS_UNKNOWN = "HEADS_UNKNOWN"  # per-head patterns, but which heads are local is not known
    SIZES = "SIZES"  # a size in the mask cannot be computed from the graph's inputs
    NO_CXX = "NO_CXX"  # PyTorch's CPU code generation needs a C++ compiler: install g++

    @property
    def expected(self) -> bool:
        return self in _EXPECTED


_EXPECTED = frozenset(
    {
        Code.SHORT,
        Code.DECODE,
        Code.CROSS,
        Code.GRAD_ENABLED,
        Code.CONFIG_DENSE,
        Code.HINT_DENSE,
    }
)


@dataclass(frozen=True)
class Condition:
    """One failed condition of a declined site."""

    code: Code
    reason: str


@dataclass
class SiteReport:
    """What happened to one attention.

    Args:
        name: node name, unique in its graph.
        layer: module path, or "" where unknown.
        source: file and line of the call, or "".
        shapes: q, k, v as text, symbols for dynamic sizes.
        mask: what was proved, or why nothing was.
        decision: ``rewritten`` or ``declined``.
        code, reason: of the first failed condition; "" where rewritten.
        conditions: every failed condition.
        pattern: patterns of the heads as text; "" where dense.
        mask_given: the graph was given its mask, and another graph before it proved that.
        mask_removed: a declined site whose mask was proved away.
        number: under which statistics are kept, -1 for none.
        spelling: how the attention is written in the graph, e.g. ``sdpa`` or ``softmax chain``.
        notes: codes of what was decided more cautiously than asked, with reasons.
    """

    name: str
    layer: str
    source: str
    shapes: dict[str, str]
    mask: str = ""
    decision: Literal["rewritten", "declined"] = "declined"
    code: str = ""
    reason: str = ""
    conditions: list[Condition] = field(default_factory=list)
    pattern: str = ""
    mask_given: bool = False
    mask_removed: bool = False
    number: int = -1
    spelling: str = ""
    notes: list[Condition] = field(default_factory=list)


@dataclass(frozen=True)
class PassReport:
    """One pass's outcome: name, seconds, how many nodes it annotated or changed, and notes.

    ``removed_effects``: targets of in-place operations that went with the region they wrote to.
    """

    name: str
    seconds: float = 0.0
    touched: int = 0
    notes: tuple[str, ...] = ()
    removed_effects: tuple[str, ...] = ()


@dataclass
class Report:
    """Everything about one graph.

    Args:
        sites: in graph order.
        passes: in execution order.
        graphs: source text of the graph after each pass, by pass name; filled on request.
        kernels: names of generated kernels known when the report was made.
        dryrun: nothing was changed.
    """

    sites: list[SiteReport] = field(default_factory=list)
    passes: list[PassReport] = field(default_factory=list)
    graphs: dict[str, str] = field(default_factory=dict)
    kernels: list[str] = field(default_factory=list)
    dryrun: bool = False

    @property
    def rewritten(self) -> int:
        return sum(site.decision == "rewritten" for site in self.sites)

    def as_dict(self) -> dict[str, Any]:
        """Plain data; codes become text."""
        return asdict(self)

    def to_json(self, *, indent: int | None = 2) -> str:
        return json.dumps(self.as_dict(), indent=indent, default=str)
