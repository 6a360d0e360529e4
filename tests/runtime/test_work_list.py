"""The work list of the Hopper kernel in Triton's interpreter: every pair once, none tested in vain."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from index_cases import make_inputs
from interpreted_work_list import BASE, CASES

from sparse_compiler.runtime.hopper_attend import hopper_fits, hopper_spec

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is wrong with each case's list, from a process with the interpreter switched on."""
    program = Path(__file__).parent / "interpreted_work_list.py"
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path_factory.mktemp("interpreted"))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_the_list_covers_exactly_the_pairs_of_the_oracle(
    complaints: dict[str, str], name: str
) -> None:
    assert complaints[name] == ""


def test_only_what_the_kernel_can_do_is_given_to_it() -> None:
    inputs = make_inputs(BASE)
    q, k, v = (t.to(torch.bfloat16) for t in (inputs.q, inputs.k, inputs.v))
    geometry, index = BASE.geometry, inputs.index
    assert hopper_fits(q, k, v, geometry, index, 0.0)
    assert not hopper_fits(q.float(), k.float(), v.float(), geometry, index, 0.0)
    wide = torch.zeros(1, 3, 8, 256, dtype=torch.bfloat16)
    assert not hopper_fits(wide, wide[:, :1], wide[:, :1], geometry, index, 0.0)
    assert not hopper_fits(q, k, v, replace(geometry, block_q=64), index, 0.0)
    assert hopper_fits(q, k, v, replace(geometry, block_k=128), index, 0.0)
    assert not hopper_fits(q, k, v, replace(geometry, block_k=128), index, 3.0)
    gaps = torch.zeros(1, 1, 330, 33, dtype=torch.bfloat16)[..., :32]
    assert not hopper_fits(q, gaps, gaps, geometry, index, 0.0), "rows of 66 bytes"
    band = make_inputs(replace(BASE, kinds=("band",) * 3))
    assert not hopper_fits(q, k, v, geometry, band.index, 0.0)


@pytest.mark.parametrize(("block_k", "stages"), [(64, 6), (128, 3)])
def test_the_rings_fit_a_multiprocessor(block_k: int, stages: int) -> None:
    q = torch.zeros(1, 4, 8, 128, dtype=torch.float16)
    geometry = replace(BASE.geometry, block_k=block_k)
    spec = hopper_spec(q, q, q, geometry, softcap=0.0, key_mask=None)
    assert spec.stages == stages
    tiles = spec.stages * spec.block_k * (spec.head_pad + spec.value_pad) * 2
    assert tiles < 227 * 1024
