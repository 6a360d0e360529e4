"""What a compiled kernel needs of a multiprocessor, and whether a device has it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEVICE_LIMITS", "MAX_SPILL", "DeviceLimits", "Resources", "obstacles"]


MAX_SPILL = 128
"""Bytes a thread may spill: a few words outside the inner loop cost little (64 x 64 spills 60 on
sm_80), hundreds are traffic in every step."""


@dataclass(frozen=True)
class Resources:
    """A compilation's report.

    Args:
        shared: bytes of shared memory of one program.
        registers: of one thread; -1 where no assembler reports them.
        spills: bytes that did not fit the registers; -1 likewise.
        threads: of one program.
        measured: read from a compiler; False: estimated from the tile's operands.
    """

    shared: int
    registers: int = -1
    spills: int = -1
    threads: int = 128
    measured: bool = True


@dataclass(frozen=True)
class DeviceLimits:
    """What one program may take: shared memory in bytes, registers of all threads together."""

    shared: int
    registers: int = 65536
    asynchronous_matrix: bool = False


DEVICE_LIMITS = {
    "sm_80": DeviceLimits(163 * 1024),
    "sm_90": DeviceLimits(227 * 1024, asynchronous_matrix=True),
    "sm_100": DeviceLimits(227 * 1024),
    "gfx942": DeviceLimits(64 * 1024, registers=512 * 1024),
}
"""By compilation target; ``asynchronous_matrix``: has the wgmma that ``hopper`` schedules need."""


def obstacles(resources: Resources, limits: DeviceLimits, *, schedule: str) -> list[str]:
    """Every reason why a kernel cannot run well there; empty if it can."""
    found = []
    if schedule == "hopper" and not limits.asynchronous_matrix:
        found.append("the hopper schedule needs wgmma, which only sm_90 has")
    if resources.shared > limits.shared:
        kind = "needs" if resources.measured else "is estimated to need"
        found.append(f"{kind} {resources.shared} bytes of shared memory, {limits.shared} exist")
    if resources.spills > MAX_SPILL:
        found.append(f"spills {resources.spills} bytes a thread, more than {MAX_SPILL}")
    used = resources.registers * resources.threads
    if resources.registers > 0 and used > limits.registers:
        found.append(f"needs {used} registers a program, {limits.registers} exist")
    return found
