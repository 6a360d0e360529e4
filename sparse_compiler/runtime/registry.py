"""The executors that exist, and which one ``auto`` means on a device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points

from sparse_compiler.config import cache_directory
from sparse_compiler.errors import ExecutorUnavailable
from sparse_compiler.runtime.cpu_executor import CpuExecutor
from sparse_compiler.runtime.executor import Executor
from sparse_compiler.runtime.reference_executor import ReferenceExecutor

__all__ = ["ENTRY_POINT_GROUP", "executor_for", "executor_names", "loaded_kernels"]

ENTRY_POINT_GROUP = "sparse_compiler.executors"


def _triton() -> Executor:
    from sparse_compiler.runtime.triton_executor import TritonExecutor

    return TritonExecutor(cache_directory())


_BUILT_IN: dict[str, Callable[[], Executor]] = {
    "reference": ReferenceExecutor,
    "cpu": CpuExecutor,
    "triton": _triton,
}


@cache
def _makers() -> dict[str, Callable[[], Executor]]:
    plugins = {entry.name: entry.load() for entry in entry_points(group=ENTRY_POINT_GROUP)}
    return plugins | _BUILT_IN


@cache
def _instance(name: str) -> Executor:
    return _makers()[name]()


def executor_names() -> tuple[str, ...]:
    """Names that the option ``executor`` takes, ``auto`` first."""
    return ("auto", *_makers())


def executor_for(name: str, device_type: str) -> Executor:
    """The executor of that name; ``auto`` is cpu on the CPU and triton elsewhere.

    Raises:
        ExecutorUnavailable: there is no such executor.
    """
    if name == "auto":
        name = "cpu" if device_type == "cpu" else "triton"
    if name not in _makers():
        raise ExecutorUnavailable("executor", f"one of {', '.join(executor_names())}", name)
    return _instance(name)


def loaded_kernels() -> tuple[str, ...]:
    """Names of the generated kernels that this process has loaded; loads nothing itself."""
    prefix = "sparse_compiler_generated."
    return tuple(
        sorted(name.removeprefix(prefix) for name in sys.modules if name.startswith(prefix))
    )
