"""Compiles generated kernels for devices that are not here and reads what the compiler reports."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_compiler.codegen.emit import PLAIN_SIZES, emit
from sparse_compiler.codegen.spec import AttendSpec, KernelSpec, ProbeSpec

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
_FLOAT_POINTERS = {"lse", "tops", "totals"}


@dataclass(frozen=True)
class Report:
    """What a compilation says; registers and spills are -1 where no assembler reports them."""

    shared: int
    registers: int
    spills: int
    assembly: str


def load(spec: KernelSpec, directory: Path) -> ModuleType:
    """The module of ``spec``'s text, imported from ``directory``."""
    path = directory / f"kernel_{abs(hash(spec)):x}.py"
    path.write_text(emit(spec))
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def _type_of(name: str, spec: KernelSpec, function: str) -> str:
    element = _SHORT[spec.dtype]
    if name in ("k_tiles", "v_tiles"):
        assert isinstance(spec, AttendSpec)
        width = spec.head_pad if name == "k_tiles" else spec.value_pad
        return f"tensordesc<{element}[1, 1, {spec.step_k}, {width}]>"
    if name in ("q", "k", "v", "out"):
        return f"*{element}"
    if name in _FLOAT_POINTERS or (
        isinstance(spec, ProbeSpec) and name in ("columns", "distances")
    ):
        return "*fp32"
    if name in _FLOATS:
        return _FLOATS[name]
    if name in PLAIN_SIZES[spec.template] or "stride" in name:
        return "i32"
    return _BYTES.get(name) or _LONG.get(name) or "*i32"


def compile_for(spec: KernelSpec, module: ModuleType, function: str, target: str) -> Report:
    """Compile one kernel as a launch with aligned pointers and strides would."""
    kernel: Any = getattr(module, function)
    signature = {name: _type_of(name, spec, function) for name in kernel.arg_names}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or "stride" in name
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs={}, attrs=attributes)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    shared = compiled.metadata.shared
    if "ptx" not in compiled.asm:
        return Report(shared, -1, -1, compiled.asm["amdgcn"])
    registers, spills = _assemble(compiled.asm["ptx"])
    return Report(shared, registers, spills, compiled.asm["ptx"])


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
