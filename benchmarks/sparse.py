"""Our operators on one set of inputs, called as a rewritten graph calls them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sparse_compiler.runtime.dispatch  # noqa: F401  installs the operators
from sparse_compiler.errors import OptionInvalid
from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry
from sparse_compiler.runtime.registry import executor_for
from sparse_compiler.testing import parameters

__all__ = ["Sparse"]

PROBE_ROWS = 64


class Sparse:
    """select and attend of one causal layer.

    Args:
        q: [1, Hq, N, D].  k, v: [1, Hkv, N, D].
        pattern: of every head, or one for each; None with ``index``.
        blocks: (block_q, block_k) of the index.
        index: an index to use instead of a selected one.
        executor: that runs it.
    Raises:
        OptionInvalid: neither or both of pattern and index.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: HeadPattern | list[HeadPattern] | None,
        blocks: tuple[int, int],
        *,
        index: AttentionIndex | None = None,
        executor: str = "triton",
    ) -> None:
        if (pattern is None) == (index is None):
            raise OptionInvalid(
                "(pattern, index)", "one of the two", (pattern, index), where="Sparse"
            )
        self.q, self.k, self.v = q, k, v
        self.geometry = Geometry(0, -1, 0, *blocks)
        self.fixed, self.executor = index, executor
        if isinstance(pattern, HeadPattern):
            pattern = [pattern] * q.shape[1]
        self.heads = pattern or []
        self._scale = q.shape[3] ** -0.5
        self._band = (None, None, None, None, 0, -1, 0)
        if self.heads:
            self._prepare()

    def _prepare(self) -> None:
        limits = None
        for head in self.heads:
            mine = registry.get(head.name).limits(head, *self._blocking)
            limits = mine if limits is None else limits.join(mine)
        assert limits is not None
        self._limits = [limits.columns, limits.distances, limits.blocks]
        params = parameters(self.heads)
        self._num_slots = [int((params[:, column] >= 0).sum()) for column in (3, 4)]
        self._params = params.to(self.q.device)
        used = [registry.get(name) for name in dict.fromkeys(head.name for head in self.heads)]
        self._numbers = [pattern.number for pattern in used]
        self._group = registry.summary_group(used, self.geometry.block_k)

    @property
    def _blocking(self) -> tuple[int, int]:
        return self.geometry.block_q, self.geometry.block_k

    def _choice(self, min_tokens: int) -> tuple[float, int, str, int]:
        return -1.0, min_tokens, self.executor, -1

    def select(self, min_tokens: int = 0) -> list[Tensor]:
        """Estimation and index: the tensors of an `AttentionIndex`, or those of the fixed one."""
        if self.fixed is not None:
            return list(self.fixed.tensors())
        ops, choice = torch.ops.sparse_compiler, self._choice(min_tokens)
        summary = ops.summarize_keys(self.k, None, None, self._group, *choice)
        return ops.select(
            *(self.q, self.k, summary, self._params, *self._band, self._scale, *self._blocking),
            *(self._numbers, self._num_slots, self._limits),
            *choice,
        )

    def attend(
        self, index: AttentionIndex | list[Tensor], min_tokens: int = 0
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) over an index."""
        tensors = index.tensors() if isinstance(index, AttentionIndex) else index
        return torch.ops.sparse_compiler.attend(
            *(
                self.q,
                self.k,
                self.v,
                *tensors,
                *self._band,
                self._scale,
                0.0,
                None,
                *self._blocking,
            ),
            *self._choice(min_tokens),
        )

    def run(self) -> Tensor:
        """Both steps."""
        return self.attend(self.select())[0]

    def declined(self) -> Tensor:
        """What the two operators cost where the prompt counts as short: dense attention."""
        bound = self.q.shape[2] + 1
        return self.attend(self.select(bound), bound)[0]

    def probe(self) -> Any:
        """The executor's probe of the last 64 rows alone."""
        length, device = self.q.shape[2], self.q.device
        return executor_for(self.executor, device.type).probe(
            self.q,
            self.k,
            torch.arange(self.q.shape[1], device=device),
            torch.full((1,), length - PROBE_ROWS, device=device),
            self.geometry,
            scale=self._scale,
            rows=torch.tensor([[0, length, 0, 0, length]], dtype=torch.int32).to(device),
            key_mask=None,
            num_rows=PROBE_ROWS,
        )
