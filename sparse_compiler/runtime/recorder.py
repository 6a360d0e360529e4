"""What really happened, per site: density and index time, kept on the device until asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.patterns.visible import row_intervals

__all__ = ["SiteRecord", "density", "drop", "read", "timed"]

_SAMPLED_BLOCKS = 64
#: The most keys of row blocks that are looked at together.
_CHUNK = 1 << 24


@dataclass
class SiteRecord:
    """The newest call of one site.

    Args:
        density: float32 [Hq] on the device of the call: computed over allowed pairs.
        num_q, num_k: sizes of the call.
        start, stop: CUDA events around the index, or seconds on the host.
    """

    density: Tensor
    num_q: int
    num_k: int
    start: torch.cuda.Event | float
    stop: torch.cuda.Event | float

    @property
    def index_ms(self) -> float:
        """Time of selection in milliseconds; waits for the device if it must."""
        if isinstance(self.start, float) and isinstance(self.stop, float):
            return (self.stop - self.start) * 1e3
        assert isinstance(self.start, torch.cuda.Event) and isinstance(self.stop, torch.cuda.Event)
        self.stop.synchronize()
        return self.start.elapsed_time(self.stop)


_records: dict[int, SiteRecord] = {}
_lock = threading.Lock()

Record = Callable[[AttentionIndex, Geometry, Tensor, int, int, Tensor | None], None]


def _now(device: torch.device) -> torch.cuda.Event | float:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


@contextmanager
def timed(site: int, device: torch.device) -> Iterator[Record]:
    """Time the block and keep what the yielded function is told; does nothing for site -1.

    While a CUDA graph is captured nothing is kept, since events in it cannot be timed.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if site < 0 or capturing:
        yield lambda *_: None
        return
    told: list[tuple[AttentionIndex, Geometry, Tensor, int, int, Tensor | None]] = []
    start = _now(device)
    yield lambda *arguments: told.append(arguments)
    stop = _now(device)
    for index, geometry, rows, num_q, num_k, bounds in told:
        share = density(index, geometry, rows, num_q, num_k, bounds)
        with _lock:
            _records[site] = SiteRecord(share, num_q, num_k, start, stop)


def read(site: int) -> SiteRecord | None:
    """The newest record of a site, or None if it has not run sparse yet."""
    with _lock:
        return _records.get(site)


def drop(sites: set[int]) -> None:
    """Forget these sites."""
    with _lock:
        for site in sites:
            _records.pop(site, None)


def density(
    index: AttentionIndex,
    geometry: Geometry,
    rows: Tensor,
    num_q: int,
    num_k: int,
    bounds: Tensor | None = None,
) -> Tensor:
    """Share of the pairs allowed by the mask's band and bounds that the index covers, float32 [Hq].

    Counted exactly on up to 64 evenly spaced row blocks; keys hidden by padding inside the visible
    span count as allowed, and so do rows before q_start (but not with bounds) and pairs that a bias
    hides. No host synchronisation.
    """
    device = rows.device
    blocks = geometry.num_row_blocks(num_q)
    taken = min(blocks, _SAMPLED_BLOCKS)
    step = torch.arange(taken, device=device) * (blocks - 1) // max(1, taken - 1)
    if bounds is None:
        sample = _Sample(geometry, rows.long(), step)
        band, listed = _band_pairs(index, sample), _block_pairs(index, sample)  # [B, S], [B, T]
        allowed = sample.allowed()
    else:
        intervals = row_intervals(geometry, num_q, rows, bounds)
        band, listed, allowed = _pairs_between(index, geometry, rows, intervals, (step, num_k))
    pairs = torch.cat([band, listed, torch.zeros_like(rows[:, :1], dtype=torch.float32)], dim=1)
    slots = index.slots.long()
    width = band.shape[1] + listed.shape[1]
    block_place = torch.where(slots[:, 1] >= 0, band.shape[1] + slots[:, 1], width)
    place = torch.where(slots[:, 0] >= 0, slots[:, 0], block_place)
    return pairs.sum(0)[place] / allowed.sum().clamp(min=1)


class _Sample:
    """Some row blocks of each batch entry, and how many of their rows see a key.

    Args:
        geometry: mask and blocking.
        rows: int64 [B, 5].
        step: int64 [m], numbers of the row blocks.
    """

    def __init__(self, geometry: Geometry, rows: Tensor, step: Tensor) -> None:
        size = geometry.block_q
        self.geometry, self.step = geometry, step
        self.kv_start, self.kv_end = rows[:, 3, None], (rows[:, 3] + rows[:, 4])[:, None]
        self.end = rows[:, 2, None] + (step + 1) * size  # [B, m], position past the block
        row_end = (rows[:, 0] + rows[:, 1])[:, None]
        # Rows that the block has room for and the batch entry has not, at the block's end.
        self.missing = ((step + 1) * size - row_end).clamp(0, size)  # [B, m]
        self.last_missing = -row_end % size  # [B, 1], of the one block that is cut

    def rows_that_see(self, distance: Tensor, missing: Tensor | int) -> Tensor:
        """How many of a block's real rows see a key at ``distance`` from the block's end.

        Row i of the block is at distance r = M - i from the end, r = missing + 1 .. M, and sees the
        key at x if x - left <= r <= x + right.
        """
        left, right, size = self.geometry.left, self.geometry.right, self.geometry.block_q
        upper = distance + right if right >= 0 else torch.full_like(distance, size)
        lower = distance - left if left >= 0 else torch.ones_like(distance)
        first = torch.maximum(lower, torch.zeros_like(lower) + missing + 1)
        return (upper.clamp(max=size) - first + 1).clamp(min=0)

    def allowed(self) -> Tensor:
        """Allowed pairs of each block, float32 [B, m], in closed form per row."""
        size = self.geometry.block_q
        row = torch.arange(size, device=self.end.device)
        position = self.end[..., None] - size + row
        first = self.kv_start[..., None].expand_as(position)
        last = self.kv_end[..., None].expand_as(position) - 1
        if self.geometry.left >= 0:
            first = torch.maximum(first, position - self.geometry.left)
        if self.geometry.right >= 0:
            last = torch.minimum(last, position + self.geometry.right)
        real = row < size - self.missing[..., None]
        return torch.where(real, (last - first + 1).clamp(min=0), 0).sum(-1).float()


def _band_pairs(index: AttentionIndex, sample: _Sample) -> Tensor:
    covered = index.covered
    batch, slots, size = covered.shape
    x = torch.arange(size, device=covered.device)
    high = (sample.end - sample.kv_start + 1).clamp(0, size)
    low = (sample.end - sample.kv_end + 1).clamp(0, size)

    def tiles(missing: Tensor | int) -> Tensor:
        """Pairs of the band in each block, [B, S, m], if that many rows are missing."""
        weight = covered.float() * sample.rows_that_see(x.expand(batch, 1, size), missing)
        total = torch.nn.functional.pad(weight.cumsum(-1, dtype=torch.float32), (1, 0))
        reach = [t[:, None].expand(batch, slots, -1) for t in (high, low)]
        return (total.gather(2, reach[0]) - total.gather(2, reach[1])).clamp(min=0)

    missing = sample.missing[:, None]
    cut = torch.where(missing < sample.geometry.block_q, tiles(sample.last_missing[..., None]), 0.0)
    band = torch.where(missing == 0, tiles(0), cut)
    listed = torch.arange(index.columns.shape[2], device=covered.device)
    distance = sample.end[:, None, :, None] - index.columns[:, :, None].long()  # [B, S, m, C]
    lookup = covered[:, :, None].expand(-1, -1, sample.end.shape[1], -1)
    taken = lookup.gather(3, distance.clamp(0, size - 1)) > 0
    keep = (listed < index.num_columns[..., None, None]) & (distance > 0) & ~taken
    pairs = torch.where(keep, sample.rows_that_see(distance, missing[..., None]), 0)
    return band.sum(-1) + pairs.sum((2, 3)).float()


def _block_pairs(index: AttentionIndex, sample: _Sample) -> Tensor:
    """In closed form: a launch for each key of a block would take longer than the attention."""
    geometry = sample.geometry
    blocks = index.blocks[:, :, sample.step].long()  # [B, T, m, K]
    count = index.num_blocks[:, :, sample.step]
    listed = torch.arange(blocks.shape[3], device=blocks.device) < count[..., None]
    start = torch.maximum(blocks * geometry.block_k, sample.kv_start[:, None, :, None])
    stop = torch.minimum((blocks + 1) * geometry.block_k, sample.kv_end[:, None, :, None])
    stop = torch.maximum(stop, start)
    low = (sample.end - geometry.block_q)[:, None, :, None]
    high = (sample.end - sample.missing)[:, None, :, None]
    if geometry.right >= 0:
        pairs = _pairs_up_to(start - geometry.right, stop - geometry.right, low, high)
    else:
        pairs = (stop - start) * (high - low)
    if geometry.left >= 0:
        after = geometry.left + 1
        pairs = pairs - _pairs_up_to(start + after, stop + after, low, high)
    return torch.where(listed, pairs, 0).sum((2, 3)).float()


def _pairs_up_to(start: Tensor, stop: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Pairs of a number in start..stop - 1 and one in low..high - 1 that is no smaller; int64."""

    def beyond(first: Tensor) -> Tensor:
        """Those of all numbers from ``first`` on: a triangle, and a rectangle before it."""
        height = (high - torch.maximum(first, low)).clamp(min=0)
        return height * (height + 1) // 2 + (low - first).clamp(min=0) * (high - low)

    return beyond(start) - beyond(stop)


def _pairs_between(
    index: AttentionIndex,
    geometry: Geometry,
    rows: Tensor,
    intervals: tuple[Tensor, Tensor],
    sample: tuple[Tensor, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs [B, S] and [B, T] of the sampled row blocks, and allowed pairs, where each row sees an
    interval of its own: a block's keys as a bit each, summed up to the ends of its rows' intervals.

    Args:
        intervals: as from ``row_intervals``.
        sample: numbers of the row blocks, int64 [m], and Lk.
    """
    (low, high), (steps, num_k), size = intervals, sample, geometry.block_q
    pad = (0, -low.shape[1] % size)
    low = torch.nn.functional.pad(low, pad, value=1).unflatten(1, (-1, size))
    high = torch.nn.functional.pad(high, pad, value=0).unflatten(1, (-1, size))
    high = torch.maximum(high, low - 1)
    key = torch.arange(num_k, device=rows.device)
    band = torch.zeros_like(index.num_full, dtype=torch.float32)
    listed = torch.zeros_like(index.num_blocks[..., 0], dtype=torch.float32)
    for part in steps.split(max(1, _CHUNK // (num_k * max(1, band.numel(), listed.numel())))):
        ends = [t.index_select(1, part).clamp(0, num_k)[:, None] for t in (low, high + 1)]
        last = rows[:, 2, None].long() + (part + 1) * size
        for total, held in (
            (band, _band_keys(index, key, last)),
            (listed, _block_keys(index, geometry, key, part)),
        ):
            up_to = torch.nn.functional.pad(held.cumsum(-1, dtype=torch.int32), (1, 0))
            first, past = (up_to.gather(3, t.expand(-1, held.shape[1], -1, -1)) for t in ends)
            total += (past - first).sum((2, 3))
    allowed = (high - low + 1).index_select(1, steps)
    return band, listed, allowed.float()


def _band_keys(index: AttentionIndex, key: Tensor, end: Tensor) -> Tensor:
    """Keys that the band slots cover in row blocks that end at ``end`` [B, m]: bool [B, S, m, Lk]."""
    batch, slots, size = index.covered.shape
    distance = (end[..., None] - key)[:, None].expand(-1, slots, -1, -1)
    covered = index.covered[:, :, None].expand(-1, -1, end.shape[1], -1)
    held = covered.gather(3, distance.clamp(0, size - 1)).bool()
    held &= (distance > 0) & (distance < size)
    listed = torch.arange(index.columns.shape[2], device=key.device)
    real = listed < index.num_columns[..., None]
    column = torch.where(real, index.columns.long(), key.shape[0])
    columns = torch.zeros(batch, slots, key.shape[0] + 1, dtype=torch.bool, device=key.device)
    return held | columns.scatter_(2, column, True)[:, :, None, :-1]


def _block_keys(index: AttentionIndex, geometry: Geometry, key: Tensor, steps: Tensor) -> Tensor:
    """Keys that the block slots cover in row blocks ``steps`` [m]: bool [B, T, m, Lk]."""
    blocks = index.blocks.index_select(2, steps).long()
    count = index.num_blocks.index_select(2, steps)
    real = torch.arange(blocks.shape[3], device=key.device) < count[..., None]
    most = geometry.num_key_blocks(key.shape[0])
    held = torch.zeros(*blocks.shape[:3], most + 1, dtype=torch.bool, device=key.device)
    held.scatter_(3, torch.where(real, blocks, most), True)
    return held.index_select(3, key // geometry.block_k)
