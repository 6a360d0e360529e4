"""The micro-benchmarks of ``minference tune``: a few milliseconds each, medians by CUDA events."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparse_compiler.codegen.attention_work import (
    amounts_dense,
    amounts_scoring,
    amounts_sparse,
    scoring,
)
from sparse_compiler.codegen.choose import SCHEDULES, TILES
from sparse_compiler.codegen.constants import DENSE, Constants, tile_key
from sparse_compiler.codegen.cost import Amounts
from sparse_compiler.codegen.resources import Resources
from sparse_compiler.config import cache_directory
from sparse_compiler.errors import ExecutorUnavailable
from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.ir.shape import SiteShape
from sparse_compiler.patterns import registry
from sparse_compiler.runtime.tune_fit import SCORE, SELECT, Sample
from sparse_compiler.runtime.tune_index import (
    BandPlan,
    band_index,
    block_index,
    with_few_directions,
)

__all__ = ["Bench", "Sizes"]

_LOGGER = logging.getLogger(__name__)
Attend = Callable[[Tensor, Tensor, Tensor, AttentionIndex, Geometry], Any]
Step = tuple[str, Callable[[], list[Sample]]]
Plan = BandPlan | int
_SCORED = "low_rank"
_COMPILERS = 4
"""Threads; more would hold more inputs at a time."""


@dataclass(frozen=True)
class Case:
    """One call: a key of ``Constants.tiles``, sizes, and a band or a number of blocks."""

    key: str
    shape: SiteShape
    geometry: Geometry
    plan: Plan


@dataclass(frozen=True)
class Sizes:
    """What is measured, in tokens.

    Args:
        heads, kv_heads: of every call.
        short, long: lengths of sparse calls; ``far``: of one that overflows the L2 cache, or 0.
        dense: lengths of dense calls.  select: of selection, and of scoring rows.
        unit: scales the number of tiles, keys and blocks listed.
    """

    heads: int = 32
    kv_heads: int = 8
    short: int = 16384
    long: int = 32768
    far: int = 131072
    dense: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072, 262144)
    select: tuple[int, ...] = (8192, 32768, 131072)
    unit: int = 32


QUICK = Sizes(far=0, dense=(4096, 8192, 16384, 32768), select=(8192, 32768))


class Bench:
    """Measures one device.

    Args:
        device: number of a CUDA device, or a ``torch.device``.
        attends: schedule -> how it is called; None takes the generated kernels.
    Raises:
        ExecutorUnavailable: the device does not exist or cannot run the generated kernels.
    """

    def __init__(
        self, device: int | torch.device, attends: Mapping[str, Attend] | None = None
    ) -> None:
        self.device = device if isinstance(device, torch.device) else torch.device("cuda", device)
        self.reports: dict[str, Resources] = {}
        if self.device.type != "cuda":
            self.name = self.device.type
        elif torch.cuda.is_available() and self.device.index < torch.cuda.device_count():
            self.name = torch.cuda.get_device_name(self.device)
        else:
            raise ExecutorUnavailable(
                "device of `minference tune`",
                "a CUDA device that PyTorch sees",
                str(self.device),
                fix="Run it on the machine whose constants are wanted.",
            )
        self._attends = attends if attends is not None else self._generated()

    def current(self) -> AbstractContextManager[object]:
        """Makes the device current in this thread: launches and events go to the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def bandwidths(self, start: Constants) -> Constants:
        """``start`` with this device's memory bandwidth, launch time and cache size."""
        if self.device.type != "cuda":
            return start
        source = torch.empty(2**28, dtype=torch.int32, device=self.device)
        target = torch.empty_like(source)
        copy = self._median(lambda: target.copy_(source))
        one = torch.zeros(1, device=self.device)

        def many() -> None:
            for _ in range(200):
                one.add_(1)

        properties = torch.cuda.get_device_properties(self.device)
        return replace(
            start,
            hbm=copy / (2 * source.nbytes / 1e9),
            launch=self._median(many) / 200,
            l2_size=float(properties.L2_cache_size),
        )

    def steps(self, *, quick: bool = False, sizes: Sizes | None = None) -> list[Step]:
        """What to measure, in order, with names for a progress bar."""
        sizes = sizes or (QUICK if quick else Sizes())
        steps: list[Step] = [("dense attention", lambda: self._dense(sizes))]
        steps.append(("compiling", lambda: self._compile(sizes)))
        steps += [
            (name, lambda cases=cases: self._measure(cases)) for name, cases in self._kernels(sizes)
        ]
        steps.append(("selection", lambda: self._select(sizes)))
        steps.append(("scoring rows", lambda: self._score(sizes)))
        return steps

    def _median(self, function: Callable[[], Any]) -> float:
        """Milliseconds of a call: median of 3 to 30, about 100 ms in all, after two."""
        for _ in range(2):
            function()
        times: list[float] = []
        while len(times) < 3 or (len(times) < 30 and sum(times) < 100):
            times.append(self._once(function))
        return sorted(times)[len(times) // 2]

    def _once(self, function: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            before = time.perf_counter()
            function()
            return (time.perf_counter() - before) * 1e3
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def _inputs(self, shape: SiteShape) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        dtype = getattr(torch, shape.dtype)

        def normal(heads: int, tokens: int, width: int) -> Tensor:
            made = torch.randn(
                1,
                heads,
                tokens,
                width,
                generator=generator,
                device=self.device,
                dtype=torch.float32,
            )
            return made.to(dtype)

        return (
            normal(shape.heads, shape.num_q, shape.head_dim),
            normal(shape.kv_heads, shape.num_k, shape.head_dim),
            normal(shape.kv_heads, shape.num_k, shape.value_dim),
        )

    def _shape(self, sizes: Sizes, tokens: int, width: int = 128) -> SiteShape:
        return SiteShape(1, sizes.heads, sizes.kv_heads, tokens, tokens, width, width)

    def _dense(self, sizes: Sizes) -> list[Sample]:
        found = []
        for tokens, width in [(n, 128) for n in sizes.dense] + [(n, 64) for n in sizes.dense[1:4]]:
            shape = self._shape(sizes, tokens, width)
            q, k, v = self._inputs(shape)

            def call(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                )

            name = f"{tokens} tokens, D {width}"
            found.append(Sample(DENSE, name, amounts_dense(shape), self._median(call)))
        return found

    def _cases(self, key: str, tile: tuple[int, int], kind: str, sizes: Sizes) -> list[Case]:
        """Lengths, head sizes and index plans of one kernel, or of its blocks' twin."""
        unit, short, long = sizes.unit, sizes.short, sizes.long
        if kind == "blocks":
            wide = max(1, unit * 64 // tile[1])
            plans: list[tuple[int, int, Plan]] = [
                (short, 128, wide),
                (long, 128, 2 * wide),
                (long, 64, 2 * wide),
                (sizes.far, 128, 2 * wide),
            ]
        else:
            plans = [
                (short, 128, BandPlan(tiles=unit)),
                (short, 128, BandPlan(tiles=unit // 8)),
                (long, 128, BandPlan(tiles=3 * unit)),
                (long, 128, BandPlan(tiles=unit, edges=6 * unit, edge_keys=24)),
                (long, 128, BandPlan(tiles=unit, columns=30 * unit)),
                (long, 128, BandPlan(edges=12 * unit, edge_keys=16)),
                (short, 128, BandPlan(tiles=unit, edges=6 * unit, columns=15 * unit)),
                (long, 64, BandPlan(tiles=3 * unit)),
                (long, 64, BandPlan(tiles=unit, edges=6 * unit)),
                (sizes.far, 128, BandPlan(tiles=2 * unit, columns=15 * unit)),
            ]
        geometry = Geometry(0, -1, 0, *tile)
        return [
            Case(key, self._shape(sizes, tokens, width), geometry, plan)
            for tokens, width, plan in plans
            if tokens
        ]

    def _kernels(self, sizes: Sizes) -> list[tuple[str, list[Case]]]:
        """Every kernel by name, with its cases."""
        found = []
        for schedule in SCHEDULES:
            kinds = SCHEDULES[schedule] if schedule in self._attends else {}
            for tile in TILES:
                key = tile_key(schedule, *tile)
                found += [
                    (f"{key} {kind}", self._cases(key, tile, kind, sizes))
                    for kind, tiles in kinds.items()
                    if tile in tiles
                ]
        return found

    def _compile(self, sizes: Sizes) -> list[Sample]:
        """Call every kernel once, several at a time: compiling is most of the wait."""
        cases = [
            case
            for _, found in self._kernels(sizes)
            for case in found
            if case.shape.num_k <= sizes.long
        ]
        with ThreadPoolExecutor(_COMPILERS) as pool:
            for done in [pool.submit(lambda case=case: self._call(case)[0]()) for case in cases]:
                with suppress(ExecutorUnavailable):  # reported when it is measured
                    done.result()
        return []

    def _call(self, case: Case) -> tuple[Callable[[], Any], Amounts]:
        """A call of a case's kernel, and its work without that of building the index."""
        geometry, shape = case.geometry, case.shape
        if isinstance(case.plan, BandPlan):
            index, covered = band_index(shape, geometry, case.plan, self.device)
        else:
            index, covered = block_index(shape, geometry, case.plan, self.device)
        amounts = amounts_sparse(shape, covered, geometry.block_q, geometry.block_k)
        amounts = replace(amounts, index_keys=0.0, index_pairs=0.0, has_index=0.0)
        q, k, v = self._inputs(shape)
        attend = self._attends[case.key.partition(":")[0]]

        def call() -> Any:
            with self.current():
                return attend(q, k, v, index, geometry)

        return call, amounts

    def _measure(self, cases: list[Case]) -> list[Sample]:
        found = []
        for case in cases:
            call, amounts = self._call(case)
            name = f"{case.shape.num_k} tokens, D {case.shape.head_dim}, {case.plan}"
            try:
                found.append(Sample(case.key, name, amounts, self._median(call)))
            except ExecutorUnavailable as error:
                # Without samples the tile has no constants, and is never chosen.
                _LOGGER.warning("%s is left out: %s", case.key, error)
        return found

    def _select(self, sizes: Sizes) -> list[Sample]:
        from sparse_compiler.runtime.tune_kernels import select

        found = []
        for pattern in ("vertical_slash", "block_sparse"):
            for tokens in sizes.select:
                shape = self._shape(sizes, tokens)
                q, k, _ = self._inputs(shape)
                triples = 0.0
                if pattern == "block_sparse":
                    triples = shape.heads * (tokens / 64) ** 2
                amounts = Amounts(
                    tiles=0,
                    asked=0,
                    flops=0,
                    exponents=0,
                    streamed=0,
                    launches=0,
                    index_keys=float(shape.heads * tokens),
                    index_pairs=triples,
                    has_index=1,
                )
                call = select(pattern, q, k)
                found.append(
                    Sample(SELECT, f"{pattern}, {tokens} tokens", amounts, self._median(call))
                )
        return found

    def _score(self, sizes: Sizes) -> list[Sample]:
        """Selection by the pattern of ``auto``, for all heads of D 128 and a quarter of D 64."""
        from sparse_compiler.runtime.tune_kernels import select

        found = []
        few = max(1, sizes.kv_heads // 4)
        narrow = replace(sizes, heads=few * (sizes.heads // sizes.kv_heads), kv_heads=few)
        head = registry.get(_SCORED).default()
        for part, width in ((sizes, 128), (narrow, 64)):
            for tokens in sizes.select:
                shape = self._shape(part, tokens, width)
                q, k, _ = self._inputs(shape)
                call = select(_SCORED, *with_few_directions(q, k))
                amounts = amounts_scoring(scoring(head, shape, 64))
                name = f"{_SCORED}, {tokens} tokens, {shape.heads} heads, D {width}"
                found.append(Sample(SCORE, name, amounts, self._median(call)))
        return found

    def _generated(self) -> dict[str, Attend]:
        from sparse_compiler.runtime.tune_kernels import generated

        return generated(self.device, cache_directory(), self.reports)
