"""Executors and kernel caches of tests on a GPU; the cases are those of the tests without one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparse_compiler.runtime.kernel_cache import KernelCache
from sparse_compiler.runtime.triton_executor import TritonExecutor

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
pytest.register_assert_rewrite("triton_gpu_cases")


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> TritonExecutor:
    return TritonExecutor(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> KernelCache:
    return KernelCache(tmp_path_factory.mktemp("variants"))
