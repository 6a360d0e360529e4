"""What a kernel's text depends on, and nothing else: the key under which its source is emitted."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = [
    "BIAS_KINDS",
    "DTYPES",
    "KV_DTYPES",
    "AttendSpec",
    "KernelSpec",
    "ProbeSpec",
    "WorkListSpec",
    "power_of_two",
]

DTYPES = ("float16", "bfloat16", "float32")
KV_DTYPES = ("", "float8_e4m3fn")
BIAS_KINDS = ("", "key", "row", "distance")


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """What every kernel's text depends on.

    Args:
        dtype: of q, k and v; a name in ``DTYPES``.
        head_dim: D, 16..256; padded to a power of two inside the kernel.
        groups: query heads per key head.
        causal: keys after ``position + right`` are hidden.  window: so are those before
            ``position - left``; both sizes are run-time arguments.
        key_mask: a padding mask is read.
        num_warps, num_stages: Triton's launch options.
        precision: of float32 products, Triton's ``input_precision``.
        interpret: written for Triton's interpreter: products in float32, since NumPy has no bf16.
    """

    dtype: str
    head_dim: int
    groups: int
    causal: bool = True
    window: bool = False
    key_mask: bool = False
    num_warps: int = 4
    num_stages: int = 2
    interpret: bool = False
    precision: str = "tf32x3"

    @property
    def head_pad(self) -> int:
        return power_of_two(self.head_dim)

    @property
    def template(self) -> str:
        """File name of the template below ``codegen/templates``."""
        raise NotImplementedError

    def describe(self) -> str:
        """All fields on a few lines, for the header of the generated file."""
        pairs = [f"{field.name}={getattr(self, field.name)!r}" for field in fields(self)]
        lines, line = [], "Spec:"
        for pair in pairs:
            if len(line) + len(pair) > 94:
                lines.append(line)
                line = "     "
            line += " " + pair
        return "\n".join([*lines, line])


@dataclass(frozen=True, kw_only=True)
class WorkListSpec(KernelSpec):
    """The kernel that plans each row block's work before ``attend``.

    Its text depends on no dtype or head size: those are fixed, so that all attentions share it.

    Args:
        block_q, block_k, step_k, has_band, has_blocks, packed, bounds: as in ``AttendSpec``.
        lines: row blocks of one program.
    """

    dtype: str = "bfloat16"
    head_dim: int = 16
    groups: int = 1
    block_q: int = 64
    block_k: int = 64
    step_k: int = 64
    has_band: bool = True
    has_blocks: bool = False
    packed: bool = False
    bounds: bool = False
    lines: int = 64
    num_warps: int = 2

    @property
    def item_fields(self) -> int:
        """Numbers of one item; the template says which."""
        if not self.has_band:
            return 4
        if self.packed:
            return 11 if self.window or self.bounds else 9
        return 9 if self.bounds else 8

    @property
    def template(self) -> str:
        return "work_list.py.jinja"


@dataclass(frozen=True, kw_only=True)
class AttendSpec(KernelSpec):
    """The kernel of ``attend``: all heads of a layer, whatever their patterns, in one launch.

    Args:
        value_dim: Dv, 16..256.
        block_q, block_k: M and N, powers of two from 16.
        has_band, has_blocks: the kinds of work that the index can hold.
        softcap: logits are capped; the cap itself is an argument.
        tma: tiles come through tensor descriptors; else through pointers.
        step_k: keys of one step: N or, where a whole tile needs too much memory, a part of it.
        kv_dtype: of k and v where it is not ``dtype``; a name in ``KV_DTYPES``. Their values are
            multiplied by one scale a head, operands ``k_scale`` and ``v_scale``.
        packed: a head's columns were copied into dense tiles before; else they are gathered by
            every row block.
        split: row blocks are computed in several parts, which ``combine`` joins.
        lse: the log-sum-exp of each row is written.
        wide: offsets are 64-bit; ``codegen.offsets`` proves where 32 are enough.
        max_registers: of a thread of ``attend``; 0 leaves it to the assembler.
        bounds: every row has a first and a last key of its own, both read.
        bias: what is added to the logits; a name in ``BIAS_KINDS``: nothing, a number for each
            key, for each pair of row and key, or for each distance between them.
    """

    value_dim: int
    block_q: int = 64
    block_k: int = 64
    has_band: bool = True
    has_blocks: bool = False
    softcap: bool = False
    tma: bool = False
    step_k: int = 64
    kv_dtype: str = ""
    packed: bool = False
    split: bool = False
    lse: bool = True
    wide: bool = True
    max_registers: int = 0
    bounds: bool = False
    bias: str = ""

    @property
    def launch_options(self) -> dict[str, int]:
        """Triton's options for ``attend``; the other kernels of the text take none of them."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | ({"maxnreg": self.max_registers} if self.max_registers else {})

    @property
    def value_pad(self) -> int:
        return power_of_two(self.value_dim)

    @property
    def copies(self) -> int:
        """Copies of an index vector that give every thread of the program one element."""
        return max(1, 32 * self.num_warps // self.step_k)

    @property
    def parts(self) -> int:
        """Steps of one tile."""
        return self.block_k // self.step_k

    @property
    def work_list(self) -> WorkListSpec:
        """The kernel that plans this one's work."""
        return WorkListSpec(
            causal=self.causal,
            window=self.window,
            key_mask=self.key_mask,
            block_q=self.block_q,
            block_k=self.block_k,
            step_k=self.step_k,
            has_band=self.has_band,
            has_blocks=self.has_blocks,
            packed=self.packed,
            bounds=self.bounds,
            interpret=self.interpret,
        )

    @property
    def item_fields(self) -> int:
        return self.work_list.item_fields

    @property
    def keys_dtype(self) -> str:
        """The dtype that k and v are stored in."""
        return self.kv_dtype or self.dtype

    @property
    def template(self) -> str:
        return "attend.py.jinja"


@dataclass(frozen=True, kw_only=True)
class ProbeSpec(KernelSpec):
    """The two kernels of ``probe``: row statistics by chunk of keys, and the sums.

    Args:
        num_rows: probe rows; padded to a power of two from 16, R, which is also the keys of a tile.
        heads: heads of a KV group that share one read of a key: 1, 2 or 4.
        last_rows: the probe rows are the last that see keys; else their address is an operand.
    """

    num_rows: int = 64
    heads: int = 1
    last_rows: bool = False

    @property
    def rows_pad(self) -> int:
        return max(16, power_of_two(self.num_rows))

    @property
    def template(self) -> str:
        return "probe.py.jinja"
