"""The sizes of one attention as plain numbers: what choosing a kernel needs, without a graph."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparse_compiler.errors import ShapeMismatch

__all__ = ["DTYPE_BYTES", "NEVER", "SiteShape", "Tile"]

NEVER = 2**30
"""A break-even length that no prompt reaches: dense always wins."""
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class SiteShape:
    """One attention call.

    Args:
        batch, heads, kv_heads: B, Hq, Hkv; Hq is a multiple of Hkv.
        num_q, num_k: Lq, Lk in tokens.
        head_dim, value_dim: D, Dv.
        dtype: of q, k and v; a key of ``DTYPE_BYTES``.
        causal: query i sees keys up to i + Lk - Lq; else all.
    Raises:
        ShapeMismatch: a size is not positive, or the sizes do not fit together.
    """

    batch: int
    heads: int
    kv_heads: int
    num_q: int
    num_k: int
    head_dim: int
    value_dim: int
    dtype: str = "bfloat16"
    causal: bool = True

    def __post_init__(self) -> None:
        sizes = (self.batch, self.heads, self.kv_heads, self.num_q, self.num_k)
        if min(*sizes, self.head_dim, self.value_dim) < 1:
            raise ShapeMismatch("sizes of a site", "positive", sizes)
        if self.heads % self.kv_heads:
            raise ShapeMismatch(
                "query heads of a site", f"a multiple of its {self.kv_heads} key heads", self.heads
            )
        if self.causal and self.num_q > self.num_k:
            raise ShapeMismatch(
                "queries of a causal site", f"at most its {self.num_k} keys", self.num_q
            )
        if self.dtype not in DTYPE_BYTES:
            raise ShapeMismatch("dtype of a site", f"one of {', '.join(DTYPE_BYTES)}", self.dtype)

    @property
    def element_size(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def allowed_pairs(self) -> float:
        """Pairs of one query and one key that the mask allows, over all heads."""
        every = self.num_q * self.num_k
        hidden = self.num_q * (self.num_q - 1) / 2 if self.causal else 0
        return self.batch * self.heads * (every - hidden)

    def at_length(self, tokens: int) -> SiteShape:
        """The same site for a prompt of that many tokens, all of them queries."""
        return replace(self, num_q=tokens, num_k=tokens)

    def __str__(self) -> str:
        batch = f"{self.batch}*" if self.batch > 1 else ""
        length = f"{self.num_q}" + (f"/{self.num_k}" if self.num_q != self.num_k else "")
        size = f"{self.head_dim}" + (
            f"/{self.value_dim}" if self.value_dim != self.head_dim else ""
        )
        return f"{batch}{self.heads}x{self.kv_heads}x{length}x{size}:{self.dtype}"


@dataclass(frozen=True)
class Tile:
    """What an executor wants for one site.

    Args:
        block_q, block_k: row and key block (M, N) of the site's index.
        min_tokens: length from which sparse attention is expected to win.
    """

    block_q: int
    block_k: int
    min_tokens: int
