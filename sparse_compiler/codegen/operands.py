"""Triton's names for the types of the operands of ``attend`` that no rule about names gives."""

from __future__ import annotations

from sparse_compiler.codegen.spec import AttendSpec

__all__ = ["attend_types"]

_TRITON = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float8_e4m3fn": "fp8e4nv",
}


def attend_types(spec: AttendSpec, function: str = "attend") -> dict[str, str]:
    """Operand -> type for the kernels of ``spec``; what is missing follows from its name.

    Args:
        function: a kernel of the spec's text. ``pack_columns`` copies 8-bit values as bytes.
    """
    stored = _TRITON[spec.keys_dtype]
    element = "u8" if function == "pack_columns" and spec.kv_dtype else stored
    types: dict[str, str] = dict.fromkeys(("k", "v", "k_packed", "v_packed"), f"*{element}")
    for name, width in (("k", spec.head_pad), ("v", spec.value_pad)):
        for operand in (f"{name}_tiles", f"{name}_packed_tiles"):
            types[operand] = f"tensordesc<{stored}[1, 1, {spec.step_k}, {width}]>"
    types |= dict.fromkeys(("k_scale", "v_scale", "partial", "stats"), "*fp32")
    types |= dict.fromkeys(("split_from", "parts", "edge_size", "lanes_size"), "i32")
    return types
