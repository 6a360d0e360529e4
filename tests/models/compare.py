"""One model in one scenario: the model rewritten by ``minference`` against itself, only compiled."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch
import zoo
import zoo_extra
from graph_facts import attention_like, pair_tensors
from torch import fx, nn
from torch.utils._pytree import tree_leaves
from transformers import StaticCache

import sparse_compiler
from sparse_compiler import models
from sparse_compiler.integrations.transformers import _choose
from sparse_compiler.ir.report import Report

__all__ = ["SCENARIOS", "Row", "applies", "compare", "is_extra"]

SCENARIOS = (
    "batch1",
    "ones",
    "left_padded",
    "static_cache",
    "generate",
    "dynamic",
    "eager_attn",
    "inductor",
)
OPTIONS: dict[str, Any] = {"budget": 1.0, "min_tokens": 0, "fallback": "silent"}
TOLERANCE = 1e-4
# The inputs of scenarios that are not named after theirs.
_KIND = {
    "ones": "ones",
    "left_padded": "left_padded",
    "eager_attn": "ones",
    "inductor": "ones",
}
# Lengths of the dynamic scenario and slots of the static cache: primes, as zoo.LENGTH is.
OTHER_LENGTH, SLOTS, NEW_TOKENS = 59, 61, 8


@dataclass
class Row:
    """What came of one scenario.

    Args:
        state: ``ok``, ``mismatch``, ``crash``, ``stock_fails`` (the unmodified model fails, differs
            from itself or is not finite), ``same`` (the model has one attention implementation
            only) or ``timeout``.
        difference: largest absolute difference, over max(1, largest stock logit).
        sites: layer, decision, code, reason and mask of each site, in graph order.
        missed: softmaxes over keys and attention calls in the stock graphs that are no site.
        mask_left: tensors of shape [..., Lq, Lk] in graphs whose sites were all rewritten; None
            where no graph is of that kind.
        graphs, stock_graphs: how many graphs Dynamo made of the first calls.
        attention: the implementation that the model used.
        error: what was raised, by whom, or which step differs.
    """

    name: str
    scenario: str
    state: str = "ok"
    difference: float | None = None
    sites: list[dict[str, str]] = field(default_factory=list)
    missed: int = 0
    mask_left: list[str] | None = None
    graphs: int = 0
    stock_graphs: int = 0
    attention: str = ""
    error: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def is_extra(name: str) -> bool:
    """Whether ``name`` is of ``zoo_extra``."""
    return "/" in name


def applies(name: str, scenario: str) -> bool:
    """Whether a scenario makes sense for a model; images have no padding, encoders no cache."""
    if not is_extra(name):
        return True
    kind, _, short = name.partition("/")
    if scenario in ("static_cache", "generate", "inductor"):
        return False
    if scenario == "eager_attn":
        return kind != "by-hand"
    if scenario == "left_padded":
        masked = short in ("padded", "padded_causal", "packed", "transformer_encoder")
        return kind.startswith("encoder") or masked or short.startswith("multihead_c")
    if scenario == "ones":  # an exported program keeps the batch of its export
        return not short.startswith("exported")
    return scenario != "dynamic" or kind.startswith(("encoder", "by-hand"))


def compare(name: str, scenario: str) -> Row:
    """Run both sides of a scenario; never raises for what a model does."""
    started = time.perf_counter()
    row = Row(name, scenario)
    with torch.no_grad():
        _fill(row)
    row.seconds = round(time.perf_counter() - started, 2)
    return row


def _fill(row: Row) -> None:
    try:
        stock = _stock(row)
    except Exception as problem:  # noqa: BLE001 - whatever a model raises is its row
        row.state, row.error = "stock_fails", _describe(problem)
        return
    if stock is None:
        return
    torch._dynamo.reset()
    with _recorded() as records:
        try:
            run = _prepared(row, _ours_inductor if row.scenario == "inductor" else _ours)
            ours = run() if run else []
        except Exception as problem:  # noqa: BLE001
            row.state, row.error = "crash", _describe(problem)
            return
        finally:
            _read(row, records)
            torch._dynamo.reset()
    row.missed = max(0, row.missed - len(row.sites))
    row.difference = _difference(stock, ours, row)
    if row.difference is None or not row.difference <= TOLERANCE:
        row.state = "mismatch"


def _stock(row: Row) -> list[torch.Tensor] | None:
    """Outputs of the unmodified model compiled; None where the row is settled already."""
    torch._dynamo.reset()
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    def compiled(target: Any, dynamic: bool | None) -> Any:
        if row.scenario == "inductor":
            return torch.compile(target, dynamic=dynamic)
        return torch.compile(target, backend=backend, dynamic=dynamic)

    run = _prepared(row, compiled)
    if run is None:
        return None
    first = run()
    row.stock_graphs = len(graphs)
    row.missed = sum(attention_like(gm) for gm in graphs)
    again = run()
    if not all(torch.isfinite(t).all() for t in first):
        row.state, row.error = "stock_fails", "not finite"
        return None
    if (noise := _difference(first, again, Row(row.name, row.scenario))) is None or (
        noise > TOLERANCE
    ):
        row.state, row.error = "stock_fails", f"two runs differ by {noise}"
        return None
    return first


def _ours(target: Any, dynamic: bool | None) -> Any:
    options = {**OPTIONS, "inner": "eager"}
    return torch.compile(target, backend="minference", dynamic=dynamic, options=options)


def _ours_inductor(target: Any, dynamic: bool | None) -> Any:
    return torch.compile(target, backend="minference", dynamic=dynamic, options=OPTIONS)


def _prepared(
    row: Row, compiled: Callable[[Any, bool | None], Any]
) -> Callable[[], list[torch.Tensor]] | None:
    """A function that makes the scenario's calls and returns the outputs to compare.

    Args:
        compiled: ``(module or function, dynamic) -> callable``.
    Returns:
        None, with ``row.state`` set, where the scenario would repeat another one.
    """
    scenario = row.scenario
    home: Any = zoo_extra if is_extra(row.name) else zoo
    model = home.build(row.name, "eager" if scenario == "eager_attn" else "sdpa")
    row.attention = getattr(getattr(model, "config", None), "_attn_implementation", "") or ""
    if scenario == "eager_attn" and not _has_choice(home, row.name):
        row.state = "same"
        return None
    if scenario == "generate":
        return _generation(model, home.inputs(row.name, "batch1"), compiled)
    lengths = (zoo.LENGTH, OTHER_LENGTH) if scenario == "dynamic" else (zoo.LENGTH,)
    call = compiled(model, True if scenario == "dynamic" else None)

    def run() -> list[torch.Tensor]:
        results = []
        for length in lengths:
            given = home.inputs(row.name, _KIND.get(scenario, "batch1"), length)
            if scenario == "static_cache":
                given["past_key_values"] = StaticCache(config=model.config, max_cache_len=SLOTS)
            results.append(_output(call(**given), given.get("attention_mask")))
        return results

    return run


def _has_choice(home: Any, name: str) -> bool:
    config = getattr(home.build(name), "config", None)
    return getattr(config, "_attn_implementation", "eager") != "eager"


def _output(output: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """Logits, else the hidden states, else the first floating tensor; real tokens only."""
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            tensor = getattr(output, name)
            break
    else:
        plain = list(output.values()) if isinstance(output, Mapping) else output
        tensor = next(t for t in tree_leaves(plain) if isinstance(t, torch.Tensor))
    tensor = tensor.detach().float()
    if mask is not None and tensor.dim() >= 2 and tensor.shape[1] == mask.shape[1]:
        rows = mask.bool().repeat_interleave(tensor.shape[0] // mask.shape[0], 0)
        tensor = tensor[rows]
    return tensor


def _generation(
    model: nn.Module, given: dict[str, Any], compiled: Callable[[Any, bool | None], Any]
) -> Callable[[], list[torch.Tensor]]:
    """Greedy tokens and the logits before each: [B, steps] int64, then [B, V] for each step."""
    if compiled is _ours:
        sparse_compiler.compile(model, **OPTIONS, inner="eager")
    else:
        original = model.forward
        model.forward = _choose(original, compiled(original, None))
    given = {"attention_mask": torch.ones(1, zoo.LENGTH, dtype=torch.long), **given}

    def run() -> list[torch.Tensor]:
        output = model.generate(  # type: ignore[operator]
            **given,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits = [t.float() for t in output.logits]
        return [output.sequences[:, -len(logits) :], *logits]

    return run


def _difference(stock: list[torch.Tensor], ours: list[torch.Tensor], row: Row) -> float | None:
    """Largest difference over max(1, largest value); None, with ``row.error``, for other shapes."""
    if [t.shape for t in stock] != [t.shape for t in ours]:
        row.error = f"shapes {[tuple(t.shape) for t in ours]}"
        return None
    worst = 0.0
    steps = None
    if not stock[0].is_floating_point():  # generated tokens: compare logits while these agree
        ids, other = stock[0], ours[0]
        apart = (ids != other).any(dim=0).nonzero()
        steps = int(apart[0]) if len(apart) else ids.shape[1] - 1
        stock, ours = stock[1 : steps + 2], ours[1 : steps + 2]
    for expected, got in zip(stock, ours, strict=True):
        finite = torch.isfinite(expected)
        if not torch.equal(finite, torch.isfinite(got)):
            row.error = "finite in other places than stock"
            return None
        if finite.any():
            scale = max(1.0, float(expected[finite].abs().max()))
            worst = max(worst, float((expected[finite] - got[finite]).abs().max()) / scale)
    return worst


@contextmanager
def _recorded() -> Iterator[list[tuple[fx.GraphModule, Report]]]:
    """Every graph that the backend has finished with, and its report."""
    records: list[tuple[fx.GraphModule, Report]] = []
    original = models.remember

    def remember(gm: fx.GraphModule, inputs: Sequence[Any], report: Report) -> None:
        records.append((gm, report))
        original(gm, inputs, report)

    with mock.patch.object(models, "remember", remember):
        yield records


def _read(row: Row, records: list[tuple[fx.GraphModule, Report]]) -> None:
    row.graphs = len(records)
    for gm, report in records:
        for site in report.sites:
            row.sites.append(
                {
                    "layer": site.layer or site.name,
                    "decision": site.decision,
                    "code": str(site.code),
                    "reason": site.reason,
                    "mask": site.mask,
                }
            )
        # A bias of row and key is computed from pairs; what was assumed of a mask before a graph break
        # is not in the graph that is remembered.
        known = any("bias" in s.mask or "graph break" in s.mask for s in report.sites)
        if report.sites and report.rewritten == len(report.sites) and not known:
            row.mask_left = (row.mask_left or []) + pair_tensors(gm, report)


def _describe(problem: BaseException) -> str:
    """Type, first line of the message, and the innermost frames of the project."""
    text = " ".join(str(problem).split())
    frames = traceback.extract_tb(problem.__traceback__)
    ours = [f for f in frames if "sparse_compiler" in f.filename] or frames[-1:]
    where = " < ".join(f"{f.filename.split('/')[-1]}:{f.lineno}" for f in reversed(ours[-2:]))
    return f"{type(problem).__name__}: {text[:200]} ({where})"
