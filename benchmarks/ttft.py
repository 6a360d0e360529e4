"""Time to first token of a LLaMA of 8B shape: eager, stock torch.compile and minference in one run.

Weights are random (time does not depend on them), tokens are text. Ways are timed alternately; a
ratio is that of the medians, its interval a 95 % bootstrap over the rounds.

    python benchmarks/ttft.py --lengths 8192 32768 131072 --layers 8 --json ttft.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_compiler import explanation, site_stats
from sparse_compiler.backend import minference
from sparse_compiler.demo.records import load_haystack

VERTICAL_SLASH = {"*": ("vertical_slash", 512, 2048)}


def build_model(layers: int, hidden: int, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """LLaMA-3-8B's shape at hidden 4096; smaller widths keep its proportions (for trying it out)."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=max(4, hidden // 128),
        num_key_value_heads=max(1, hidden // 512),
        head_dim=128,
        vocab_size=128256 if hidden >= 4096 else 1024,
        max_position_embeddings=1 << 20,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def ways(model: LlamaForCausalLM) -> dict[str, Callable[..., Any]]:
    """Every way to run the model; compiled as a user would, without any setting of shapes."""

    def ours(**options: Any) -> Callable[..., Any]:
        return torch.compile(model, backend=minference, options=options)

    return {
        "eager": model,
        "inductor": torch.compile(model),
        "minference dense": ours(pattern="dense"),
        "minference auto": ours(),
        "minference vs(512, 2048)": ours(pattern=VERTICAL_SLASH),
    }


def bootstrap_upper(ours: list[float], theirs: list[float], draws: int = 4000) -> float:
    """Upper end of the 95 % interval of median(ours) / median(theirs) over resampled rounds."""
    rng = random.Random(0)
    pairs = list(zip(ours, theirs, strict=True))
    ratios = []
    for _ in range(draws):
        sample = [rng.choice(pairs) for _ in pairs]
        ratios.append(
            statistics.median(a for a, _ in sample) / statistics.median(b for _, b in sample)
        )
    return sorted(ratios)[int(0.975 * draws)]


def clock(call: Callable[..., Any], tokens: torch.Tensor) -> float:
    sync = torch.cuda.synchronize if tokens.is_cuda else (lambda: None)
    sync()
    started = time.perf_counter()
    call(input_ids=tokens, logits_to_keep=1, use_cache=True)
    sync()
    return time.perf_counter() - started


def measure(
    calls: dict[str, Callable[..., Any]], tokens: torch.Tensor, rounds: int, slow_s: float
) -> dict[str, Any]:
    """Warm up each way, then alternate; a way whose call takes over ``slow_s`` gets 3 rounds."""
    first, times, peak = {}, {name: [] for name in calls}, {}
    for name, call in calls.items():
        first[name] = clock(call, tokens)
        if tokens.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        warm = clock(call, tokens)
        if tokens.is_cuda:
            peak[name] = torch.cuda.max_memory_allocated() / 2**30
        print(f"  {name}: first {first[name]:.2f} s, then {warm:.3f} s", flush=True)
        times[name] = [] if warm < slow_s else [warm]
    for number in range(rounds):
        for name, call in calls.items():
            slow = bool(times[name]) and times[name][0] >= slow_s
            if not slow or number < 2:
                times[name].append(clock(call, tokens))
    return {"first_call_s": first, "times_s": times, "peak_gib": peak}


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    times = result["times_s"]
    medians = {name: statistics.median(t) for name, t in times.items()}
    ratios = {}
    for name, ours in times.items():
        if not name.startswith("minference"):
            continue
        for base in (b for b in ("eager", "inductor") if b in times):
            count = min(len(ours), len(times[base]))
            ratios[f"{name} / {base}"] = {
                "ratio": medians[name] / medians[base],
                "upper95": bootstrap_upper(ours[:count], times[base][:count]),
                "pairs": count,
                "spread": [min(ours) / medians[name], max(ours) / medians[name]],
            }
    return {"median_s": medians, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--slow-seconds", type=float, default=5.0)
    parser.add_argument("--skip", nargs="*", default=[], help="ways not to time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch._dynamo.config.recompile_limit = 64
    model = build_model(args.layers, args.hidden, device, dtype)
    text = load_haystack(1 << 22).text
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "layers": args.layers,
        "hidden": args.hidden,
        "lengths": {},
    }
    calls = {name: call for name, call in ways(model).items() if name not in args.skip}
    with torch.inference_mode():
        for length in args.lengths:
            tokens = torch.tensor([list(text[:length])], device=device)
            print(f"{length} tokens", flush=True)
            result = measure(calls, tokens, args.rounds, args.slow_seconds)
            result.update(summarise(result))
            report["lengths"][length] = result
            for name, value in result["median_s"].items():
                print(f"  {name}: {value:.4f} s", flush=True)
            for name, value in result["ratios"].items():
                print(f"  {name}: {value['ratio']:.3f} (<= {value['upper95']:.3f})", flush=True)
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n")
    reports = explanation.report_of(model).reports
    report["passes_s"] = [sum(p.seconds for p in r.passes) for r in reports]
    report["densities"] = [
        [entry.layer, entry.num_k, round(entry.mean_density, 4), round(entry.index_ms, 3)]
        for entry in site_stats.stats(model)
    ]
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print("passes:", [round(s, 3) for s in report["passes_s"]])


if __name__ == "__main__":
    main()
