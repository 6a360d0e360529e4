"""Runs the triton executor's cases in Triton's interpreter and prints their errors as JSON.

A program of its own, because ``TRITON_INTERPRET`` is read when a kernel is decorated:
``TRITON_INTERPRET=1 python tests/runtime/interpreted.py CACHE_DIRECTORY [variants]``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from index_cases import Case, Inputs, make_inputs, make_scales  # noqa: E402

from sparse_compiler.codegen.spec import AttendSpec  # noqa: E402
from sparse_compiler.errors import ShapeMismatch  # noqa: E402
from sparse_compiler.ir.index import AttentionIndex  # noqa: E402
from sparse_compiler.runtime.attend_plan import Split, attend_plan  # noqa: E402
from sparse_compiler.runtime.kernel_cache import KernelCache  # noqa: E402
from sparse_compiler.runtime.probe import probe_torch  # noqa: E402
from sparse_compiler.runtime.reference import attend_reference, covered_pairs  # noqa: E402
from sparse_compiler.runtime.triton_attend import (  # noqa: E402
    attend_spec,
    attend_tuning,
    launch_attend,
    rows_contiguous,
)

BASE = Case(batch=1, heads=3, kv_heads=1, num_q=90, num_k=90, kinds=("band", "blocks", "none"))
TWO = replace(BASE, batch=2)
ATTEND = {
    "plain": TWO,
    "groups": replace(BASE, heads=4, kv_heads=2, kinds=("blocks", "band", "band", "blocks")),
    "ragged_length": replace(BASE, num_q=77, num_k=77),
    "offset": replace(BASE, num_q=50, num_k=170),
    "offset_odd": replace(BASE, num_q=33, num_k=101),
    "left_padding": replace(TWO, padding="left"),
    "right_padding": replace(TWO, padding="right"),
    "ragged_rows": replace(TWO, padding="ragged"),
    "holes": replace(TWO, padding="holes"),
    "window": replace(BASE, left=40),
    "window_holes": replace(TWO, left=40, padding="holes"),
    "narrow_window": replace(BASE, left=5),
    "lookahead": replace(BASE, right=9, kinds=("blocks",) * 3),
    "full_mask": replace(BASE, right=-1, kinds=("blocks",) * 3),
    "full_mask_band": replace(BASE, right=-1, spread=0.3),
    "softcap": replace(BASE, softcap=2.0),
    "dense_band": replace(BASE, spread=2.0),
    "only_band": replace(BASE, kinds=("band",) * 3),
    "value_dim": replace(BASE, dim=24, value_dim=40),
    "wide": replace(BASE, dim=80, value_dim=128),
    "strided": replace(BASE, layout="blhd"),
    "unaligned": replace(BASE, layout="padded"),
    "half": replace(BASE, dtype=torch.float16),
    "bf16": replace(BASE, dtype=torch.bfloat16),
    "small_blocks": replace(BASE, block_q=16, block_k=32, num_q=90, num_k=90),
    "step_of_a_tile": replace(BASE, block_q=64, block_k=64, num_q=130, num_k=130),
    "one_row": replace(BASE, num_q=1, num_k=64),
}


@dataclass(frozen=True)
class Variant:
    """How one case is launched, where the executor would not choose so itself.

    Args:
        parts, first: row blocks ``first`` and later are split into ``parts``.
        packed: columns are packed first; None leaves the choice.
        wide: 64-bit offsets although 32 are enough.
        stored: the dtype that k and v are stored in, with scales.
        lse: the log-sum-exp is written.
    """

    case: Case
    parts: int = 1
    first: int = 0
    packed: bool | None = None
    wide: bool = False
    stored: torch.dtype | None = None
    lse: bool = True


FP8 = torch.float8_e4m3fn
MANY = replace(BASE, heads=2, kinds=("band",) * 2, spread=0.5)
VARIANTS = {
    "packed": Variant(TWO, packed=True),
    "gathered": Variant(replace(BASE, num_q=200, num_k=200), packed=False),
    "packed_many": Variant(MANY, packed=True),
    "packed_groups": Variant(
        replace(BASE, heads=4, kv_heads=2, kinds=("band", "blocks", "none", "band")), packed=True
    ),
    "packed_offset": Variant(replace(MANY, num_q=50, num_k=170), packed=True),
    "packed_window": Variant(replace(MANY, left=40, num_q=150, num_k=150), packed=True),
    "packed_narrow_window": Variant(replace(MANY, left=3), packed=True),
    "packed_left_padding": Variant(replace(TWO, padding="left", spread=0.5), packed=True),
    "packed_ragged": Variant(replace(TWO, padding="ragged", spread=0.5), packed=True),
    "packed_holes": Variant(replace(TWO, padding="holes", spread=0.5), packed=True),
    "packed_softcap": Variant(replace(MANY, softcap=2.0), packed=True),
    "packed_full_mask": Variant(replace(MANY, right=-1), packed=True),
    "packed_odd_sizes": Variant(replace(MANY, dim=24, value_dim=40), packed=True),
    "packed_bf16": Variant(replace(MANY, dtype=torch.bfloat16, layout="padded"), packed=True),
    "split_1": Variant(MANY, parts=1),
    "split_2": Variant(MANY, parts=2),
    "split_3": Variant(TWO, parts=3, packed=True),
    "split_4": Variant(replace(MANY, num_q=33, num_k=170), parts=4),
    "split_last_rows": Variant(MANY, parts=3, first=2, packed=True),
    "split_into_more_than_there_is": Variant(TWO, parts=11),
    "split_ragged": Variant(replace(TWO, padding="ragged"), parts=4, packed=True),
    "split_holes": Variant(replace(TWO, padding="holes"), parts=2),
    "split_window": Variant(replace(BASE, left=40), parts=2, packed=True),
    "split_steps": Variant(
        replace(BASE, block_q=64, block_k=64, num_q=130, num_k=130), parts=3, first=1
    ),
    "split_one_row": Variant(replace(BASE, num_q=1, num_k=64), parts=4),
    "split_without_lse": Variant(MANY, parts=2, lse=False),
    "without_lse": Variant(TWO, lse=False),
    "wide": Variant(TWO, wide=True),
    "wide_packed_split": Variant(TWO, wide=True, parts=2, packed=True),
    "fp8": Variant(replace(TWO, dtype=torch.float16), stored=FP8),
    "fp8_fp32": Variant(replace(BASE, heads=4, kv_heads=2, kinds=("band",) * 4), stored=FP8),
    "fp8_packed_split": Variant(
        replace(MANY, dtype=torch.bfloat16, softcap=2.0), stored=FP8, packed=True, parts=2
    ),
}
PROBE = {
    "plain": (replace(BASE, kinds=("band",) * 3, num_q=90, num_k=90), 64),
    "groups": (replace(BASE, heads=4, kv_heads=2, kinds=("band",) * 4, num_q=70, num_k=150), 64),
    "window": (replace(BASE, kinds=("band",) * 3, left=20), 64),
    "holes": (replace(TWO, kinds=("band",) * 3, padding="holes"), 64),
    "ragged_rows": (replace(TWO, kinds=("band",) * 3, padding="ragged"), 64),
    "few_rows": (replace(BASE, kinds=("band",) * 3), 5),
    "many_rows": (replace(BASE, kinds=("band",) * 3, num_q=120, num_k=120), 100),
    "full_mask": (replace(BASE, kinds=("band",) * 3, right=-1), 64),
    "wide": (replace(BASE, kinds=("band",) * 3, dim=144), 64),
    "several_chunks": (replace(BASE, batch=1, heads=1, kinds=("band",), num_q=64, num_k=300), 64),
}


def attend_errors(executor: Any, case: Case) -> dict[str, Any]:
    """Largest errors of out and lse, and whether empty rows are exactly (0, -inf)."""
    inputs = make_inputs(case)
    covered = covered_pairs(inputs.index, case.geometry, case.num_q, case.num_k)
    options = {
        "scale": case.scale,
        "softcap": case.softcap,
        "rows": inputs.rows,
        "key_mask": inputs.key_mask,
    }
    out, lse = executor.attend(inputs.q, inputs.k, inputs.v, inputs.index, case.geometry, **options)
    q, k, v = inputs.q.float(), inputs.k.float(), inputs.v.float()
    want, want_lse = attend_reference(q, k, v, inputs.index, case.geometry, **options)
    empty = want_lse == float("-inf")
    return {
        "twice": int(covered.max()) > 1,
        "out": float((out.float() - want).abs().max()),
        "lse": float((lse - want_lse)[~empty].abs().max()),
        "empty": bool(torch.equal(lse == float("-inf"), empty) and not out[empty].any()),
        "dtype": out.dtype == case.dtype and lse.dtype == torch.float32,
        "some_rows": bool((~empty).any()),
    }


def launch(
    directory: str, variant: Variant, inputs: Inputs, **operands: Any
) -> tuple[AttendSpec, Any, Any]:
    """(spec, out, lse) of one variant, in the interpreter; ``operands`` are bounds and bias."""
    case, stored = variant.case, variant.stored
    k, v = (t if stored is None else t.to(stored) for t in (inputs.k, inputs.v))
    q, k, v = rows_contiguous(inputs.q), rows_contiguous(k), rows_contiguous(v)
    geometry, index = case.geometry, inputs.index
    tuning = attend_tuning(case.dtype, max(case.dim, case.value_dim), geometry, (0, 0))
    split = Split(variant.first, variant.parts)
    step = min(tuning.step_k, geometry.block_k)
    chosen: Any = {"split": split, "packed": variant.packed, **operands}
    plan = attend_plan(q, k, v, index, geometry, step, **chosen)
    plan = replace(plan, wide=plan.wide or variant.wide)
    spec = attend_spec(
        q,
        k,
        v,
        index,
        geometry,
        tuning,
        softcap=case.softcap,
        key_mask=inputs.key_mask,
        tma=False,
        interpret=True,
        lse=variant.lse,
        plan=plan,
        **operands,
    )
    out, lse = launch_attend(
        KernelCache(directory),
        spec,
        q,
        k,
        v,
        index,
        geometry,
        scale=case.scale,
        softcap=case.softcap,
        rows=inputs.rows,
        key_mask=inputs.key_mask,
        kv_scales=None if stored is None else make_scales(case),
        plan=plan,
        **operands,
    )
    return spec, out, lse


def variant_errors(directory: str, variant: Variant) -> dict[str, Any]:
    """As ``attend_errors``, with the facts that the spec must show."""
    case = variant.case
    inputs = make_inputs(case)
    spec, out, lse = launch(directory, variant, inputs)
    k, v = inputs.k.float(), inputs.v.float()
    if variant.stored is not None:
        k_scale, v_scale = (t[..., None, None] for t in make_scales(case))
        k, v = k.to(variant.stored).float() * k_scale, v.to(variant.stored).float() * v_scale
    options = {
        "scale": case.scale,
        "softcap": case.softcap,
        "rows": inputs.rows,
        "key_mask": inputs.key_mask,
    }
    want, want_lse = attend_reference(
        inputs.q.float(), k, v, inputs.index, case.geometry, **options
    )
    empty = want_lse == float("-inf")
    lse_error = float((lse - want_lse)[~empty].abs().max()) if variant.lse else 0.0
    return {
        "out": float((out.float() - want).abs().max()),
        "lse": lse_error,
        "empty": not out[empty].any() and (not variant.lse or bool((lse[empty] < -1e30).all())),
        "lse_size": lse.numel(),
        "some_rows": bool((~empty).any()),
        "spec": [spec.split, spec.packed, spec.wide, spec.kv_dtype],
    }


def distant_heads(directory: str) -> dict[str, Any]:
    """Keys 2**31 elements apart: the wide text reaches them, the narrow one is refused.

    Memory that nobody touches is not there, so the four gigabytes cost nothing.
    """
    case = replace(BASE, heads=3, kv_heads=3, num_q=20, num_k=20, dtype=torch.float16)
    inputs = make_inputs(case)
    apart = torch.empty(2**31 + 20 * case.dim, dtype=torch.float16)
    far = apart.as_strided((1, 3, 20, case.dim), (2**31, 2**30, case.dim, 1))
    far.copy_(inputs.k)
    variant = Variant(case, packed=True)
    spec, out, lse = launch(directory, variant, replace(inputs, k=far))
    near = launch(directory, variant, inputs)
    narrow = replace(spec, wide=False)
    refused = False
    try:
        launch_attend(
            KernelCache(directory),
            narrow,
            inputs.q,
            far,
            inputs.v,
            inputs.index,
            case.geometry,
            scale=1.0,
            softcap=0.0,
            rows=inputs.rows,
            key_mask=None,
        )
    except ShapeMismatch as error:
        refused = "32-bit" in str(error)
    return {
        "wide": [near[0].wide, spec.wide],
        "same": bool(torch.equal(out, near[1]) and torch.equal(lse, near[2])),
        "refused": refused,
    }


def too_many_lanes(directory: str) -> dict[str, Any]:
    """An index that breaks the bound of its edge tiles shows, as NaN, in the heads that have it."""
    case = replace(BASE, kinds=("band", "blocks", "none"))
    inputs = make_inputs(case)
    tuning = attend_tuning(case.dtype, case.dim, case.geometry, (0, 0))
    operands = (inputs.q, inputs.k, inputs.v, inputs.index, case.geometry)
    plan = replace(attend_plan(*operands, case.block_k), lanes_size=7)
    options = {"softcap": 0.0, "key_mask": None}
    spec = attend_spec(*operands, tuning, tma=False, interpret=True, plan=plan, **options)
    run = {"scale": case.scale, "rows": inputs.rows, "plan": plan}
    out, lse = launch_attend(KernelCache(directory), spec, *operands, **options, **run)
    return {
        "band": bool(out[:, 0].isnan().all() and lse[:, 0].isnan().all()),
        "others": bool(out[:, 1:].isfinite().all()),
    }


def probe_errors(executor: Any, case: Case, num_rows: int) -> dict[str, Any]:
    inputs = make_inputs(case)
    heads = torch.arange(case.heads).flip(0)
    first = (inputs.rows[:, 0] + inputs.rows[:, 1] - num_rows).long()
    options = {
        "scale": case.scale,
        "rows": inputs.rows,
        "key_mask": inputs.key_mask,
        "num_rows": num_rows,
    }
    got = executor.probe(inputs.q, inputs.k, heads, first, case.geometry, **options)
    want = probe_torch(inputs.q, inputs.k, heads, first, case.geometry, **options)
    return {
        "shapes": [tuple(t.shape) for t in got] == [tuple(t.shape) for t in want],
        "columns": float((got[0] - want[0]).abs().max()),
        "distances": float((got[1] - want[1]).abs().max()),
        "mass": float(got[0].sum()),
    }


def nan_shows(executor: Any) -> dict[str, Any]:
    """A NaN key reaches exactly the rows that see it; a NaN query its own row alone."""
    case = replace(BASE, batch=1, kinds=("band",) * 3)
    inputs = make_inputs(case)
    inputs.k[0, 0, 20, 3] = float("nan")
    inputs.q[0, 1, 70, 0] = float("nan")
    options = {"scale": case.scale, "softcap": 0.0, "rows": inputs.rows, "key_mask": None}
    out, lse = executor.attend(inputs.q, inputs.k, inputs.v, inputs.index, case.geometry, **options)
    _, want = attend_reference(inputs.q, inputs.k, inputs.v, inputs.index, case.geometry, **options)
    return {
        "lse": bool(torch.equal(lse.isnan(), want.isnan())) and bool(want.isnan().any()),
        "out": bool(torch.equal(out.isnan().any(-1), want.isnan())),
    }


def empty_lists(executor: Any) -> dict[str, Any]:
    """Slots whose lists are all empty, and an index without capacity for anything."""
    case = replace(BASE, batch=1)
    inputs = make_inputs(case)
    zero = {
        name: torch.zeros_like(getattr(inputs.index, name))
        for name in ("num_full", "num_edge", "num_columns", "num_blocks")
    }
    options = {"scale": case.scale, "softcap": 0.0, "rows": inputs.rows, "key_mask": None}
    out, lse = executor.attend(
        inputs.q,
        inputs.k,
        inputs.v,
        replace(inputs.index, **zero),
        case.geometry,
        **options,
    )
    none = AttentionIndex(
        *(torch.zeros((1, 0, *t.shape[2:]), dtype=t.dtype) for t in inputs.index.tensors()[:-1]),
        slots=torch.full((3, 2), -1, dtype=torch.int32),
    )
    second = executor.attend(inputs.q, inputs.k, inputs.v, none, case.geometry, **options)
    return {
        "empty": not out.any() and bool((lse == float("-inf")).all()),
        "no_capacity": not second[0].any() and bool((second[1] == float("-inf")).all()),
    }


def main() -> None:
    from sparse_compiler.runtime.triton_executor import TritonExecutor

    torch.set_num_threads(1)
    executor = TritonExecutor(sys.argv[1])
    directory = sys.argv[1]
    if sys.argv[2:] == ["variants"]:
        results = {
            "variants": {name: variant_errors(directory, case) for name, case in VARIANTS.items()},
            "distant": distant_heads(directory),
            "lanes": too_many_lanes(directory),
        }
    else:
        results = {
            "attend": {name: attend_errors(executor, case) for name, case in ATTEND.items()},
            "probe": {name: probe_errors(executor, *case) for name, case in PROBE.items()},
            "nan": nan_shows(executor),
            "empty": empty_lists(executor),
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
