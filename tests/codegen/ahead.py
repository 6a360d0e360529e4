"""Compiles generated kernels for devices that are not here and reads what the compiler reports."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from sparse_compiler.codegen.emit import emit
from sparse_compiler.codegen.spec import KernelSpec
from sparse_compiler.runtime.ahead import SHARED_LIMIT, TARGETS, Report, compile_for

__all__ = ["SHARED_LIMIT", "TARGETS", "Report", "compile_for", "load"]


def load(spec: KernelSpec, directory: Path) -> ModuleType:
    """The module of ``spec``'s text, imported from ``directory``."""
    path = directory / f"kernel_{abs(hash(spec)):x}.py"
    path.write_text(emit(spec))
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module
