"""What the first call costs, with an empty disk cache and with a warm one.

    python benchmarks/first_call.py

Each case is a process of its own with the same cache directories: the first process finds them
empty, the second finds what the first left. The clock runs from the first call of select and attend
to the end of its work on the device; imports, inputs and the CUDA context come before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

__all__ = ["first_call_overhead"]


def _child(tokens: int) -> dict[str, float]:
    import torch
    from inputs import structured_inputs
    from sparse import Sparse

    from sparse_compiler.ir.pattern import HeadPattern
    from sparse_compiler.runtime.registry import executor_for

    executor = executor_for("triton", "cuda")
    blocks = (executor.block_q, executor.block_k)
    sparse = Sparse(*structured_inputs(tokens), HeadPattern("vertical_slash", 512, 2048), blocks)
    seconds = []
    with torch.inference_mode():
        for _ in range(2):
            torch.cuda.synchronize()
            started = time.perf_counter()
            sparse.run()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    first, second = seconds
    return {"first_s": first, "second_s": second, "overhead_s": first - second}


def first_call_overhead(console: Console, tokens: int = 32768) -> dict[str, Any]:
    """Seconds of the first and second call in a fresh process, cache ``cold`` and then ``warm``.

    Raises:
        subprocess.CalledProcessError: the measured process failed; its errors were shown.
    """
    found: dict[str, Any] = {"tokens": tokens}
    with tempfile.TemporaryDirectory() as folder:
        places = {
            "SPARSE_COMPILER_CACHE": str(Path(folder, "kernels")),
            "TRITON_CACHE_DIR": str(Path(folder, "triton")),
        }
        command = [sys.executable, __file__, "--child", str(tokens)]
        for name in ("cold", "warm"):
            done = subprocess.run(
                command, env=os.environ | places, stdout=subprocess.PIPE, check=True, text=True
            )
            found[name] = json.loads(done.stdout.splitlines()[-1])
            console.print(f"first call, {name} cache: {found[name]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_child(arguments.child)))
    else:
        print(json.dumps(first_call_overhead(Console(stderr=True), arguments.tokens), indent=1))


if __name__ == "__main__":
    main()
