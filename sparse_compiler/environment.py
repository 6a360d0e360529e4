"""``minference env``: what to paste into a bug report."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sparse_compiler.backend import has_cxx_compiler
from sparse_compiler.config import cache_directory, shared_cache_directory
from sparse_compiler.runtime.cache_contents import contents, obstacle
from sparse_compiler.runtime.cache_directory import why_unsafe
from sparse_compiler.runtime.executor import Problem
from sparse_compiler.runtime.kernel_cache import SOURCES
from sparse_compiler.runtime.registry import executor_for, executor_names

__all__ = ["environment"]

_PACKAGES = (
    "sparse-compiler",
    "torch",
    "triton",
    "transformers",
    "sympy",
    "islpy",
    "networkx",
    "numpy",
)


def environment() -> dict[str, Any]:
    """Versions, devices, executors with what stops them, and the state of the kernel cache."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "system": {
            "platform": platform.platform(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "c++ compiler": has_cxx_compiler(),
        },
        "devices": _devices(),
        "executors": {name: _executor_state(name) for name in executor_names() if name != "auto"},
        "cache": _cache_state(cache_directory()),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found.append(
            f"cuda:{number} {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return found or ["cpu only"]


def _executor_state(name: str) -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    obstacles = executor_for(name, device).obstacles(Problem(device, dtype, 128, 128, 4))
    return f"runs on {device}" if not obstacles else "; ".join(obstacles)


def _cache_state(directory: Path) -> dict[str, Any]:
    shared = shared_cache_directory()
    state: dict[str, Any] = {"directory": str(directory)}
    if shared is not None:
        state["shared"] = str(shared)
    problem = obstacle(directory)
    if problem:
        return {**state, "state": f"not used: {problem}"}
    if not directory.is_dir():
        return {**state, "state": "not created yet"}
    entries = contents(directory)
    broken = [entry.name for entry in entries if entry.problem]
    return {
        **state,
        "kernels": sum(entry.kind == SOURCES for entry in entries),
        "bytes": sum(entry.size for entry in entries),
        "state": f"broken: {', '.join(broken)}" if broken else "ok",
        "triton": _triton_state(),
    }


def _triton_state() -> str:
    """Triton's own cache, which holds its driver's code; nobody else checks who can write there."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from triton import knobs

    directory = Path(knobs.cache.dir)
    try:
        problem = why_unsafe(directory)
    except OSError as error:
        problem = "" if isinstance(error, FileNotFoundError) else str(error)
    return f"{directory}: not private, {problem}" if problem else str(directory)
