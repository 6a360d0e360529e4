"""Calls that do not fit are refused with the reason, and executors that cannot run say why."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from executor_cases import BLOCKS, EXECUTORS, NOTHING, SLASH, Case

from sparse_compiler.errors import (
    ExecutorUnavailable,
    ShapeMismatch,
    SparseCompilerError,
    TensorInvalid,
)
from sparse_compiler.ir.index import Geometry
from sparse_compiler.runtime.executor import Executor, Problem
from sparse_compiler.runtime.registry import executor_for, executor_names
from sparse_compiler.testing import sparse_attention


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("budget", [-1.0, 1.0])
@pytest.mark.parametrize("min_tokens", [0, 10**6])
@pytest.mark.parametrize(("num_q", "num_k"), [(0, 5), (5, 0), (0, 0)])
def test_no_rows_or_no_keys_give_nothing_or_a_clear_error(
    executor: str, budget: float, min_tokens: int, num_q: int, num_k: int
) -> None:
    q, k, v = (
        torch.randn(1, 2, num_q, 16),
        torch.randn(1, 1, num_k, 16),
        torch.randn(1, 1, num_k, 8),
    )
    geometry = Geometry(max(0, num_k - num_q), -1, 0, 64, 32)
    try:
        out, lse, _ = sparse_attention(
            *(q, k, v, (SLASH, BLOCKS), geometry),
            executor=executor,
            budget=budget,
            min_tokens=min_tokens,
        )
    except SparseCompilerError:
        return
    assert torch.equal(out, torch.zeros(1, 2, num_q, 8))
    assert torch.equal(lse, torch.full((1, 2, num_q), NOTHING))


def _broken(name: str) -> dict[str, torch.Tensor]:
    q, k, v = torch.randn(2, 4, 40, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    mask = torch.ones(2, 40, dtype=torch.bool)
    good = {"q": q, "k": k, "v": v, "key_mask": mask}
    bad = {
        "rank of q": {"q": q[0]},
        "rank of k": {"k": k[0]},
        "batch of k": {"k": k[:1], "v": v[:1], "key_mask": mask[:1]},
        "head size of k": {"k": k[..., :8]},
        "heads": {"k": torch.cat([k, k[:, :1]], 1), "v": torch.cat([v, v[:, :1]], 1)},
        "more key heads than query heads": {"k": k.repeat(1, 4, 1, 1), "v": v.repeat(1, 4, 1, 1)},
        "no key heads": {"k": k[:, :0], "v": v[:, :0]},
        "heads of v": {"v": v[:, :1]},
        "length of v": {"v": v[:, :, :39]},
        "length of key_mask": {"key_mask": mask[:, :39]},
        "batch of key_mask": {"key_mask": mask[:1]},
        "rank of key_mask": {"key_mask": mask[:, None]},
        "dtype of key_mask": {"key_mask": mask.long()},
        "integer tensors": {"q": q.long(), "k": k.long(), "v": v.long()},
        "dtype of k": {"k": k.half()},
        "dtype of v": {"v": v.double()},
    }
    return good | bad[name]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("rank of q", ShapeMismatch),
        ("rank of k", ShapeMismatch),
        ("batch of k", ShapeMismatch),
        ("head size of k", ShapeMismatch),
        ("heads", ShapeMismatch),
        ("more key heads than query heads", ShapeMismatch),
        ("no key heads", ShapeMismatch),
        ("heads of v", ShapeMismatch),
        ("length of v", ShapeMismatch),
        ("length of key_mask", ShapeMismatch),
        ("batch of key_mask", ShapeMismatch),
        ("rank of key_mask", ShapeMismatch),
        ("dtype of key_mask", SparseCompilerError),
        ("integer tensors", TensorInvalid),
        ("dtype of k", TensorInvalid),
        ("dtype of v", TensorInvalid),
    ],
)
def test_tensors_that_do_not_fit_are_refused_with_the_reason(
    executor: str, name: str, error: type[SparseCompilerError]
) -> None:
    broken = _broken(name)
    with pytest.raises(error) as caught:
        sparse_attention(
            *(broken["q"], broken["k"], broken["v"]),
            (SLASH, SLASH, BLOCKS, BLOCKS),
            Geometry(0, -1, 0, 64, 32),
            executor=executor,
            key_mask=broken["key_mask"],
        )
    subject = name.split(" of ")[-1].split()[-1]
    assert subject in str(caught.value) or name in ("integer tensors", "no key heads")


@pytest.mark.parametrize("shape", [(1, 5), (2, 4), (2, 5, 1)])
def test_rows_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    case = Case(batch=2)
    with pytest.raises(SparseCompilerError):
        case.run(rows=torch.zeros(shape, dtype=torch.int32))


def test_rows_of_a_wrong_dtype_are_refused() -> None:
    case = Case(batch=1)
    with pytest.raises(SparseCompilerError):
        case.run(rows=torch.tensor([[0.0, 100.0, 0.0, 0.0, 100.0]]))


def test_parameters_for_another_number_of_heads_are_refused() -> None:
    q, k, v = Case().qkv()
    with pytest.raises(ShapeMismatch, match="head"):
        sparse_attention(q, k, v, (SLASH,) * 3, Case().geometry)


def test_an_executor_that_does_not_exist_is_refused_with_the_names_that_do() -> None:
    with pytest.raises(ExecutorUnavailable, match="reference"):
        executor_for("gpu", "cpu")
    with pytest.raises(ExecutorUnavailable, match="reference"):
        replace(Case(), executor="gpu").run()


def test_auto_is_the_cpu_executor_on_the_cpu() -> None:
    assert executor_for("auto", "cpu") is executor_for("cpu", "cpu")
    assert executor_names()[0] == "auto"
    assert set(executor_names()) >= {"auto", "cpu", "reference", "triton"}


@pytest.mark.parametrize("name", EXECUTORS)
def test_an_executor_names_every_obstacle_and_refuses_rather_than_falls_back(name: str) -> None:
    executor = executor_for(name, "cpu")
    assert isinstance(executor, Executor)
    assert executor.name == name
    assert not executor.obstacles(Problem("cpu", torch.float32, 64, 64, 4))
    if executor.obstacles(Problem("cpu", torch.float32, 64, 64, 4, softcap=30.0)):
        with pytest.raises(ExecutorUnavailable, match="cap"):
            sparse_attention(
                *Case().qkv(), Case().heads, Case().geometry, executor=name, softcap=30.0
            )
    if name == "cpu":
        assert executor.obstacles(Problem("cuda", torch.float32, 64, 64, 4))
