"""Timing several ways alternately, so that a drifting clock cannot favour one of them.

The device is kept busy for a moment before each call, so that the host can enqueue all of it: times
are the device's, as in a model whose layers follow each other. What the host needs is kept apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

__all__ = ["Timing", "Ways", "timed_rounds"]

Ways = dict[str, Callable[[], Callable[[], Any]]]
"""Name -> maker of the call; making it may fail like calling it."""

LEAD_CYCLES = 4_000_000  # about 2 ms
SLOW_MS, SLOW_ROUNDS = 3000.0, 3
"""A call this slow takes part in this many rounds only."""


@dataclass
class Timing:
    """What the rounds gave.

    Args:
        ms: times of each way, round by round from the first.
        host_ms: what the host took to enqueue each call.
        peak_mib: memory that a call takes beyond what lay there before it.
        failed: why a way has no times.
    """

    ms: dict[str, list[float]] = field(default_factory=dict)
    host_ms: dict[str, list[float]] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return median(self.ms[name])

    def ratio(self, over: str, under: str) -> float:
        """Median of the ratios of rounds that both took part in."""
        pairs = zip(self.ms[over], self.ms[under], strict=False)
        return median(a / b for a, b in pairs)


def _milliseconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Of the device, and of the host."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(LEAD_CYCLES)
    start.record()
    begin = perf_counter()
    call()
    host = perf_counter() - begin
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop), host * 1e3


def _warm_up(call: Callable[[], Any]) -> tuple[float, float]:
    """(ms, MiB) of the third call; the first compiles, the second fills caches."""
    call()
    torch.cuda.synchronize()
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ms, _ = _milliseconds(call)
    return ms, (torch.cuda.max_memory_allocated() - before) / 2**20


def timed_rounds(ways: Ways, rounds: int, console: Console, may_fail: Collection[str]) -> Timing:
    """Warm up each way, then call them in turn for a number of rounds.

    Args:
        ways: what to time, on the current CUDA device.
        rounds: at least 1.
        console: where progress goes.
        may_fail: ways whose errors are recorded as text; those of others are raised.
    """
    timing = Timing()
    calls: dict[str, Callable[[], Any]] = {}
    last: dict[str, int] = {}
    for name, make in ways.items():
        try:
            call = make()
            ms, timing.peak_mib[name] = _warm_up(call)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
            if name not in may_fail:
                raise
            # The first line says what; compilers append pages.
            text = (str(error).strip().splitlines() or [""])[0]
            timing.failed[name] = f"{type(error).__name__}: {text}"[:500]
            console.print(f"  {name}: [red]{timing.failed[name]}[/]", highlight=False)
            torch.cuda.empty_cache()
            continue
        calls[name], timing.ms[name], timing.host_ms[name] = call, [], []
        last[name] = rounds if ms < SLOW_MS else min(rounds, SLOW_ROUNDS)
        console.print(f"  {name}: warm {ms:.3f} ms, {timing.peak_mib[name]:.0f} MiB")
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("rounds", total=sum(last.values()))
        for number in range(rounds):
            for name, call in calls.items():
                if number < last[name]:
                    ms, host_ms = _milliseconds(call)
                    timing.ms[name].append(ms)
                    timing.host_ms[name].append(host_ms)
                    bar.advance(task)
    return timing
