"""The spec of the Hopper kernel."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_compiler.codegen.spec import KernelSpec, WorkListSpec, power_of_two

__all__ = ["HopperSpec"]

_SWIZZLE = 64  # elements of two bytes in the 128 bytes that shared memory is swizzled by
_ROWS = 64  # of one consumer


@dataclass(frozen=True, kw_only=True)
class HopperSpec(KernelSpec):
    """The warp-specialised ``attend`` kernel of sm_90 for block lists; 16-bit inputs.

    Args:
        value_dim: Dv; it and D are at most 128.
        block_q, block_k: M, a multiple of 64 with one consumer for each 64 rows, and N.
        stages: tiles of K, and of V, in shared memory.
        softcap: logits are capped; the cap itself is an argument.
    """

    value_dim: int
    block_q: int = 128
    block_k: int = 128
    stages: int = 3
    softcap: bool = False

    @property
    def consumers(self) -> int:
        return self.block_q // _ROWS

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread of a consumer and of the producer; 504 for all three warp groups."""
        return (232, 40) if self.key_mask else (240, 24)

    @property
    def head_pad(self) -> int:
        return max(_SWIZZLE, power_of_two(self.head_dim))

    @property
    def value_pad(self) -> int:
        return max(_SWIZZLE, power_of_two(self.value_dim))

    @property
    def template(self) -> str:
        return "attend_hopper.py.jinja"

    @property
    def work_list(self) -> WorkListSpec:
        """The kernel that plans this one's work."""
        return WorkListSpec(
            causal=self.causal,
            window=self.window,
            key_mask=self.key_mask,
            block_q=self.block_q,
            block_k=self.block_k,
            step_k=self.block_k,
            has_band=False,
            has_blocks=True,
            interpret=self.interpret,
        )

    @property
    def item_fields(self) -> int:
        return self.work_list.item_fields
