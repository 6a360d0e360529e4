"""Device time of each kernel of a sparse layer: ``python benchmarks/kernel_times.py``.

Select and attend of each layer of the inputs, as ``benchmarks/attention.py`` makes them, under PyTorch's
profiler; milliseconds of a call and launches, the longest first.
"""

from __future__ import annotations

import argparse
import sys

import torch
from inputs import retriever_inputs, structured_inputs
from rich.console import Console
from rich.table import Table
from sparse import Sparse
from torch.profiler import ProfilerActivity, profile

from sparse_compiler.patterns import registry
from sparse_compiler.runtime.registry import executor_for

_CALLS = 4


def kernel_times(sparse: Sparse) -> dict[str, tuple[float, int]]:
    """Milliseconds and launches of one call by kernel, warm."""
    for _ in range(2):
        sparse.run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(_CALLS):
            sparse.run()
        torch.cuda.synchronize()
    return {
        event.key: (event.device_time_total / 1e3 / _CALLS, event.count // _CALLS)
        for event in found.key_averages()
    }


def main() -> None:
    """Print one table for each layer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--pattern", default="low_rank", help="of every head, its own numbers")
    parser.add_argument("--inputs", choices=("synthetic", "retriever"), default="synthetic")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda:0")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("kernel_times.py: this benchmark needs a CUDA device")
    torch.cuda.set_device(arguments.device)
    executor = executor_for("triton", "cuda")
    pattern = registry.get(arguments.pattern).default()
    options = {"seed": arguments.seed, "device": arguments.device}
    with torch.inference_mode():
        if arguments.inputs == "retriever":
            layers = retriever_inputs(arguments.tokens, **options)
        else:
            layers = [structured_inputs(arguments.tokens, **options)]
        for number, (q, k, v) in enumerate(layers):
            blocks = (executor.block_q, executor.block_k)
            times = kernel_times(Sparse(q, k, v, pattern, blocks))
            total = sum(ms for ms, _ in times.values())
            title = f"{arguments.tokens} tokens, layer {number}, {total:.3f} ms"
            table = Table("kernel", "ms", "launches", title=title)
            for name, (ms, count) in sorted(times.items(), key=lambda item: -item[1][0]):
                table.add_row(name[:60], f"{ms:.3f}", str(count))
            Console().print(table)


if __name__ == "__main__":
    main()
