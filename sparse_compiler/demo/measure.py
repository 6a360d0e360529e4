"""The demo's measurement: the same prompts answered dense and sparse, timed in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_compiler import explanation, site_stats
from sparse_compiler.backend import minference
from sparse_compiler.demo.checkpoint import load_retriever
from sparse_compiler.demo.records import (
    Haystack,
    Placement,
    Prompt,
    load_haystack,
    make_prompt,
    score_answers,
)
from sparse_compiler.ir.report import SiteReport

__all__ = ["DemoPlan", "DemoResult", "Variant", "run_demo"]

_BAR: Placement = "end-4"
_TRIALS = 2
_TRIAL_MARGIN = 1.3
_ALSO: tuple[Placement, ...] = ("end-32", "spread", "anywhere")


@dataclass(frozen=True)
class DemoPlan:
    """What to run.

    Args:
        tokens: prompt length.
        prompts: prompts of the bar, with 4 questions in the last 64 tokens each.
        also: prompts of each unbarred placement.
        records: share of the prompt that records fill.
        seed: of the first prompt.
        device: ``cpu`` or ``cuda``.
        options: of the backend.
    """

    tokens: int = 16384
    prompts: int = 8
    also: int = 1
    records: float = 0.25
    seed: int = 0
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Variant:
    """One way to run the model.

    Args:
        name: e.g. ``dense eager float32``.
        first_call_s: the first call, compilation included.
        ttft_s: best of the trial calls after it; of the two ways that answer the prompts, the
            median over these.
    """

    name: str
    model: nn.Module
    call: Callable[..., Any]
    first_call_s: float = 0.0
    ttft_s: float = float("inf")

    @property
    def kind(self) -> str:
        """``dense`` or ``sparse``."""
        return self.name.split()[0]


@dataclass
class DemoResult:
    """Figures of one run; ``right`` lists, question by question, who was right."""

    plan: DemoPlan
    haystack_sha256: str
    variants: list[Variant]
    dense: Variant
    sparse: Variant
    right: dict[str, tuple[list[bool], list[bool]]]
    density: float
    sites: list[SiteReport]

    @property
    def speedup(self) -> float:
        return self.dense.ttft_s / self.sparse.ttft_s

    @property
    def lost(self) -> int:
        """Bar questions that dense answers and sparse does not."""
        dense, sparse = self.right[_BAR]
        return sum(d and not s for d, s in zip(dense, sparse, strict=True))

    def as_dict(self) -> dict[str, Any]:
        dense, sparse = self.right[_BAR]
        return {
            "tokens": self.plan.tokens,
            "asked": len(dense),
            "dense": {
                "right": sum(dense),
                "ttft_s": self.dense.ttft_s,
                "first_call_s": self.dense.first_call_s,
                "how": self.dense.name,
            },
            "sparse": {
                "right": sum(sparse),
                "ttft_s": self.sparse.ttft_s,
                "first_call_s": self.sparse.first_call_s,
                "how": self.sparse.name,
                "density": self.density,
            },
            "speedup": self.speedup,
            "lost": self.lost,
            "sites": len(self.sites),
            "rewritten": sum(site.decision == "rewritten" for site in self.sites),
            "also": {
                name: {"asked": len(d), "dense_right": sum(d), "sparse_right": sum(s)}
                for name, (d, s) in self.right.items()
                if name != _BAR
            },
            "variants": {v.name: v.ttft_s for v in self.variants},
            "haystack_sha256": self.haystack_sha256,
            "device": _device_name(self.plan.device),
            "torch": torch.__version__,
        }


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


Track = Callable[[str, Iterable[Any]], Iterable[Any]]


def run_demo(plan: DemoPlan, track: Track) -> DemoResult:
    """Measure.

    Args:
        plan: what to run.
        track: shows progress: takes a description and an iterable, yields its items.
    """
    haystack = load_haystack(max(1 << 22, 2 * plan.tokens))
    with torch.inference_mode():
        # Made in the mode in which they are used: a tensor of another mode would recompile.
        bar = _prompts(plan, haystack, _BAR, plan.prompts)
        variants = _variants(plan)
        for variant in track("first calls (they compile)", variants):
            variant.first_call_s = _timed(variant, bar[0], plan.device)[1]
        for _ in track("choosing the best ways", range(_TRIALS)):
            for variant in variants:
                # A way already far behind is not timed again.
                if _TRIAL_MARGIN * _best(variants, variant.kind).ttft_s >= _known(variant):
                    variant.ttft_s = min(variant.ttft_s, _timed(variant, bar[0], plan.device)[1])
        dense, sparse = _best(variants, "dense"), _best(variants, "sparse")
        right: dict[str, tuple[list[bool], list[bool]]] = {_BAR: ([], [])}
        times: tuple[list[float], list[float]] = ([], [])
        for prompt in track("4 questions in the last 64 tokens", bar):
            # Alternating, so that a change of the machine's speed hits both.
            for variant, answers, spent in zip((dense, sparse), right[_BAR], times, strict=True):
                good, seconds = _ask(variant, prompt, plan.device)
                answers.extend(good)
                spent.append(seconds)
        dense.ttft_s, sparse.ttft_s = (statistics.median(t) for t in times)
        layers = _newest(sparse.model)
        density = statistics.fmean(s.mean_density for s in layers) if layers else 1.0
        for placement in _ALSO:
            right[placement] = ([], [])
            prompts = _prompts(plan, haystack, placement, plan.also)
            for prompt in track(_describe(placement), prompts):
                for variant, answers in zip((dense, sparse), right[placement], strict=True):
                    answers.extend(_ask(variant, prompt, plan.device)[0])
    sites = explanation.report_of(sparse.model).sites
    return DemoResult(plan, haystack.sha256, variants, dense, sparse, right, density, sites)


def _best(variants: list[Variant], kind: str) -> Variant:
    """The fastest of a kind; one that has not been timed counts as slowest."""
    timed = [v for v in variants if v.kind == kind]
    return min(timed, key=lambda v: v.ttft_s)


def _known(variant: Variant) -> float:
    """The best time so far; 0 for a way not timed yet, so that it gets its trial."""
    return 0.0 if variant.ttft_s == float("inf") else variant.ttft_s


def _describe(placement: Placement) -> str:
    return {
        "end-4": "4 questions in the last 64 tokens",
        "end-32": "32 questions in the last 512 tokens",
        "spread": "64 questions in the last three quarters",
        "anywhere": "64 questions anywhere",
    }[placement]


def _newest(model: nn.Module) -> list[site_stats.LayerStats]:
    """Of each layer the newest statistics."""
    return list({entry.layer: entry for entry in site_stats.stats(model)}.values())


def _prompts(plan: DemoPlan, haystack: Haystack, placement: Placement, count: int) -> list[Prompt]:
    return [
        make_prompt(
            plan.tokens,
            placement=placement,
            seed=plan.seed + number,
            records=plan.records,
            haystack=haystack,
        )
        for number in range(count)
    ]


def _variants(plan: DemoPlan) -> list[Variant]:
    """Every dense way worth timing, and sparse in the same dtypes."""
    cuda = plan.device == "cuda"
    dtypes = (torch.bfloat16,) if cuda else (torch.float32, torch.bfloat16)
    found = []
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        model = load_retriever(dtype, plan.device)
        found.append(Variant(f"dense eager {name}", model, model))
        # A model of its own: Dynamo keeps compiled code by function, and backends must not mix.
        stock = load_retriever(dtype, plan.device)
        found.append(Variant(f"dense inductor {name}", stock, torch.compile(stock)))
        ours = load_retriever(dtype, plan.device)
        compiled = torch.compile(ours, backend=minference, options=plan.options)
        found.append(Variant(f"sparse {name}", ours, compiled))
    return found


def _timed(variant: Variant, prompt: Prompt, device: str) -> tuple[Tensor, float]:
    tokens = prompt.tokens[None].to(device)
    _wait(device)
    started = time.perf_counter()
    output = variant.call(input_ids=tokens)
    _wait(device)
    seconds = time.perf_counter() - started
    return getattr(output, "logits", output), seconds


def _ask(variant: Variant, prompt: Prompt, device: str) -> tuple[list[bool], float]:
    logits, seconds = _timed(variant, prompt, device)
    wanted = logits[0, prompt.logit_positions.to(logits.device)]
    return score_answers(wanted, prompt).tolist(), seconds


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
