"""The CPU executor's workers: threads, gradient modes, forks."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from executor_cases import EXECUTORS, Case

from sparse_compiler.testing import assert_close


def test_the_cpu_executor_leaves_torchs_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(Case(num_q=300, block_q=64).run(budget=-1.0)[0])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_close(other, results[0], length=300)


def test_the_cpu_executor_serves_several_threads_at_once() -> None:
    case = Case(num_q=200)
    inputs = [replace(case, seed=seed).qkv() for seed in range(6)]
    expected = [case.run(*qkv) for qkv in inputs]
    with ThreadPoolExecutor(3) as pool:
        for got, want in zip(pool.map(lambda qkv: case.run(*qkv), inputs), expected, strict=True):
            assert_close(got[0], want[0], length=200)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_grad_modes_of_the_caller_hold_in_the_workers(executor: str, mode: type) -> None:
    case = Case(executor=executor)
    q, k, v = (t.requires_grad_() for t in case.qkv())
    with mode():
        out, lse = case.run(q, k, v)
    assert not out.requires_grad
    assert not lse.requires_grad


def test_a_forked_child_does_not_wait_for_its_parents_workers() -> None:
    code = (
        "import os, signal, torch\n"
        "from sparse_compiler.runtime.cpu_executor import _WORKERS\n"
        "torch.set_num_threads(2)\n"
        "_WORKERS.run(lambda item: None, 4)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(20)\n"
        "    done = []\n"
        "    _WORKERS.run(done.append, 4)\n"
        "    os._exit(0 if sorted(done) == [0, 1, 2, 3] else 1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
