"""What a device costs: the constants of the cost model, and those that the package ships.

All constants are milliseconds of the whole device for a unit of work, so that predicted times are
sums of products and constants can be fitted by non-negative least squares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import msgspec

__all__ = ["DENSE", "Constants", "Shipped", "TileConstants", "shipped", "tile_key"]

DENSE = "dense"
"""Key of the dense kernel among a device's tiles."""


def tile_key(schedule: str, block_q: int, block_k: int) -> str:
    """Key of a tile among a device's tiles, e.g. ``plain:64x64``."""
    return DENSE if schedule == DENSE else f"{schedule}:{block_q}x{block_k}"


@dataclass(frozen=True, kw_only=True)
class TileConstants:
    """One dense tile's latencies under one schedule, per unit of work.

    Args:
        matrix: ms per 1e12 floating-point operations of matrix products (1000 / TF/s).
        exponent: ms per 1e9 exponentials, with the rest of the softmax.
        gather: ms per 1e6 entries loaded through a list of single places.
        test: ms per 1e6 entries that are tested as well (columns: looked up, masked).
        program: ms per 1e3 programs: start, searches, queries in, results out.
    """

    matrix: float
    exponent: float = 0.0
    gather: float = 0.0
    test: float = 0.0
    program: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Constants:
    """One device.

    Args:
        device: its name, as PyTorch reports it.
        origin: where the numbers come from, for people.
        tiles: by ``tile_key``; must hold ``dense``.
        l2, hbm: ms per 1e9 bytes streamed from the L2 cache and from memory, at best.
        miss: ms per 1e9 bytes that tiles ask for and the L2 cache has lost.
        l2_size: bytes of the L2 cache.
        launch: ms of one kernel launch.
        select: ms of building any index.
        select_key: ms per 1e6 (key, head) pairs scanned by selection.
        select_pair: ms per 1e9 (row block, key block, head) triples ranked by selection.
        score: ms per 1e12 floating-point operations of scoring rows one by one.
        score_row: ms per 1e6 (row, head) pairs so scored, whatever their keys.
        score_start: ms of a layer with such rows: finding what they are scored against.
        score_host: ms that the host takes to enqueue such a layer, at least as long as it takes; 0
            where the other constants hold it, as those of ``minference tune`` do.
    """

    device: str
    origin: str
    tiles: Mapping[str, TileConstants]
    l2: float
    hbm: float
    miss: float
    l2_size: float
    launch: float
    select: float
    select_key: float
    select_pair: float
    score: float
    score_row: float
    score_start: float
    score_host: float = 0.0


@dataclass(frozen=True)
class Shipped:
    """One entry of ``devices.json``.

    Args:
        match: part of a device name, lower case; "" matches every device.
        measured: fitted to a run on such a device; else an estimate from data sheets and the
            nearest measured device.
        target: compilation target, whose limits hold.
        note: what a reader should do.
        reports: compilers' reports, as ``choose_tile`` takes them.
    """

    match: str
    measured: bool
    target: str
    constants: Constants
    note: str = ""
    reports: Mapping[str, dict[str, int]] = field(default_factory=dict)


@cache
def _all() -> tuple[Shipped, ...]:
    text = (Path(__file__).parent / "devices.json").read_bytes()
    return msgspec.json.decode(text, type=tuple[Shipped, ...], strict=True)


def shipped(device: str) -> Shipped:
    """The shipped constants nearest to a device name; the last entry fits all."""
    name = device.lower()
    return next(entry for entry in _all() if entry.match in name)
