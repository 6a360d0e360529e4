"""The CPU executor: gathers each row block's keys into a dense tile and runs PyTorch's own kernel.

Work items (one head, one row block) are independent, so they are spread over single-threaded
workers instead of splitting each small product over all cores: on two cores that is worth a factor
1.5 (docs/design/0004-cpu-executor.md).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.runtime.cpu_rows import BatchEntry, Logits, attend_row_block
from sparse_compiler.runtime.executor import Executor, Problem
from sparse_compiler.runtime.probe import probe_torch

__all__ = ["CpuExecutor"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Workers:
    """A pool of single-threaded workers, one for each thread PyTorch may use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._key = (0, 0)

    def run(self, function: Callable[[int], None], count: int) -> None:
        """Call ``function(0) .. function(count - 1)`` in parallel; the first error is raised."""
        size = torch.get_num_threads()
        if size == 1 or count == 1:
            for item in range(count):
                function(item)
            return
        inference = torch.is_inference_mode_enabled()

        def task(item: int) -> None:
            with torch.inference_mode(inference), torch.no_grad():
                function(item)

        for _ in self._pool_of(size).map(task, range(count)):
            pass

    def _pool_of(self, size: int) -> ThreadPoolExecutor:
        with self._lock:
            # Threads do not survive a fork: a child process needs a pool of its own.
            key = (os.getpid(), size)
            if self._pool is None or self._key != key:
                ready = threading.Barrier(size + 1)

                def start() -> None:
                    torch.set_num_threads(1)
                    ready.wait()

                pool = ThreadPoolExecutor(size, "sparse_compiler", initializer=start)
                for _ in range(size):
                    pool.submit(lambda: None)
                ready.wait()
                # The call in the workers also changed the default of threads yet to be started.
                torch.set_num_threads(size)
                self._pool, self._key = pool, key
        return self._pool


_WORKERS = _Workers()


class CpuExecutor(Executor):
    """Gathered tiles through ``_scaled_dot_product_flash_attention_for_cpu``.

    That kernel knows no soft cap; tiles with one go through plain operations.
    """

    name = "cpu"
    block_q = 256
    block_k = 64
    min_tokens = 8192
    min_queries = 512
    auto = HeadPattern("vertical_slash", 512, 100)

    def obstacles(self, problem: Problem) -> list[str]:
        found = []
        if problem.device_type != "cpu":
            found.append(f"device is {problem.device_type}, not cpu")
        if problem.dtype not in _DTYPES:
            found.append(f"dtype {problem.dtype} is not one of {_DTYPES}")
        return found

    def probe(
        self,
        q: Tensor,
        k: Tensor,
        heads: Tensor,
        first_row: Tensor,
        geometry: Geometry,
        *,
        scale: float,
        rows: Tensor,
        key_mask: Tensor | None,
        num_rows: int,
        bounds: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return probe_torch(
            q,
            k,
            heads,
            first_row,
            geometry,
            scale=scale,
            rows=rows,
            key_mask=key_mask,
            num_rows=num_rows,
            bounds=bounds,
            bias=bias,
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: AttentionIndex,
        geometry: Geometry,
        *,
        scale: float,
        softcap: float,
        rows: Tensor,
        key_mask: Tensor | None,
        bounds: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if scale <= 0:
            # PyTorch's causal kernel multiplies its -inf by the scale: keep that positive.
            q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
        batch, num_heads, num_q, _ = q.shape
        value_dim = v.shape[3]
        if value_dim != q.shape[3]:
            q, k, v = _same_head_dim(q, k, v)
        out = torch.zeros(batch, num_heads, num_q, v.shape[3], dtype=q.dtype)
        lse = torch.full((batch, num_heads, num_q), float("-inf"), dtype=torch.float32)
        entries = [
            _entry((q[b], k[b], v[b]), rows[b].tolist(), *_of_entry(b, key_mask, bounds, bias))
            for b in range(batch)
        ]
        logits = Logits(scale, softcap)
        slots = index.slots.tolist()
        blocks = geometry.num_row_blocks(num_q)
        plans = {
            (b, s): _BandPlan(index, geometry, b, s)
            for b in range(batch)
            for s in range(index.full.shape[1])
        }

        def work(item: int) -> None:
            # Longest rows first; heads of one block together, they share the block of q in cache.
            m = blocks - 1 - item // (batch * num_heads)
            b, h = divmod(item % (batch * num_heads), num_heads)
            band, listed = slots[h]
            entry = entries[b]
            if band >= 0:
                near, far = plans[b, band].keys(entry, m)
            elif listed >= 0:
                near, far = _block_keys(index, geometry, entry, (b, listed, m))
            else:
                return
            attend_row_block(entry, geometry, h, m, near, far, logits, out[b, h], lse[b, h])

        _WORKERS.run(work, batch * num_heads * blocks)
        return out[..., :value_dim], lse


def _same_head_dim(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero-pad so that D = Dv, which the kernel wants; zeros change no score and no output."""
    dim = max(q.shape[3], v.shape[3])
    padded = [torch.nn.functional.pad(t, (0, dim - t.shape[3])) for t in (q, k, v)]
    return padded[0], padded[1], padded[2]


def _of_entry(
    b: int, key_mask: Tensor | None, bounds: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The mask's operands of batch entry b; a table by distance serves all entries."""
    if bias is not None and bias.dim() == 4:
        bias = bias[b if bias.shape[0] > 1 else 0]
    return (
        None if key_mask is None else key_mask[b],
        None if bounds is None else bounds[b],
        bias,
    )


def _entry(
    qkv: tuple[Tensor, Tensor, Tensor],
    row: list[int],
    key_mask: Tensor | None,
    bounds: Tensor | None,
    bias: Tensor | None,
) -> BatchEntry:
    q_start, q_len, q_offset, kv_start, kv_len = row
    kv_end = kv_start + kv_len
    if key_mask is not None and bool(key_mask[kv_start:kv_end].all()):
        key_mask = None
    place = (q_start, q_start + q_len, q_offset, kv_start, kv_end)
    return BatchEntry(*qkv, *place, key_mask, bounds, bias)


class _BandPlan:
    """Keys of one band slot for any row block, from its distance space."""

    def __init__(self, index: AttentionIndex, geometry: Geometry, batch: int, slot: int) -> None:
        self.geometry = geometry
        self.covered = index.covered[batch, slot].bool()
        distances = self.covered.nonzero()[:, 0]
        # Inside the block: a row of it may lie before the key (x = M needs no test, but with it the
        # block's own keys are one causal square). Beyond the window of the last row: some row may
        # not see it. Both are tested by value, the rest needs no test.
        tested = distances <= geometry.block_q
        if geometry.left >= 0:
            tested |= distances > geometry.left + 1
        self.near = distances[tested]
        self.far = distances[~tested]
        self.columns = index.columns[batch, slot, : int(index.num_columns[batch, slot])].long()

    def keys(self, entry: BatchEntry, m: int) -> tuple[Tensor, Tensor]:
        """(tested, untested) key positions of row block m."""
        geometry = self.geometry
        first = entry.q_offset + m * geometry.block_q
        end = first + geometry.block_q
        columns = self.columns[: int(torch.searchsorted(self.columns, end))]
        columns = columns[~self.covered[end - columns]]
        cut = int(torch.searchsorted(columns, first, right=True))
        early, late = columns[:cut], columns[cut:]
        if geometry.left >= 0:
            inside = early >= end - 1 - geometry.left
            early, late = early[inside], torch.cat([early[~inside], late])
        near = torch.cat([end - self.near, late])
        far = torch.cat([end - self.far, early])
        return _visible(near, entry), _visible(far, entry)


def _block_keys(
    index: AttentionIndex, geometry: Geometry, entry: BatchEntry, place: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """(tested, untested) key positions of one row block of a block slot."""
    b, slot, m = place
    count = int(index.num_blocks[b, slot, m])
    size = geometry.block_k
    start = index.blocks[b, slot, m, :count].long() * size
    first = entry.q_offset + m * geometry.block_q
    tested = torch.zeros_like(start, dtype=torch.bool)
    if geometry.right >= 0:
        tested |= start + size - 1 > first + geometry.right
    if geometry.left >= 0:
        tested |= start < first + geometry.block_q - 1 - geometry.left
    lanes = torch.arange(size)
    near = (start[tested][:, None] + lanes).flatten()
    far = (start[~tested][:, None] + lanes).flatten()
    return _visible(near, entry), _visible(far, entry)


def _visible(keys: Tensor, entry: BatchEntry) -> Tensor:
    keep = (keys >= entry.kv_start) & (keys < entry.kv_end)
    keys = keys[keep]
    return keys if entry.key_mask is None else keys[entry.key_mask[keys]]
