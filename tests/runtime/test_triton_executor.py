"""The triton executor without a GPU: numbers in Triton's interpreter, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from interpreted import ATTEND, PROBE, VARIANTS

from sparse_compiler.errors import ExecutorUnavailable, ShapeMismatch
from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.runtime.executor import Problem
from sparse_compiler.runtime.triton_attend import tma_fits
from sparse_compiler.runtime.triton_executor import TritonExecutor
from sparse_compiler.runtime.work_list import has_holes

pytest.importorskip("triton")

#: Largest absolute error of an output of order 1; weights are not rounded in the interpreter.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Errors of all cases, from two processes at once with the interpreter switched on."""
    program = Path(__file__).parent / "interpreted.py"
    runs = [
        subprocess.Popen(
            [sys.executable, str(program), str(tmp_path_factory.mktemp("interpreted")), *group],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for group in ([], ["variants"])
    ]
    found: dict[str, Any] = {}
    for run in runs:
        out, errors = run.communicate()
        assert run.returncode == 0, errors[-4000:]
        found |= json.loads(out.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", ATTEND)
def test_attend_matches_the_oracle(results: dict[str, Any], name: str) -> None:
    result = results["attend"][name]
    limit = TOLERANCE[ATTEND[name].dtype]
    assert not result["twice"], "the case itself is wrong: a key is covered twice"
    assert result["some_rows"]
    assert result["dtype"]
    assert result["empty"], "rows without keys must be exactly 0 and -inf"
    assert result["out"] <= limit
    assert result["lse"] <= limit


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_match_the_oracle(results: dict[str, Any], name: str) -> None:
    result, variant = results["variants"][name], VARIANTS[name]
    limit = TOLERANCE[variant.case.dtype]
    stored = "" if variant.stored is None else str(variant.stored).removeprefix("torch.")
    split, packed, wide, kv_dtype = result["spec"]
    assert (split, wide, kv_dtype) == (variant.parts > 1, variant.wide, stored)
    assert variant.packed is None or packed == variant.packed
    assert result["some_rows"]
    assert result["empty"], "rows without keys must be exactly 0 and -inf"
    assert bool(result["lse_size"]) == variant.lse
    assert result["out"] <= limit
    assert result["lse"] <= limit


def test_keys_2_to_the_31_elements_apart_need_the_wide_text(results: dict[str, Any]) -> None:
    assert results["distant"] == {"wide": [False, True], "same": True, "refused": True}


def test_a_list_of_single_keys_without_room_shows_as_nan(results: dict[str, Any]) -> None:
    assert results["lanes"] == {"band": True, "others": True}


@pytest.mark.parametrize("name", PROBE)
def test_probe_matches_plain_pytorch(results: dict[str, Any], name: str) -> None:
    result = results["probe"][name]
    assert result["shapes"]
    assert result["mass"] > 1
    assert result["columns"] <= 1e-5
    assert result["distances"] <= 1e-5


def test_nan_propagates_as_in_dense_attention(results: dict[str, Any]) -> None:
    assert results["nan"] == {"lse": True, "out": True}


def test_empty_lists_give_zero_and_minus_infinity(results: dict[str, Any]) -> None:
    assert results["empty"] == {"empty": True, "no_capacity": True}


def test_obstacles_are_all_listed() -> None:
    found = TritonExecutor().obstacles(Problem("cpu", torch.float64, 8, 512, 1))
    assert len(found) == 4
    assert any("cpu" in text for text in found)
    assert any("float64" in text for text in found)
    assert any("head size 8" in text for text in found)
    assert any("value size 512" in text for text in found)


def test_a_cpu_call_is_refused_with_the_reason() -> None:
    empty = torch.zeros(1, 0, 0, dtype=torch.int32)
    index = AttentionIndex(*[empty] * 10, slots=torch.full((1, 2), -1, dtype=torch.int32))
    q = torch.zeros(1, 1, 4, 32)
    options = {"scale": 1.0, "softcap": 0.0, "rows": empty, "key_mask": None}
    with pytest.raises(ExecutorUnavailable, match="not cuda"):
        TritonExecutor().attend(q, q, q, index, Geometry(0, -1, 0, 64, 64), **options)
    with pytest.raises(ShapeMismatch, match="multiple of Hkv"):
        TritonExecutor().attend(
            q, q.expand(1, 2, 4, 32), q, index, Geometry(0, -1, 0, 64, 64), **options
        )


def test_importing_the_executor_does_not_import_triton() -> None:
    code = (
        "import sys, sparse_compiler.runtime.triton_executor as t;"
        "t.TritonExecutor; sys.exit('triton' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=False)
    assert done.returncode == 0


def test_holes_count_only_inside_the_key_span() -> None:
    rows = torch.tensor([[0, 4, 0, 2, 3], [0, 4, 0, 0, 6]], dtype=torch.int32)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1]], dtype=torch.bool)
    assert has_holes(mask, rows).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("tensor", "fits"),
    [
        (torch.zeros(2, 4, 32, 64, dtype=torch.float16), True),
        (torch.zeros(2, 32, 4, 64, dtype=torch.float16).transpose(1, 2), True),
        (torch.zeros(2, 1, 32, 64, dtype=torch.float16).expand(2, 4, 32, 64), False),
        (torch.zeros(2, 4, 32, 67, dtype=torch.float16)[..., :64], False),
        (torch.zeros(2, 4, 32, 65, dtype=torch.float16)[..., 1:], False),
        (torch.zeros(2, 4, 0, 64, dtype=torch.float16), False),
    ],
    ids=["contiguous", "blhd", "expanded", "odd_stride", "odd_base", "empty"],
)
def test_tensor_descriptors_need_aligned_strides(tensor: torch.Tensor, fits: bool) -> None:
    assert tma_fits(tensor) == fits
