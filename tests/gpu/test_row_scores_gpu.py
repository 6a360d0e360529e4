"""Row scores on a GPU: the kernels list what PyTorch's operations list, and the same every time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from row_score_cases import MARKS, TOLERANCE, Case, assert_agrees, use_eight_bits
from sweep_definition import places, sweep_by_definition

from sparse_compiler.ir.index import Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.runtime import row_score_scratch, triton_row_scores, triton_sketch
from sparse_compiler.runtime.hopper_sweep import launch_sweep, sweep_spec
from sparse_compiler.runtime.registry import executor_for
from sparse_compiler.testing import sparse_attention

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
COMMON = {"device": "cuda", "block_q": 64, "block_k": 64}
CASES = [
    Case(1, 700, 700, dtype=BF16, dim=128, groups=4, numbers=((5000, 0), (20000, 3)), **COMMON),
    Case(2, 700, 900, 200, dtype=BF16, dim=128, groups=4, name="low_rank", **COMMON),
    Case(
        3, 999, 999, dtype=BF16, dim=64, groups=3, padding=True, batch=2, name="low_rank", **COMMON
    ),
    Case(4, 500, 500, right=-1, dtype=FP16, dim=80, broken=float("nan"), name="low_rank", **COMMON),
    Case(5, 500, 500, left=100, dtype=FP32, dim=64, name="low_rank", **COMMON),
    Case(6, 600, 600, dtype=BF16, dim=256, name="key_means", **COMMON),
    Case(7, 600, 600, dtype=BF16, dim=16, groups=1, name="low_rank", **COMMON),
]
#: Long enough that Hopper's kernel for whole key blocks goes first.
SWEPT_CASES = [
    Case(11, 9000, 9000, dtype=BF16, dim=64, groups=3, name="low_rank", **COMMON),
    Case(12, 8448, 9000, 552, dtype=FP16, dim=128, batch=2, name="low_rank", **COMMON),
    Case(13, 1500, 20000, 18500, left=9000, dtype=BF16, dim=64, name="low_rank", **COMMON),
    Case(14, 600, 12000, right=-1, dtype=BF16, dim=64, name="low_rank", **COMMON),
    Case(15, 9000, 9000, dtype=BF16, dim=64, broken=float("inf"), name="low_rank", **COMMON),
    Case(
        16, 9000, 9000, dtype=BF16, dim=16, name="low_rank", device="cuda", block_q=128, block_k=32
    ),
    Case(
        17, 9000, 9000, dtype=BF16, dim=80, name="low_rank", device="cuda", block_q=64, block_k=128
    ),
    Case(18, 8500, 8500, dtype=BF16, dim=32, name="low_rank", **COMMON),
    Case(
        23,
        9000,
        9000,
        dtype=BF16,
        dim=64,
        name="low_rank",
        batch=2,
        real=((1100, 7000, 0, 1030, 7100), (0, 9000, 0, 0, 9000)),
        **COMMON,
    ),
    # More blocks are wanted than a list may hold.
    Case(22, 9000, 9000, dtype=BF16, dim=64, numbers=((1, 0),), name="low_rank", **COMMON),
    # Narrow windows leave rows that see no whole block between others that do.
    Case(19, 3000, 16500, 13500, left=127, dtype=BF16, dim=64, name="low_rank", **COMMON),
    Case(20, 3000, 16500, 13500, left=767, dtype=BF16, dim=64, name="low_rank", **COMMON),
    Case(
        21, 3000, 16500, 13500, left=300, right=300, dtype=BF16, dim=64, name="low_rank", **COMMON
    ),
]


#: Of 32 directions, or of heads with 32 numbers: what the kernels may read in 8 bits.
EIGHT_CASES = [c for c in CASES + SWEPT_CASES if c.name == "low_rank" and c.dim >= 32]


@pytest.fixture
def eight_bits() -> Iterator[None]:
    """PyTorch's sketches, rounded to 8 bits, for the kernels and for PyTorch's lists alike."""
    if not triton_sketch.eight_bits(torch.device("cuda")):
        pytest.skip("no products of 8-bit numbers")
    undo = use_eight_bits()
    yield
    undo()


@pytest.fixture
def pytorch_sketches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions that kernels find are others, as good (test_sketch_gpu.py); lists then differ."""
    monkeypatch.setattr(triton_row_scores, "sketch_fits", lambda request: False)


@pytest.mark.usefixtures("eight_bits")
@pytest.mark.parametrize("case", EIGHT_CASES, ids=lambda case: f"{case.name}-{case.seed}")
def test_the_same_lists_from_numbers_of_8_bits(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = []

    def chosen(*arguments: Any) -> Any:
        specs.append((arguments[0], sweep_spec(*arguments)))
        return specs[-1][1]

    monkeypatch.setattr(triton_row_scores, "sweep_spec", chosen)
    hopper = torch.cuda.get_device_capability()[0] == 9
    blurred = MARKS if hopper and case in SWEPT_CASES else TOLERANCE
    assert_agrees(case, executor_for("triton", "cuda"), blurred)
    assert all(spec.eight for spec, _ in specs)
    swept = all(sweep is not None and sweep.eight for _, sweep in specs)
    assert swept == (hopper and case in SWEPT_CASES)


@pytest.mark.usefixtures("pytorch_sketches")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.seed}")
def test_the_kernels_list_what_pytorch_lists(case: Case) -> None:
    assert_agrees(case, executor_for("triton", "cuda"))


@pytest.mark.usefixtures("pytorch_sketches")
@pytest.mark.parametrize("size", [1 << 30, 1 << 24])
@pytest.mark.parametrize("case", SWEPT_CASES, ids=lambda case: f"{case.name}-{case.seed}")
def test_whole_key_blocks_are_swept(case: Case, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    swept = []

    def launched(*arguments: Any) -> None:
        swept.append(arguments)
        launch_sweep(*arguments)

    monkeypatch.setattr(triton_row_scores, "launch_sweep", launched)
    monkeypatch.setattr(row_score_scratch, "_BYTES", size)
    monkeypatch.setattr(row_score_scratch, "_LEAST_ROWS", 1024)
    assert_agrees(case, executor_for("triton", "cuda"), MARKS)
    assert bool(swept) == (torch.cuda.get_device_capability()[0] == 9)


@pytest.mark.usefixtures("pytorch_sketches")
@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize(
    "case", [c for c in SWEPT_CASES if c.left != 127], ids=lambda case: f"{case.name}-{case.seed}"
)
def test_the_sweep_does_what_it_is_defined_to(
    case: Case, eight: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is for Hopper")
    if eight and case not in EIGHT_CASES:
        pytest.skip("too few numbers for 8 bits")
    if eight:
        request.getfixturevalue("eight_bits")
    else:
        monkeypatch.setattr(row_score_scratch, "_BYTES", 1 << 24)
        monkeypatch.setattr(row_score_scratch, "_LEAST_ROWS", 1024)
    seen = []

    def launched(cache: Any, spec: Any, *arguments: Any) -> None:
        *before, slab, tops, totals, sizes = arguments
        slab.fill_(255)
        tops.fill_(float("nan"))
        totals.fill_(float("nan"))
        launch_sweep(cache, spec, *arguments)
        got = slab, tops, totals
        want = tuple(torch.empty_like(tensor) for tensor in got)
        at, unit = places(slab.shape[4]), slab.shape[3]
        for line, place, part in sweep_by_definition(spec, *before, *want, sizes):
            tile, rows = part.start // len(at), place - sizes["first_row"]
            rows = torch.arange(rows, rows + min(spec.sweep_step, sizes["num_q"] - place))
            of_rows = line, rows // unit, tile, rows % unit
            marks, top, total = ([t[of_rows] for t in pair] for pair in zip(got, want, strict=True))
            here = at[part.start - tile * len(at) : part.stop - tile * len(at)]
            apart = [m[:, here.to(m.device)].int() for m in marks]
            # Products are added up in 16 bits.
            digits = 2**-9 * top[1].abs() + 2**-7
            assert ((top[0] - top[1]).abs() <= digits).all()
            assert ((apart[0] - apart[1]).abs() <= 1.5 + 32 * digits[:, None]).all()
            assert ((total[0] / total[1]).log2().abs() <= 0.05 + 2 * digits).all()
            assert ((apart[0] - apart[1]).abs() > 1).float().mean() < 0.02
            seen.append(part)

    monkeypatch.setattr(triton_row_scores, "launch_sweep", launched)
    assert_agrees(case, executor_for("triton", "cuda"), MARKS)
    assert seen


@pytest.mark.parametrize("block_q", [64, 128])
def test_the_same_bits_and_no_wait_for_the_device(block_q: int) -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(1, 8, 8192, 128, device="cuda", dtype=BF16, generator=draw)
    k, v = (torch.randn(1, 2, 8192, 128, device="cuda", dtype=BF16, generator=draw) for _ in "kv")
    heads = [HeadPattern("low_rank", 7000, 0)] * 8
    geometry = Geometry(0, -1, 0, block_q, 64)
    first = sparse_attention(q, k, v, heads, geometry, executor="triton")
    for _ in range(3):
        again = sparse_attention(q, k, v, heads, geometry, executor="triton")
        assert torch.equal(first[0], again[0])
        counts = first[2].num_blocks
        assert torch.equal(counts, again[2].num_blocks)
        listed = torch.arange(first[2].blocks.shape[-1], device="cuda") < counts[..., None]
        assert torch.equal(first[2].blocks[listed], again[2].blocks[listed])
