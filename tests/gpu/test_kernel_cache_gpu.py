"""The kernel cache with a device: launchers, prepared kernels, the first call of a new process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import driver

from sparse_compiler.runtime.cache_contents import contents
from sparse_compiler.runtime.cache_group import SourceFacts
from sparse_compiler.runtime.kernel_cache import KernelCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parents[2]
SMALL = """import triton
import triton.language as tl


@triton.jit
def add_one(out, size):
    at = tl.arange(0, 16)
    tl.store(out + at, tl.load(out + at, mask=at < size) + 1, mask=at < size)
"""
FIRST_CALL = """
import json, time, torch
import torch.nn.functional as F
from triton import knobs

hits = []
knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
q, k, v = (torch.randn(1, heads, 4096, 128, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


options = {"pattern": "vertical_slash", "min_tokens": 0, "inner": "eager", "fallback": "error"}
model = torch.compile(Attention(), backend="minference", options=options)
seconds = []
with torch.inference_mode():
    F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(q, k, v)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
print(json.dumps({"hits": hits, "seconds": seconds}))
"""


def test_a_launch_keeps_binary_and_launcher_in_our_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.active.get_current_device()  # builds the driver's own module where it belongs
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "users"))
    cache = KernelCache(tmp_path / "ours")
    for size in (3, 5):
        out = torch.zeros(16, device="cuda")
        cache.load("small", SMALL).add_one[(1,)](out, size)
        assert out.sum().item() == size
    files = [
        file for entry in contents(cache.directory) if entry.group for file in entry.group.files
    ]
    assert sum(file.endswith(".so") for file in files) == 1
    assert sum(file.endswith((".cubin", ".hsaco")) for file in files) == 1
    assert not list((tmp_path / "users").rglob("*")), "nothing of ours in Triton's directory"


def test_the_first_call_of_a_new_process_compiles_nothing(tmp_path: Path) -> None:
    """With a warm cache; the time includes Dynamo's tracing and the passes."""
    environment = {**os.environ, "SPARSE_COMPILER_CACHE": str(tmp_path / "ours")}
    told = []
    for number in range(2):
        environment["TRITON_CACHE_DIR"] = str(tmp_path / f"triton{number}")
        done = subprocess.run(
            [sys.executable, "-c", FIRST_CALL],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout.splitlines()[-1]))
    cold, warm = told
    print(f"first and second call: cold {cold['seconds']}, warm {warm['seconds']} s")
    assert not any(cold["hits"])
    assert warm["hits"]
    assert all(warm["hits"])
    assert warm["seconds"][0] - warm["seconds"][1] < cold["seconds"][0]
    entries = contents(tmp_path / "ours")
    assert not [entry for entry in entries if entry.problem]
    facts = [entry.group.facts for entry in entries if entry.group]
    assert all(f.sites for f in facts if isinstance(f, SourceFacts)), "each names its site"
