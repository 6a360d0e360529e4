"""The Hopper kernel compiles ahead of time for sm_90 within its registers, and uses what it says.

It is written in Gluon, for which there is no interpreter: its numbers are tested on a GPU, its work
list (`test_work_list.py`) without one.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from sparse_compiler.codegen.emit import PLAIN_SIZES, emit  # noqa: E402
from sparse_compiler.codegen.hopper_spec import HopperSpec  # noqa: E402
from sparse_compiler.runtime.ahead import SHARED_LIMIT, TARGETS, report_of  # noqa: E402

SHORT = {"float16": "fp16", "bfloat16": "bf16"}
BASE: dict[str, Any] = {"dtype": "bfloat16", "head_dim": 128, "value_dim": 128, "groups": 4}
SHIPPED: dict[str, dict[str, Any]] = {
    "plain": {},
    "narrow": {"block_k": 64, "stages": 6},
    "window": {"window": True},
    "padding": {"key_mask": True},
    "no_causal_order": {"causal": False},
    "everything_narrow": {
        "window": True,
        "key_mask": True,
        "softcap": True,
        "block_k": 64,
        "stages": 6,
    },
    "d64_fp16": {"dtype": "float16", "head_dim": 64, "value_dim": 64},
    "d96_dv128": {"head_dim": 96},
}


def compiled(spec: HopperSpec, folder: Path) -> Any:
    from triton.experimental.gluon._runtime import GluonASTSource

    path = folder / "kernel.py"
    path.write_text(emit(spec))
    module_spec = importlib.util.spec_from_file_location("kernel", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    element, layout = SHORT[spec.dtype], repr(module.TILE.value)
    tile = f"tensordesc<{element}[1, 1, {spec.block_k}, {{}}],{layout}>"
    known = {
        "k_source": tile.format(spec.head_pad),
        "v_source": tile.format(spec.value_pad),
        "q": f"*{element}",
        "out": f"*{element}",
        "lse": "*fp32",
        "scale": "fp32",
        "cap": "fp32",
        "key_mask": "*u8",
    }
    names = module.attend.arg_names
    sizes = PLAIN_SIZES[spec.template]
    signature = {
        name: known.get(name) or ("i32" if name in sizes or "stride" in name else "*i32")
        for name in names
    }
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or "stride" in name
    }
    source = GluonASTSource(module.attend, signature, {}, attributes)
    options = {"num_warps": spec.num_warps}
    return triton.compile(source, target=TARGETS["sm_90"], options=options)


@pytest.mark.parametrize("name", SHIPPED)
def test_compiles_without_spills_and_with_what_it_promises(name: str, tmp_path: Path) -> None:
    spec = HopperSpec(**(BASE | SHIPPED[name]))
    report = report_of(compiled(spec, tmp_path))
    assert report.spills == 0
    assert report.shared <= SHARED_LIMIT["sm_90"]
    assert report.registers == 168, "65536 registers, 12 warps with the producer's group"
    consumer, producer = spec.registers
    assert 2 * consumer + producer <= 3 * 168
    assert f"setmaxnreg.inc.sync.aligned.u32 \t{consumer}" in report.assembly
    for wanted in (
        "cp.async.bulk.tensor.4d",
        f"wgmma.mma_async.sync.aligned.m64n{spec.block_k}k16",
        f"wgmma.mma_async.sync.aligned.m64n{spec.value_pad}k16",
        "mbarrier.try_wait",
    ):
        assert wanted in report.assembly
    assert "st.local" not in report.assembly


def test_offsets_of_rows_are_wide() -> None:
    """2^20 tokens x 32 heads x 128 are 2^32 elements; items, tiles and places stay below 2^31."""
    text = emit(HopperSpec(**BASE))
    assert "bh.to(gl.int64) * num_q + row)[:, None] * DV" in text
    assert "q_row.to(gl.int64)[:, None] * q_stride_l" in text
    assert "(bh * row_blocks + m).to(gl.int64) * FIELDS" in text
    assert "* row_blocks + m).to(gl.int64) * blocks_size" in text
