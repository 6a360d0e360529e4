"""Sparse against dense attention on one device: time, work rate, density, error and memory.

    python benchmarks/attention.py --lengths 8192 32768 131072 524288 --json results.json
    python benchmarks/attention.py --lengths 131072 --pattern block_mask --density .1 --block-q 128 --block-k 128
    python benchmarks/attention.py --lengths 131072 --inputs retriever

32 query heads, 8 key heads, D 128, bf16, causal, or the retriever's own heads. Everything in one run
and on the same inputs (`inputs.py`). Ways are timed in rounds, one call of each after the other, and
a ratio to cuDNN is the median of the rounds' ratios. Rates count 4 D operations for each pair that
is really computed; pairs are counted from the index.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from first_call import first_call_overhead
from inputs import (
    DIM,
    HEADS,
    KV_HEADS,
    block_mask_index,
    retriever_inputs,
    structured_inputs,
)
from pairs import Work, attend_rows, count_work, error_on_rows, relative_error
from peers import cover_index, dense_flex, dense_sdpa, sparse_flex
from rich.console import Console
from rich.table import Table
from rounds import Ways, timed_rounds
from sparse import Sparse
from torch import Tensor
from torch.nn.attention import SDPBackend

from sparse_compiler.environment import environment
from sparse_compiler.ir.index import AttentionIndex
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry
from sparse_compiler.runtime.registry import executor_for

__all__ = [
    "DIM",
    "HEADS",
    "KV_HEADS",
    "Sparse",
    "Work",
    "count_work",
    "error_on_rows",
    "measure",
    "structured_inputs",
]

PATTERNS = ("vertical_slash", "block_sparse", "a_shape", "low_rank", "key_groups", "block_mask")
PEERS = ("cudnn", "flash", "flex", "flex_mask")
WAYS = ("ours", *PEERS, "declined")
SAMPLED_ROWS = 61

progress = Console(stderr=True)


def head_pattern(arguments: argparse.Namespace, num_tokens: int, block_q: int) -> HeadPattern:
    """The pattern of every head; ``--density`` sets the numbers of all but vertical-slash."""
    if arguments.pattern == "vertical_slash":
        return HeadPattern("vertical_slash", arguments.vertical, arguments.slash)
    pattern = registry.get(arguments.pattern)
    if arguments.density is None:
        return pattern.default()
    return pattern.from_budget(arguments.density, num_tokens, block_q)


def _ways(
    sparse: Sparse, index: AttentionIndex, wanted: tuple[str, ...], density: dict[str, Any]
) -> Ways:
    """Each way by name as a call without arguments, built only when it is its turn."""
    q, k, v = sparse.q, sparse.k, sparse.v
    ways: Ways = {}
    if "ours" in wanted:
        ways["ours"] = lambda: sparse.run
    if "cudnn" in wanted:
        ways["cudnn"] = lambda: dense_sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v)
    if "ours" in wanted:
        ways["attend"] = lambda: lambda: sparse.attend(index)[0]
        if sparse.fixed is None:
            ways["select"] = lambda: sparse.select
            ways["probe"] = lambda: sparse.probe
    if "flash" in wanted:
        ways["flash"] = lambda: dense_sdpa(SDPBackend.FLASH_ATTENTION, q, k, v)
    if "flex" in wanted:
        ways["flex"] = lambda: dense_flex(q, k, v)
    if "flex_mask" in wanted:

        def flex_mask() -> Any:
            lists = cover_index(index, sparse.geometry, q.shape[2])
            density["flex_mask_density"] = lists.density
            density["flex_mask_block"] = list(lists.blocks)
            return sparse_flex(q, k, v, lists)

        ways["flex_mask"] = flex_mask
    if "declined" in wanted:
        ways["declined"] = lambda: sparse.declined
    return ways


def measure(
    sparse: Sparse, wanted: tuple[str, ...] = WAYS, repeats: int | None = None
) -> dict[str, Any]:
    """One layer on one set of inputs.

    Args:
        sparse: the operators with their inputs.
        wanted: of `WAYS`.
        repeats: rounds; None is 3 to 30, fewer for longer inputs.
    Returns:
        Times in ms, rates in TF/s, memory in MiB beyond the inputs, errors relative; peers that
        failed have ``<name>_failed``.
    """
    q, k = sparse.q, sparse.k
    num_tokens = q.shape[2]
    index = AttentionIndex(*sparse.select())
    work = count_work(index, sparse.geometry, num_tokens)
    result: dict[str, Any] = {
        "tokens": num_tokens,
        "heads": [q.shape[1], k.shape[1], q.shape[3]],
        "block_q": sparse.geometry.block_q,
        "block_k": sparse.geometry.block_k,
        "density": work.density,
        "index_mib": index.num_bytes / 2**20,
    }
    rounds = repeats or max(3, min(30, 2**21 // num_tokens))
    timing = timed_rounds(_ways(sparse, index, wanted, result), rounds, progress, PEERS)
    result |= {f"{name}_failed": text for name, text in timing.failed.items()}
    for name, times in timing.ms.items():
        result[f"{name}_ms"] = timing.median(name)
        result[f"{name}_host_ms"] = median(timing.host_ms[name])
        result[f"{name}_rounds"] = len(times)
        result[f"{name}_peak_mib"] = timing.peak_mib[name]
    result |= _rates(result, work, q.shape[3])
    for name in ("ours", "attend", "flash", "flex", "flex_mask", "declined"):
        if name in timing.ms and "cudnn" in timing.ms:
            key = {"ours": "speedup", "declined": "declined_ratio"}.get(name, f"{name}_speedup")
            result[key] = timing.ratio("cudnn", name)
    if "attend_tflops" in result and "cudnn_tflops" in result:
        result["rate_ratio"] = result["attend_tflops"] / result["cudnn_tflops"]
    rows = torch.linspace(0, num_tokens - 1, SAMPLED_ROWS, device=q.device).long().unique()
    return result | _errors(sparse, index, rows, "cudnn" in timing.ms, "ours" in timing.ms)


def _rates(result: dict[str, Any], work: Work, dim: int) -> dict[str, float]:
    pairs: dict[str, float] = dict.fromkeys(("cudnn", "flash", "flex", "declined"), work.allowed)
    pairs["attend"] = work.covered
    if "flex_mask_density" in result:
        pairs["flex_mask"] = work.allowed * result["flex_mask_density"]
    return {
        f"{name}_tflops": 4 * dim * count / result[f"{name}_ms"] / 1e9
        for name, count in pairs.items()
        if f"{name}_ms" in result
    }


def _errors(
    sparse: Sparse, index: AttentionIndex, rows: Tensor, dense: bool, ours: bool
) -> dict[str, float]:
    """Errors on sampled rows in float32; `numeric_error` compares over the index's own pairs."""
    q, k, v = sparse.q, sparse.k, sparse.v
    found: dict[str, float] = {}
    want, _ = attend_rows(q, k, v, rows)
    if dense:
        out = dense_sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v)()
        found["dense_error"] = relative_error(out, want, rows)
        del out
    if ours:
        out = sparse.attend(index)[0]
        found["error"] = relative_error(out, want, rows)
        own, _ = attend_rows(q, k, v, rows, index, sparse.geometry)
        found["numeric_error"] = relative_error(out, own, rows)
        if dense:
            found["numeric_ratio"] = found["numeric_error"] / found["dense_error"]
    return found


def _layers(arguments: argparse.Namespace, num_tokens: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    if arguments.inputs == "retriever":
        return retriever_inputs(num_tokens, seed=arguments.seed, device=arguments.device)
    return [structured_inputs(num_tokens, seed=arguments.seed, device=arguments.device)]


def _mean(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Fields of the layers: numbers averaged where all layers have them, others of the first."""
    merged = {}
    for name, value in results[0].items():
        values = [result.get(name) for result in results]
        numbers = [x for x in values if isinstance(x, int | float)]
        merged[name] = mean(numbers) if len(numbers) == len(results) else value
    return merged


def measure_length(
    arguments: argparse.Namespace, num_tokens: int, blocks: tuple[int, int]
) -> dict[str, Any]:
    """One length: every layer of the inputs, their mean, and each alone if there are several."""
    results = []
    for number, (q, k, v) in enumerate(_layers(arguments, num_tokens)):
        progress.print(f"[bold]{num_tokens} tokens[/], {arguments.inputs} inputs, layer {number}")
        if arguments.pattern == "block_mask":
            density = 0.1 if arguments.density is None else arguments.density
            index = block_mask_index(
                num_tokens, q.shape[1], blocks, density, seed=arguments.seed, device=q.device
            )
            sparse = Sparse(q, k, v, None, blocks, index=index)
        else:
            sparse = Sparse(q, k, v, head_pattern(arguments, num_tokens, blocks[0]), blocks)
        results.append(measure(sparse, tuple(arguments.only), arguments.repeats))
    merged = _mean(results)
    if len(results) > 1:
        merged["layers"] = results
    return merged


COLUMNS = {
    "tokens": "tokens",
    "density": "density",
    "cudnn_ms": "cuDNN ms",
    "flash_ms": "Flash ms",
    "flex_ms": "Flex ms",
    "flex_mask_ms": "Flex mask ms",
    "select_ms": "select ms",
    "attend_ms": "attend ms",
    "ours_ms": "ours ms",
    "speedup": "x cuDNN",
    "attend_tflops": "TF/s",
    "rate_ratio": "of cuDNN's",
    "declined_ratio": "declined",
    "error": "error",
    "numeric_ratio": "numeric / dense",
    "index_mib": "index MiB",
}


def table_of(results: list[dict[str, Any]], title: str) -> Table:
    """The main figures; a peer that failed shows as such, what was not measured as a dash."""
    table = Table(title=title)
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    for result in results:
        cells = []
        for name in COLUMNS:
            failed = f"{name.removesuffix('_ms')}_failed" in result
            value = result.get(name, "failed" if failed else "-")
            cells.append(f"{value:.4g}" if isinstance(value, float) else str(value))
        table.add_row(*cells)
    return table


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--pattern", choices=PATTERNS, default="vertical_slash")
    parser.add_argument("--vertical", type=int, default=512, help="columns kept per head")
    parser.add_argument("--slash", type=int, default=2048, help="distances kept per head")
    parser.add_argument("--density", type=float, help="share of pairs; block_mask: .1")
    parser.add_argument("--inputs", choices=("synthetic", "retriever"), default="synthetic")
    parser.add_argument("--block-q", type=int, default=0, help="rows of a block; 0: the default")
    parser.add_argument("--block-k", type=int, default=0, help="keys of a tile; 0: the default")
    parser.add_argument("--repeats", type=int, help="rounds; default 3 to 30 by length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(WAYS), help=f"of {','.join(WAYS)}")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--first-call", action="store_true", help="also time first calls")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args(argv)
    arguments.only = [name for name in arguments.only.split(",") if name]
    unknown = sorted(set(arguments.only) - set(WAYS))
    if unknown or not arguments.only:
        parser.error(f"--only takes names of {', '.join(WAYS)}, got {', '.join(unknown) or 'none'}")
    if arguments.density is not None and not 0 < arguments.density <= 1:
        parser.error(f"--density must be in (0, 1], got {arguments.density}")
    if arguments.density is not None and arguments.pattern == "vertical_slash":
        parser.error("--density does not apply to vertical_slash: give --vertical and --slash")
    if arguments.repeats is not None and arguments.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {arguments.repeats}")
    if min(arguments.lengths) < 128:
        parser.error(f"--lengths must be at least 128, got {min(arguments.lengths)}")
    return arguments


def main() -> None:
    arguments = parse()
    if not torch.cuda.is_available():
        sys.exit("attention.py: this benchmark needs a CUDA device")
    torch.cuda.set_device(arguments.device)
    executor = executor_for("triton", "cuda")
    blocks = (arguments.block_q or executor.block_q, arguments.block_k or executor.block_k)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": environment()["versions"] | {"cuda": torch.version.cuda},
        "command": ["python", *sys.argv],
        "results": [],
    }

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")

    with torch.inference_mode():
        for length in arguments.lengths:
            result = measure_length(arguments, length, blocks)
            report["results"].append(
                {name: getattr(arguments, name) for name in ("pattern", "inputs", "seed")} | result
            )
            save()
            # A block of one length's size is of no use to the next.
            torch.cuda.empty_cache()
    if arguments.first_call:
        report["first_call"] = first_call_overhead(progress)
        save()
    title = f"{arguments.pattern}, {arguments.inputs} inputs, {report['device']}"
    # Wide enough for every column when standard output is a file.
    console = Console(width=None if sys.stdout.isatty() else 220)
    console.print(table_of(report["results"], title))
    if "first_call" in report:
        warm = report["first_call"]["warm"]["overhead_s"]
        console.print(f"first call with a warm disk cache: + {warm:.2f} s")


if __name__ == "__main__":
    main()
