"""The executors that exist, and which one ``auto`` means on a device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from sparse_compiler.config import cache_directory
from sparse_compiler.errors import ExecutorUnavailable, PluginFailed
from sparse_compiler.plugin_loading import Source, blamed, load_plugins, source_of
from sparse_compiler.runtime.cpu_executor import CpuExecutor
from sparse_compiler.runtime.executor import Executor
from sparse_compiler.runtime.reference_executor import ReferenceExecutor

__all__ = ["ENTRY_POINT_GROUP", "executor", "executor_for", "executor_names", "loaded_kernels"]

ENTRY_POINT_GROUP = "sparse_compiler.executors"


def _triton() -> Executor:
    from sparse_compiler.runtime.triton_executor import TritonExecutor

    return TritonExecutor(cache_directory())


_BUILT_IN: dict[str, Callable[[], Executor]] = {
    "reference": ReferenceExecutor,
    "cpu": CpuExecutor,
    "triton": _triton,
}


Kind = TypeVar("Kind", bound=Callable[[], Executor])

_added: dict[str, tuple[Callable[[], Executor], Source]] = {}
_loaded = False


def executor(kind: Kind) -> Kind:
    """Register an executor; a decorator of a subclass of ``Executor`` that takes no arguments.

    Its ``name`` is what the option ``executor`` takes. It is made when it is first asked for.

    Raises:
        PluginFailed: it is no such class, or its name is taken.
    """
    _register(kind, source_of("executor", kind))
    return kind


def _register(kind: Any, source: Source) -> None:
    if not (isinstance(kind, type) and issubclass(kind, Executor)):
        raise PluginFailed(str(source), "a subclass of Executor", kind)
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not name:
        raise PluginFailed(f"the name of {source}", "text", name)
    other = _added.get(name)
    same = other is not None and _qualified(other[0]) == _qualified(kind)
    if name == "auto" or name in _BUILT_IN or (other is not None and not same):
        raise PluginFailed(f"the name of {source}", "new", name, fix="Choose another name.")
    _added[name] = (kind, source)


def _qualified(kind: Any) -> tuple[str, str]:
    """The same for a module that is loaded again, as notebooks do."""
    return kind.__module__, kind.__qualname__


def _makers() -> dict[str, Callable[[], Executor]]:
    global _loaded
    if not _loaded:
        _loaded = True
        load_plugins(ENTRY_POINT_GROUP, "executor", _register)
    return {**{name: kind for name, (kind, _) in _added.items()}, **_BUILT_IN}


@cache
def _made(maker: Callable[[], Executor]) -> Executor:
    return maker()


def _instance(name: str) -> Executor:
    if name in _BUILT_IN:
        return _made(_BUILT_IN[name])
    kind, source = _added[name]
    with blamed(source, "it is made"):
        return _made(kind)


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
