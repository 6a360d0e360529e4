"""One layer at a million tokens: does it run, is it right, how long, how much memory.

    python benchmarks/million.py --json million.json

1,048,576 tokens, 32 query heads, 8 key heads, D 128, bf16. The output is compared in float32 over
exactly the pairs that the index lists, for all heads, on the first and last rows, rows on both sides
of every power of two that an element or byte offset could overflow at, and rows in between. The
error must be at most twice that of PyTorch's attention in bf16 over the same pairs. Fresh memory is
filled with NaN (integers with their maximum) during the checked call, so that an output never
written, or a list read past its count, shows.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic as deterministic
from inputs import DIM, HEADS, KV_HEADS, structured_inputs
from pairs import attend_rows, count_work, keys_of_rows, relative_error
from rich.console import Console
from rounds import timed_rounds
from sparse import Sparse
from torch import Tensor

from sparse_compiler.environment import environment
from sparse_compiler.ir.index import AttentionIndex
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.runtime.registry import executor_for

__all__ = ["MILLION", "check_layer", "failures", "poisoned", "rows_to_check"]

MILLION = 1 << 20
LSE_TOLERANCE = 5e-3


def rows_to_check(num_tokens: int, block_q: int, shapes: list[tuple[int, int]]) -> list[int]:
    """Rows of [heads, num_tokens, D] tensors at which an offset could go wrong, and some others.

    Args:
        block_q: rows of a block.
        shapes: (heads, D) of the tensors; offsets count elements and 2-byte elements' bytes.
    Returns:
        Ascending, distinct.
    """
    rows = {0, 1, 2, num_tokens - 3, num_tokens - 2, num_tokens - 1}
    rows |= {block_q - 1, block_q, num_tokens // block_q * block_q - 1}
    rows |= {num_tokens * part // 8 + part for part in range(1, 8)}
    for heads, dim in shapes:
        for power in (31, 32, 33):
            for size in (1, 2):
                row, rest = divmod(2**power // size, dim)
                if row <= heads * num_tokens:
                    # Row numbers run on from head to head.
                    rows |= {(row + step) % num_tokens for step in (-1, 0, 1 if rest == 0 else 2)}
    return sorted(row for row in rows if 0 <= row < num_tokens)


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN, and the largest integer, until it is written."""
    was = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    with warnings.catch_warnings():
        # PyTorch fills memory in its deterministic mode only, whose warnings are not the point.
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was, warn_only=warn)
            deterministic.fill_uninitialized_memory = fill  # pyright: ignore[reportAttributeAccessIssue]


def _same_dtype_error(sparse: Sparse, index: AttentionIndex, rows: Tensor, want: Tensor) -> float:
    """Relative error of PyTorch's attention in the inputs' dtype over the same pairs."""
    q, k, v = sparse.q, sparse.k, sparse.v
    groups = q.shape[1] // k.shape[1]
    outs = []
    for head in range(q.shape[1]):
        seen = keys_of_rows(index, sparse.geometry, head, rows, k.shape[2])
        kv = slice(head // groups, head // groups + 1)
        outs.append(
            torch.nn.functional.scaled_dot_product_attention(
                q[:, head : head + 1, rows], k[:, kv], v[:, kv], attn_mask=seen
            )[0]
        )
    out = torch.cat(outs)[None]
    return relative_error(out, want, torch.arange(len(rows), device=rows.device))


def _all_finite(tensor: Tensor) -> bool:
    # Head by head: a mask of the whole tensor would take half its size again.
    return all(bool(part.isfinite().all()) for part in tensor[0])


def check_layer(sparse: Sparse) -> dict[str, Any]:
    """Run select and attend once in poisoned memory and compare sampled rows of all heads.

    Args:
        sparse: the operators with their inputs; every row must see a key.
    Returns:
        error, same_dtype_error, lse_error, finite, index_mib, density and how many rows.
    """
    q, k, v = sparse.q, sparse.k, sparse.v
    num_tokens = q.shape[2]
    with poisoned():
        index = AttentionIndex(*sparse.select())
        out, lse = sparse.attend(index)
    shapes = [(t.shape[1], t.shape[3]) for t in (q, k, v, out)]
    rows = torch.tensor(rows_to_check(num_tokens, sparse.geometry.block_q, shapes)).to(q.device)
    want, want_lse = attend_rows(q, k, v, rows, index, sparse.geometry)
    work = count_work(index, sparse.geometry, num_tokens)
    lse_difference = (lse[0][:, rows] - want_lse).abs().max()
    return {
        "rows": len(rows),
        "finite": _all_finite(out) and _all_finite(lse),
        "error": relative_error(out, want, rows),
        "same_dtype_error": _same_dtype_error(sparse, index, rows, want),
        # A NaN would compare false with any bound.
        "lse_error": float(torch.nan_to_num(lse_difference, nan=math.inf)),
        "density": work.density,
        "covered_pairs": work.covered,
        "index_mib": index.num_bytes / 2**20,
    }


def failures(result: dict[str, Any]) -> list[str]:
    """What `check_layer` found wrong, in words; empty if nothing."""
    found = []
    if not result["finite"]:
        found.append("the output or lse holds values that are not finite, or were never written")
    bound = 2 * result["same_dtype_error"]
    if not result["error"] <= bound:
        found.append(f"error {result['error']:.3g} is above twice that of PyTorch, {bound:.3g}")
    if not result["lse_error"] <= LSE_TOLERANCE:
        found.append(f"lse differs by {result['lse_error']:.3g}, more than {LSE_TOLERANCE}")
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=MILLION)
    parser.add_argument("--heads", type=int, nargs=2, default=[HEADS, KV_HEADS])
    parser.add_argument("--vertical", type=int, default=512, help="columns kept per head")
    parser.add_argument("--slash", type=int, default=2048, help="distances kept per head")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    if not torch.cuda.is_available():
        sys.exit("million.py: this benchmark needs a CUDA device")
    torch.cuda.set_device(arguments.device)
    console = Console(stderr=True)
    executor = executor_for("triton", "cuda")
    heads, kv_heads = arguments.heads
    with torch.inference_mode():
        console.print("inputs")
        inputs = structured_inputs(
            arguments.tokens,
            seed=arguments.seed,
            device=arguments.device,
            heads=heads,
            kv_heads=kv_heads,
        )
        pattern = HeadPattern("vertical_slash", arguments.vertical, arguments.slash)
        sparse = Sparse(*inputs, pattern, (executor.block_q, executor.block_k))
        console.print("checked run")
        checked = check_layer(sparse)
        torch.cuda.empty_cache()
        index = sparse.select()
        ways = {
            "ours": lambda: sparse.run,
            "select": lambda: sparse.select,
            "attend": lambda: lambda: sparse.attend(index)[0],
        }
        timing = timed_rounds(ways, arguments.repeats, console, ())
    wrong = failures(checked)
    figures = {f"{name}_ms": timing.median(name) for name in timing.ms}
    figures |= {f"{name}_peak_mib": peak for name, peak in timing.peak_mib.items()}
    rate = 4 * DIM * checked["covered_pairs"] / figures["attend_ms"] / 1e9
    report = {
        "device": torch.cuda.get_device_name(),
        "versions": environment()["versions"] | {"cuda": torch.version.cuda},
        "command": ["python", *sys.argv],
        "tokens": arguments.tokens,
        "heads": [heads, kv_heads, DIM],
        "vertical_slash": [arguments.vertical, arguments.slash],
        "blocks": [executor.block_q, executor.block_k],
        "inputs_mib": sum(t.numel() * t.element_size() for t in inputs) / 2**20,
        **checked,
        **figures,
        "attend_tflops": rate,
        "failures": wrong,
    }
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if wrong:
        sys.exit("million.py: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
