"""Sparse against dense attention on one device: time, work rate, density and error.

    python benchmarks/attention.py --lengths 8192 32768 131072 --json results.json

32 query heads, 8 key heads, D 128, bf16, causal. Everything in one run and on the same inputs, which
have what long prompts have: sinks, heavy columns, diagonals at fixed distances, local mass, and
noise. Dense is cuDNN and FlashAttention as PyTorch ships them. Times are medians over CUDA events.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparse_compiler.runtime.dispatch  # noqa: F401  installs the operators
from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.runtime.registry import executor_for

HEADS, KV_HEADS, DIM = 32, 8, 128
VERTICAL_SLASH = 2


@dataclass(frozen=True)
class Work:
    """Pairs of one layer: what the mask allows and, of those, what the index covers."""

    allowed: float
    covered: float


def structured_inputs(
    num_tokens: int, *, seed: int = 0, device: str = "cuda"
) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, 32, N, 128] and k, v [1, 8, N, 128], bf16, whose attention has the usual shapes.

    96 dimensions rotate with the position, with amplitudes and phases per head that put mass at
    small distances and at a few far ones; 24 carry a direction that all queries look for and heavy
    keys have, the first four keys more than any; all carry noise.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    rotary, content = 96, 24
    position = torch.arange(num_tokens, device=device, dtype=torch.float32)
    speed = 10000.0 ** (-torch.arange(rotary // 2, device=device) / (rotary // 2))
    angle = position[:, None] * speed
    q = normal(1, HEADS, num_tokens, DIM).mul_(0.5).to(torch.bfloat16)
    k = normal(1, KV_HEADS, num_tokens, DIM).mul_(0.5).to(torch.bfloat16)
    v = normal(1, KV_HEADS, num_tokens, DIM).to(torch.bfloat16)
    k[..., : rotary // 2] += angle.cos().to(k.dtype)
    k[..., rotary // 2 : rotary] += angle.sin().to(k.dtype)
    for head in range(HEADS):
        # A head's favourite distances: its query is a sum of keys rotated by them.
        far = torch.randint(0, num_tokens // 2, (3,), generator=generator, device=device)
        favourite = torch.cat([torch.zeros(1, device=device), far.float()])
        strength = torch.tensor([2.2, 1.4, 1.1, 0.9], device=device)
        shift = favourite[:, None] * speed
        cosine = (strength[:, None] * shift.cos()).sum(0)
        sine = (strength[:, None] * shift.sin()).sum(0)
        turned = angle.cos() * cosine + angle.sin() * sine
        q[0, head, :, : rotary // 2] += turned.to(q.dtype)
        turned = angle.sin() * cosine - angle.cos() * sine
        q[0, head, :, rotary // 2 : rotary] += turned.to(q.dtype)
    direction = normal(KV_HEADS, content)
    direction /= direction.norm(dim=-1, keepdim=True)
    weight = torch.zeros(KV_HEADS, num_tokens, device=device)
    heavy = torch.randint(0, num_tokens, (KV_HEADS, 400), generator=generator, device=device)
    weight.scatter_(
        1, heavy, 12.0 + 4.0 * torch.rand(heavy.shape, generator=generator, device=device)
    )
    weight[:, :4] = 22.0
    start = rotary
    stop = rotary + content
    k[0, :, :, start:stop] += (weight[..., None] * direction[:, None]).to(k.dtype)
    looked_for = direction.repeat_interleave(HEADS // KV_HEADS, 0)
    q[0, :, :, start:stop] += (5.0 * looked_for[:, None]).to(q.dtype)
    return q, k, v


def median_ms(function: Callable[[], Any], *, repeats: int) -> float:
    """Median time of one call by CUDA events, after two calls to warm up."""
    for _ in range(2):
        function()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2]


def count_work(index: AttentionIndex, geometry: Geometry, num_tokens: int) -> Work:
    """Pairs of an all-band index over a causal mask; ``num_tokens`` a multiple of the row block."""
    size_q = geometry.block_q
    ends = torch.arange(size_q, num_tokens + 1, size_q, device=index.covered.device)
    covered = 0.0
    for head in range(index.slots.shape[0]):
        s = int(index.slots[head, 0])
        band = index.covered[0, s].bool()
        x = band.nonzero()[:, 0]
        rows = x.clamp(max=size_q)
        blocks = len(ends) - torch.searchsorted(ends, x)
        covered += float((rows.double() * blocks).sum())
        columns = index.columns[0, s, : int(index.num_columns[0, s])].long()
        distance = ends[:, None] - columns[None, :]
        single = (distance > 0) & ~band[distance.clamp(min=0)]
        covered += float((distance.clamp(max=size_q) * single).double().sum())
    heads = index.slots.shape[0]
    return Work(heads * num_tokens * (num_tokens + 1) / 2, covered)


def error_on_rows(out: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> float:
    """Relative error of ``out`` at some rows against dense attention in float32."""
    groups = q.shape[1] // k.shape[1]
    difference = reference = 0.0
    for head in range(q.shape[1]):
        keys, values = k[0, head // groups].float(), v[0, head // groups].float()
        scores = q[0, head, rows].float() @ keys.T * q.shape[3] ** -0.5
        hidden = torch.arange(k.shape[2], device=k.device)[None, :] > rows[:, None]
        want = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values
        difference += float((out[0, head, rows].float() - want).square().sum())
        reference += float(want.square().sum())
    return math.sqrt(difference / reference)


class Sparse:
    """The two operators on one set of inputs, called as a rewritten graph calls them."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, vertical: int, slash: int, blocks: tuple[int, int]
    ) -> None:
        self.q, self.k, self.v = q, k, v
        self.geometry = Geometry(0, -1, 0, *blocks)
        heads = q.shape[1]
        self.params = torch.tensor(
            [[VERTICAL_SLASH, vertical, slash, head, -1] for head in range(heads)],
            dtype=torch.int32,
            device=q.device,
        )
        self.limits = [vertical, slash, 0]
        self.summary = k.new_zeros(k.shape[0], k.shape[1], 0, k.shape[3])

    def select(self) -> list[Tensor]:
        heads = self.q.shape[1]
        return torch.ops.sparse_compiler.select(
            self.q,
            self.k,
            self.summary,
            self.params,
            None,
            None,
            0,
            -1,
            0,
            self.q.shape[3] ** -0.5,
            self.geometry.block_q,
            self.geometry.block_k,
            [VERTICAL_SLASH],
            [heads, 0],
            self.limits,
            -1.0,
            0,
            "triton",
            -1,
        )

    def attend(self, index: list[Tensor]) -> tuple[Tensor, Tensor]:
        return torch.ops.sparse_compiler.attend(
            self.q,
            self.k,
            self.v,
            *index,
            None,
            None,
            0,
            -1,
            0,
            self.q.shape[3] ** -0.5,
            0.0,
            self.geometry.block_q,
            self.geometry.block_k,
            -1.0,
            0,
            "triton",
            -1,
        )

    def probe(self) -> tuple[Tensor, Tensor]:
        length = self.q.shape[2]
        device = self.q.device
        rows = torch.tensor([[0, length, 0, 0, length]], dtype=torch.int32, device=device)
        heads = torch.arange(self.q.shape[1], device=device)
        first = torch.tensor([length - 64], device=device)
        return executor_for("triton", "cuda").probe(
            self.q,
            self.k,
            heads,
            first,
            self.geometry,
            scale=self.q.shape[3] ** -0.5,
            rows=rows,
            key_mask=None,
            num_rows=64,
        )


def measure(num_tokens: int, vertical: int, slash: int, blocks: tuple[int, int]) -> dict[str, Any]:
    """One length; times in ms, rates in TF/s (4 D operations a pair)."""
    q, k, v = structured_inputs(num_tokens)
    repeats = max(3, min(30, 2**21 // num_tokens))
    result: dict[str, Any] = {"tokens": num_tokens, "vertical": vertical, "slash": slash}
    result["block_q"], result["block_k"] = blocks
    allowed = HEADS * num_tokens * (num_tokens + 1) / 2
    sampled = torch.linspace(0, num_tokens - 1, 61, device=q.device).long()
    for name, backend in (
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("flash", SDPBackend.FLASH_ATTENTION),
    ):
        with sdpa_kernel(backend):

            def dense() -> Tensor:
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                )

            result[f"{name}_ms"] = median_ms(dense, repeats=repeats)
            result[f"{name}_tflops"] = 4 * DIM * allowed / result[f"{name}_ms"] / 1e9
            if name == "cudnn":
                result["cudnn_error"] = error_on_rows(dense(), q, k, v, sampled)
    sparse = Sparse(q, k, v, vertical, slash, blocks)
    index = sparse.select()
    work = count_work(AttentionIndex(*index), sparse.geometry, num_tokens)
    result["density"] = work.covered / work.allowed
    result["probe_ms"] = median_ms(sparse.probe, repeats=repeats)
    result["select_ms"] = median_ms(sparse.select, repeats=repeats)
    result["attend_ms"] = median_ms(lambda: sparse.attend(index), repeats=repeats)
    result["sparse_ms"] = median_ms(lambda: sparse.attend(sparse.select()), repeats=repeats)
    result["attend_tflops"] = 4 * DIM * work.covered / result["attend_ms"] / 1e9
    result["speedup"] = result["cudnn_ms"] / result["sparse_ms"]
    result["error"] = error_on_rows(sparse.attend(index)[0], q, k, v, sampled)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--vertical", type=int, default=512, help="columns kept per head")
    parser.add_argument("--slash", type=int, default=2048, help="distances kept per head")
    parser.add_argument("--block-q", type=int, default=0, help="rows of a block; 0: the default")
    parser.add_argument("--block-k", type=int, default=0, help="keys of a tile; 0: the default")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    torch.cuda.set_device(arguments.device)
    executor = executor_for("triton", "cuda")
    blocks = (arguments.block_q or executor.block_q, arguments.block_k or executor.block_k)
    results = []
    for length in arguments.lengths:
        result = measure(length, arguments.vertical, arguments.slash, blocks)
        results.append(result)
        print("  ".join(f"{name} {value:.4g}" for name, value in result.items()), flush=True)
    if arguments.json:
        report = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "results": results,
        }
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
