"""Bounds and biases in the triton executor without a GPU: numbers, plans, kinds and refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from index_cases import Case, make_inputs
from interpreted_operands import CASES
from operand_cases import BIASES, BOUNDS, make_bias, make_bounds

from sparse_compiler.errors import ShapeMismatch, TensorInvalid
from sparse_compiler.runtime.attend_plan import attend_plan
from sparse_compiler.runtime.hopper_attend import hopper_fits
from sparse_compiler.runtime.probe import probe_torch
from sparse_compiler.runtime.triton_executor import TritonExecutor
from sparse_compiler.runtime.triton_operands import (
    bias_kind,
    bias_strides,
    check_bias,
    checked_bounds,
)
from sparse_compiler.runtime.work_list import bound_spans

pytest.importorskip("triton")

#: Largest absolute error of an output of order 1; weights are not rounded in the interpreter.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CASE = Case(batch=2, heads=4, num_q=50, num_k=70)
SIZES = (2, 4, 50, 70)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Errors of all cases, from two processes at once with the interpreter switched on."""
    program = Path(__file__).parent / "interpreted_operands.py"
    names = list(CASES)
    runs = [
        subprocess.Popen(
            [sys.executable, str(program), str(tmp_path_factory.mktemp("operands")), *half],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for half in (names[::2], names[1::2])
    ]
    found: dict[str, Any] = {}
    for run in runs:
        out, errors = run.communicate()
        assert run.returncode == 0, errors[-4000:]
        found |= json.loads(out.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CASES)
def test_attend_matches_plain_pytorch(results: dict[str, Any], name: str) -> None:
    result, limit = results[name], TOLERANCE[CASES[name].case.dtype]
    assert result["some_rows"]
    assert result["empty"], "rows without keys must be exactly 0 and -inf"
    assert result["out"] <= limit
    assert result["lse"] <= limit


def test_every_kind_of_operand_is_among_the_cases() -> None:
    assert {case.bounds for case in CASES.values()} == {"", *BOUNDS}
    assert {case.bias for case in CASES.values()} == {"", *BIASES}


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("padding", ["none", "ragged"])
def test_spans_are_the_unions_and_intersections_of_their_rows(kind: str, padding: str) -> None:
    case = replace(CASE, num_q=75, num_k=75, padding=padding)
    rows = make_inputs(case).rows
    bounds = make_bounds(case, kind)
    assert bounds is not None
    bounds = bounds.expand(case.batch, -1, -1)
    spans = bound_spans(bounds, rows, case.geometry, case.num_k)
    key = torch.arange(case.num_k)
    for b in range(case.batch):
        start, length = int(rows[b, 0]), int(rows[b, 1])
        for m in range(case.geometry.num_row_blocks(case.num_q)):
            mine = range(m * case.block_q, min((m + 1) * case.block_q, case.num_q))
            real = [row for row in mine if start <= row < start + length]
            sees = (key >= bounds[b, real, :1]) & (key <= bounds[b, real, 1:])
            some_from, some_to, every_from, every_to = spans[b, m].tolist()
            some = (key >= some_from) & (key < some_to)
            assert bool((some | ~sees).all()), "a visible key is left out"
            if sees.any():
                seen = sees.any(0).nonzero()[:, 0]
                assert (some_from, some_to) == (int(seen[0]), int(seen[-1]) + 1)
            else:
                assert not some.any()
            if real:
                every = (key >= every_from) & (key < every_to)
                assert torch.equal(every, sees.all(0))


def test_kinds_follow_from_strides() -> None:
    kinds = {name: bias_kind(make_bias(CASE, name)) for name in BIASES}
    assert kinds == {
        "key": "key",
        "key_heads": "key",
        "expanded": "key",
        "row": "row",
        "full": "row",
        "permuted": "row",
        "table": "distance",
        "one_table": "distance",
        "least": "row",
    }
    assert bias_kind(None) == ""


def test_strides_are_zero_where_a_bias_is_broadcast() -> None:
    strides = {name: bias_strides(make_bias(CASE, name), SIZES) for name in BIASES}
    assert strides["key"] == [70, 0, 1]
    assert strides["key_heads"] == [0, 70, 1]
    assert strides["row"] == [50 * 70, 0, 70, 1]
    assert strides["permuted"] == [0, 1, 70 * 4, 4]
    assert strides["table"] == [119, 1]
    assert strides["one_table"] == [0, 1]


def test_a_large_bias_needs_64_bit_offsets() -> None:
    inputs = make_inputs(CASE)
    operands = (inputs.q, inputs.k, inputs.v, inputs.index, CASE.geometry, 16)
    assert not attend_plan(*operands, bias=torch.zeros(1).expand(SIZES)).wide
    far = torch.empty(1, device="meta")
    assert attend_plan(*operands, bias=far.as_strided(SIZES, (0, 2**30, 70, 1))).wide
    assert attend_plan(*operands, bias=far.as_strided((4, 119), (2**30, 1))).wide


def test_a_bias_that_does_not_fit_is_refused() -> None:
    for shape in (
        (2, 4, 50, 71),
        (2, 3, 50, 70),
        (2, 4, 50, 1),
        (4, 118),
        (3, 119),
        (50, 70),
        (70,),
    ):
        with pytest.raises(ShapeMismatch, match="bias"):
            check_bias(torch.zeros(shape), SIZES)
    with pytest.raises(TensorInvalid, match="bias"):
        check_bias(torch.zeros(4, 119, dtype=torch.int32), SIZES)


def test_bounds_that_do_not_fit_are_refused() -> None:
    for shape in ((3, 50, 2), (2, 49, 2), (2, 50), (2, 50, 3)):
        with pytest.raises(ShapeMismatch, match="bounds"):
            checked_bounds(torch.zeros(shape, dtype=torch.int32), SIZES)
    with pytest.raises(TensorInvalid, match="int32"):
        checked_bounds(torch.zeros(2, 50, 2, dtype=torch.int64), SIZES)
    one = torch.zeros(1, 50, 2, dtype=torch.int32)
    for bounds in (one, one.expand(2, -1, -1)):
        found = checked_bounds(bounds, SIZES)
        assert found is not None
        assert found.shape == (2, 50, 2)
        assert found.stride() == (0, 2, 1), "a broadcast batch is not copied"


def test_the_hopper_kernel_takes_neither() -> None:
    case = replace(CASE, block_q=128, block_k=64, kinds=("blocks",) * 4, dtype=torch.float16)
    inputs = make_inputs(case)
    operands = (inputs.q, inputs.k, inputs.v, case.geometry, inputs.index, 0.0)
    assert hopper_fits(*operands)
    assert not hopper_fits(*operands, bounds=make_bounds(case, "chunks"))
    assert not hopper_fits(*operands, bias=make_bias(case, "key"))


def test_selection_with_operands_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    executor: Any = TritonExecutor()
    bounds, bias = make_bounds(CASE, "chunks"), make_bias(CASE, "table")
    for request in (
        SimpleNamespace(bounds=bounds, bias=None),
        SimpleNamespace(bounds=None, bias=bias),
    ):
        assert executor.select_band(request, None, {}, {}, (0, 0, 0, 0), 1) is None
    monkeypatch.setattr(executor, "_check", lambda *_: None)
    inputs = make_inputs(CASE)
    heads, first = torch.tensor([2, 0]), torch.tensor([40, 30])
    options: Any = {"scale": CASE.scale, "rows": inputs.rows, "key_mask": None, "num_rows": 10}
    assert bounds is not None
    bounds = bounds.expand(CASE.batch, -1, -1)
    for more in ({"bounds": bounds}, {"bias": bias}):
        found = executor.probe(inputs.q, inputs.k, heads, first, CASE.geometry, **options, **more)
        want = probe_torch(inputs.q, inputs.k, heads, first, CASE.geometry, **options, **more)
        without = probe_torch(inputs.q, inputs.k, heads, first, CASE.geometry, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
        assert not torch.equal(found[0], without[0])
