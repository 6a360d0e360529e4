"""Compiling generated kernels without launching them, for this device or for one that is not here.

Imports Triton, so it is imported on demand.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_compiler.codegen.emit import PLAIN_SIZES
from sparse_compiler.codegen.operands import attend_types
from sparse_compiler.codegen.spec import AttendSpec, KernelSpec, ProbeSpec

__all__ = [
    "SHARED_LIMIT",
    "TARGETS",
    "Launch",
    "Report",
    "compile_for",
    "compile_launch",
    "report_of",
]

#: Shared memory that one program may take, in bytes.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 65536}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_BYTES = {"key_mask": "*u8", "covered": "*u8"}
_FLOATS = {"scale": "fp32", "cap": "fp32"}
_LONG = {"heads": "*i64", "first_row": "*i64"}
_FLOAT_POINTERS = {"lse", "scores", "tops", "totals"}


@dataclass(frozen=True)
class Report:
    """What a compilation says; registers and spills are -1 where no assembler reports them.

    Args:
        shared: bytes of shared memory of one program.
        registers: of one thread.
        spills: bytes stored to and loaded from local memory by one thread.
        assembly: PTX or AMD assembly.
    """

    shared: int
    registers: int
    spills: int
    assembly: str


@dataclass(frozen=True)
class Launch:
    """One kernel of a spec, as it will be launched.

    Args:
        spec: what the source is emitted from.
        function: a kernel of that source.
        options: launch options besides the spec's own ``num_warps`` and ``num_stages``; an option
            that is None is left to Triton.
        types: Triton types of arguments by name, e.g. ``{"edges": "i32"}``, where the rule that
            this module applies to names does not hold.
    Pointers and strides count as multiples of 16, as they are for almost every tensor; other
    integers as ordinary ones. A bias has the dtype of q, and its keys lie side by side.
    """

    spec: KernelSpec
    function: str
    options: Mapping[str, Any] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)


def _type_of(name: str, spec: KernelSpec) -> str:
    element = _SHORT[spec.dtype]
    if name in ("k_tiles", "v_tiles"):
        assert isinstance(spec, AttendSpec)
        width = spec.head_pad if name == "k_tiles" else spec.value_pad
        return f"tensordesc<{element}[1, 1, {spec.step_k}, {width}]>"
    if name in ("q", "k", "v", "out", "logit_bias"):
        return f"*{element}"
    if name in _FLOAT_POINTERS or (
        isinstance(spec, ProbeSpec) and name in ("columns", "distances")
    ):
        return "*fp32"
    if name in _FLOATS:
        return _FLOATS[name]
    if name == "bias_stride_k":
        return "constexpr"  # 1, which a launch writes into the kernel
    if name in PLAIN_SIZES.get(spec.template, ()) or "stride" in name:
        return "i32"
    return _BYTES.get(name) or _LONG.get(name) or "*i32"


def compile_launch(launch: Launch, module: ModuleType, target: GPUTarget) -> Any:
    """The compiled kernel (``triton.compiler.CompiledKernel``) of a launch.

    Args:
        module: of ``launch.spec``'s text.
        target: the device to compile for; it need not be here.
    """
    spec = launch.spec
    kernel: Any = getattr(module, launch.function)
    known = attend_types(spec, launch.function) if isinstance(spec, AttendSpec) else {}
    types = {**known, **launch.types}
    signature = {name: types.get(name) or _type_of(name, spec) for name in kernel.arg_names}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or "stride" in name
        if signature[name] != "constexpr" and not kernel.params[place].do_not_specialize
    }
    constants = {
        (place,): 1 for place, name in enumerate(kernel.arg_names) if signature[name] == "constexpr"
    }
    source: Any = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source = GluonASTSource
    ast_source = source(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    # As a launch would set them: the result is found again under the same key.
    options = {
        "debug": knobs.runtime.debug,
        "instrumentation_mode": knobs.compilation.instrumentation_mode,
        "num_warps": spec.num_warps,
        "num_stages": spec.num_stages,
        **launch.options,
    }
    options = {name: value for name, value in options.items() if value is not None}
    return triton.compile(ast_source, target=target, options=options)


def report_of(compiled: Any) -> Report:
    """Shared memory, registers and spills of a compiled kernel."""
    shared = compiled.metadata.shared
    if "ptx" not in compiled.asm:
        return Report(shared, -1, -1, compiled.asm["amdgcn"])
    registers, spills = _assemble(compiled.asm["ptx"])
    return Report(shared, registers, spills, compiled.asm["ptx"])


def compile_for(spec: KernelSpec, module: ModuleType, function: str, target: str) -> Report:
    """Compile one kernel as a launch with aligned pointers and strides would.

    Args:
        target: a name in ``TARGETS``.
    """
    return report_of(compile_launch(Launch(spec, function), module, TARGETS[target]))


def _assemble(ptx: str) -> tuple[int, int]:
    """(registers, bytes spilled) from ptxas -v."""
    found = re.search(r"\.target (sm_\w+)", ptx)
    assert found is not None
    backend = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    names = ["ptxas-blackwell", "ptxas"] if found[1].startswith("sm_10") else ["ptxas"]
    tool = next(path for name in names if (path := backend / name).exists())
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(tool), "-v", f"-arch={found[1]}", str(source), "-o", f"{folder}/out"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    assert registers is not None
    return int(registers[1]), sum(int(size) for size in spills)
