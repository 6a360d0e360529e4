"""Every shipped variant of ``attend`` compiles for its targets within ``budgets.json``.

A budget is what the compiler reported when it was last accepted: registers, shared memory, no
spills, and the instructions that the spec promises. sm_80, sm_100 and gfx942 are compiled here and
were never run. After a deliberate change: ``make budgets``, then read the difference.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

from ahead import SHARED_LIMIT, TARGETS, load

from sparse_compiler.codegen.operands import attend_types
from sparse_compiler.codegen.spec import AttendSpec
from sparse_compiler.ir.index import Geometry
from sparse_compiler.runtime.ahead import Launch, compile_launch, report_of
from sparse_compiler.runtime.triton_attend import attend_tuning, float32_precision
from sparse_compiler.runtime.triton_executor import TritonExecutor

FILE = Path(__file__).parent / "budgets.json"
CAPABILITY = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0), "gfx942": (9, 4)}
#: Two programs must fit a Hopper multiprocessor: half of 228 KB, less 1 KB that the system keeps.
HALF_OF_HOPPER = 228 * 1024 // 2 - 1024


def shipped(target: str, dtype: str = "bfloat16", dim: int = 128, **fields: Any) -> AttendSpec:
    """The spec that the executor uses on ``target``."""
    executor = TritonExecutor
    left = 4095 if fields.get("window") else -1
    geometry = Geometry(0, left, 0, executor.block_q, executor.block_k)
    hip = target.startswith("gfx")
    value_dim = fields.pop("value_dim", dim)
    has_band = fields.get("has_band", True)
    tuning = attend_tuning(
        getattr(torch, dtype),
        max(dim, value_dim),
        geometry,
        CAPABILITY[target],
        has_band=has_band,
        hip=hip,
        bounds=fields.get("bounds", False),
        bias=fields.get("bias", ""),
    )
    fields = {"packed": has_band, "wide": False} | fields
    return AttendSpec(
        dtype=dtype,
        head_dim=dim,
        value_dim=value_dim,
        groups=4,
        block_q=geometry.block_q,
        block_k=geometry.block_k,
        tma=target in ("sm_90", "sm_100"),
        precision="ieee" if hip else float32_precision(),
        **asdict(tuning),
        **fields,
    )


@dataclass(frozen=True)
class Case:
    """One kernel of one spec for one target."""

    target: str
    spec: AttendSpec
    function: str = "attend"


EVERYTHING: dict[str, Any] = {
    "window": True,
    "key_mask": True,
    "softcap": True,
    "has_blocks": True,
}
OPERANDS: dict[str, dict[str, Any]] = {
    "bounds": {"bounds": True},
    "bounds and key bias": {"bounds": True, "bias": "key"},
    "distance bias": {"bias": "distance"},
}
SHIPPED: dict[str, Callable[[], Case]] = {
    **{
        f"band {target}": lambda target=target: Case(target, shipped(target))
        for target in CAPABILITY
    },
    "band wide sm_90": lambda: Case("sm_90", shipped("sm_90", wide=True)),
    "band wide sm_100": lambda: Case("sm_100", shipped("sm_100", wide=True)),
    "band split sm_90": lambda: Case("sm_90", shipped("sm_90", split=True)),
    "band split sm_80": lambda: Case("sm_80", shipped("sm_80", split=True)),
    "band gathered sm_90": lambda: Case("sm_90", shipped("sm_90", packed=False)),
    "band without lse sm_90": lambda: Case("sm_90", shipped("sm_90", lse=False)),
    "band fp8 sm_90": lambda: Case("sm_90", shipped("sm_90", kv_dtype="float8_e4m3fn")),
    "band fp8 gfx942": lambda: Case("gfx942", shipped("gfx942", kv_dtype="float8_e4m3fn")),
    "band and blocks sm_90": lambda: Case("sm_90", shipped("sm_90", has_blocks=True)),
    "blocks sm_90": lambda: Case("sm_90", shipped("sm_90", has_blocks=True, has_band=False)),
    "blocks sm_80": lambda: Case("sm_80", shipped("sm_80", has_blocks=True, has_band=False)),
    **{
        f"{what} {target}": lambda target=target, fields=fields: Case(
            target, shipped(target, **fields)
        )
        for what, fields in OPERANDS.items()
        for target in CAPABILITY
        if what != "bounds" or target in ("sm_80", "sm_90")
    },
    "row bias sm_90": lambda: Case("sm_90", shipped("sm_90", bias="row")),
    "blocks bounds and row bias sm_90": lambda: Case(
        "sm_90", shipped("sm_90", has_band=False, has_blocks=True, bounds=True, bias="row")
    ),
    "everything with operands sm_90": lambda: Case(
        "sm_90", shipped("sm_90", bounds=True, bias="row", **EVERYTHING)
    ),
    "everything sm_90": lambda: Case("sm_90", shipped("sm_90", **EVERYTHING)),
    "fp16 D 64 sm_90": lambda: Case("sm_90", shipped("sm_90", "float16", 64)),
    "fp16 D 80 sm_90": lambda: Case("sm_90", shipped("sm_90", "float16", 80)),
    "bf16 D 192 Dv 128 sm_90": lambda: Case(
        "sm_90", shipped("sm_90", "bfloat16", 192, value_dim=128)
    ),
    "bf16 D 256 sm_90": lambda: Case("sm_90", shipped("sm_90", "bfloat16", 256)),
    "fp32 D 64 sm_90": lambda: Case("sm_90", shipped("sm_90", "float32", 64)),
    "fp32 D 16 sm_80": lambda: Case("sm_80", shipped("sm_80", "float32", 16)),
    **{
        f"{function} {target}": lambda target=target, function=function: Case(
            target, shipped(target, split=True), function
        )
        for function in ("pack_columns", "combine", "list_lanes")
        for target in ("sm_90", "gfx942")
    },
}


def required(case: Case) -> list[str]:
    """Instructions without which the kernel is not what its spec says."""
    if case.function != "attend":
        return []
    matrix = {
        "sm_80": "mma.sync",
        "sm_90": "wgmma.mma_async",
        "sm_100": "tcgen05.mma",
        "gfx942": "v_mfma",
    }
    tiles = ["cp.async.bulk.tensor.4d"] if case.spec.tma else []
    return [matrix[case.target], *tiles]


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="sparse_compiler_budgets_"))


@cache
def compiled(name: str) -> Any:
    """The compiled kernel of a case."""
    case = SHIPPED[name]()
    types = attend_types(case.spec, case.function)
    options: dict[str, Any] = {"num_warps": 4, "num_stages": None}
    if case.function == "attend":
        options = dict(case.spec.launch_options)
    launch = Launch(case.spec, case.function, options=options, types=types)
    return compile_launch(launch, load(case.spec, _folder()), TARGETS[case.target])


def measure(name: str) -> dict[str, Any]:
    """What the compiler reports, in the form of the budget file."""
    case, report = SHIPPED[name](), report_of(compiled(name))
    registers, spills = report.registers, report.spills
    if case.target.startswith("gfx"):
        # Scalar registers "spill" to lanes of vector ones; what goes to memory is the scratch segment.
        numbers = dict(
            re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", report.assembly)
        )
        registers = int(numbers["vgpr_count"])
        spills = int(numbers["private_segment_fixed_size"])
    return {
        "registers": registers,
        "shared": report.shared,
        "spills": spills,
        "instructions": [text for text in required(case) if text in report.assembly],
    }


def read_budgets() -> dict[str, dict[str, Any]]:
    return json.loads(FILE.read_text())


@pytest.mark.parametrize("name", SHIPPED)
def test_kernel_stays_within_its_budget(name: str) -> None:
    case, budget, found = SHIPPED[name](), read_budgets()[name], measure(name)
    for field in ("registers", "shared", "spills"):
        assert found[field] <= budget[field], (
            f"{name}: {field} {found[field]}, budget {budget[field]}; `make budgets` accepts it"
        )
    assert found["instructions"] == budget["instructions"] == required(case)
    assert found["spills"] == 0
    assert found["shared"] <= SHARED_LIMIT[case.target]


@pytest.mark.parametrize(
    "name", ["band sm_90", "band wide sm_90", "band and blocks sm_90", "everything sm_90"]
)
def test_two_programs_fit_a_hopper_multiprocessor(name: str) -> None:
    budget = read_budgets()[name]
    assert budget["shared"] <= HALF_OF_HOPPER
    assert 2 * 128 * budget["registers"] <= 65536


def test_budgets_and_shipped_kernels_are_the_same_set() -> None:
    assert set(read_budgets()) == set(SHIPPED)


def narrow_products(ttir: str) -> list[str]:
    """Products with a stride or a list's size that are taken in 32 bits, as lines of Triton's IR."""
    tainted = set(re.findall(r"%(\w*_stride_\w|\w+_size): i32", ttir))
    found = []
    for line in ttir.splitlines():
        match = re.match(r"\s*%(\w+) = (\S+) (.*)", line)
        if match is None:
            continue
        name, operation, rest = match.groups()
        operands = re.findall(r"%(\w+)", rest.split(" loc(")[0])
        is_narrow = re.search(r": (?:tensor<[\dx]*)?i32>?", rest) is not None
        if not tainted.intersection(operands) or not is_narrow:
            continue
        if operation == "arith.muli":
            found.append(line.strip())
        elif operation in ("tt.splat", "tt.broadcast", "tt.expand_dims"):
            tainted.add(name)
    return found


def test_wide_text_multiplies_no_stride_in_32_bits() -> None:
    assert narrow_products(compiled("band wide sm_90").asm["ttir"]) == []
    assert len(narrow_products(compiled("band sm_90").asm["ttir"])) > 10, "the check sees none"


def test_a_kernel_over_its_budget_is_named_with_both_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "list_lanes sm_90"
    budgets = read_budgets()
    less = budgets[name]["registers"] - 1
    tight = {**budgets, name: {**budgets[name], "registers": less}}
    monkeypatch.setattr(sys.modules[__name__], "read_budgets", lambda: tight)
    with pytest.raises(AssertionError, match=rf"registers {less + 1}, budget {less}"):
        test_kernel_stays_within_its_budget(name)


def write_budgets(names: list[str]) -> None:
    """Accept what the compiler reports now, for ``names`` or for all."""
    known = read_budgets() if names else {}
    budgets = {
        name: measure(name) if not names or name in names else known[name] for name in SHIPPED
    }
    FILE.write_text(json.dumps(budgets, indent=2) + "\n")


if __name__ == "__main__":
    write_budgets(sys.argv[1:])
