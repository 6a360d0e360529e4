"""Compiling several kernels at once, before anybody launches them.

A model needs a few kernels, each seconds of work. Triton's passes and the assembler release
Python's lock, so threads suffice, and no process has to be forked beside a CUDA context: four
``attend`` kernels took 6.1 s with one thread, 4.3 s with two, 2.5 s with four (16 cores, sm_90).
The results are in the kernel cache: a first launch finds them there, in this process or another.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from sparse_compiler.runtime.kernel_cache import KernelCache, load_kernels

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

    from sparse_compiler.runtime.ahead import Launch

__all__ = ["Prepared", "prepare"]

_MAX_WORKERS = 8


@dataclass(frozen=True)
class Prepared:
    """What became of one launch.

    Args:
        launch: what was asked for.
        shared: bytes of shared memory of a program; not compared with the device's limit.
        seconds: wall-clock time; small if the cache had it.
        error: why it does not compile; empty if it does.
    """

    launch: Launch
    shared: int
    seconds: float
    error: str = ""


def prepare(
    cache: KernelCache,
    launches: Sequence[Launch],
    *,
    target: GPUTarget | None = None,
    workers: int | None = None,
) -> tuple[Prepared, ...]:
    """Compile ``launches`` concurrently and keep the results in ``cache``.

    Args:
        cache: the cache of the executor that will launch them.
        launches: kernels and how they will be launched; see ``ahead.Launch``.
        target: device to compile for; None is the current one.
        workers: threads; None is one per launch, at most the CPU's cores and 8.
    Returns:
        One result for each launch, in order. A kernel that does not compile is reported there and
        raises nothing: what wants to launch it gets Triton's own error.
    """
    if not launches:
        return ()
    from triton import knobs
    from triton.runtime import driver

    if knobs.runtime.interpret:
        reason = "Triton interprets kernels: there is nothing to compile"
        return tuple(Prepared(launch, -1, 0.0, reason) for launch in launches)
    goal = target or cast("GPUTarget", driver.active.get_current_target())
    size = workers or min(len(launches), os.cpu_count() or 1, _MAX_WORKERS)
    modules = [load_kernels(cache, launch.spec) for launch in launches]  # imports are not parallel

    def one(place: int) -> Prepared:
        from triton.errors import TritonError

        from sparse_compiler.runtime.ahead import compile_launch
        from sparse_compiler.runtime.triton_binaries import place_of, placing

        launch, module = launches[place], modules[place]
        start = time.perf_counter()
        shared, error = -1, ""
        try:
            with placing(place_of(getattr(module, launch.function))):
                shared = compile_launch(launch, module, goal).metadata.shared
        except (TritonError, RuntimeError) as problem:  # of the compiler and of its passes
            error = str(problem)
        return Prepared(launch, shared, time.perf_counter() - start, error)

    with ThreadPoolExecutor(size, thread_name_prefix="sparse_compiler_prepare") as pool:
        return tuple(pool.map(one, range(len(launches))))
