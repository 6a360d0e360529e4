"""Layers whose queries and keys are sketched, and whether the kernels do what PyTorch's path does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_compiler.ir.index import Geometry
from sparse_compiler.patterns.base import Limits, SelectRequest
from sparse_compiler.patterns.low_rank import projections, sketches
from sparse_compiler.patterns.visible import visible_keys
from sparse_compiler.runtime.select import default_rows
from sparse_compiler.runtime.triton_row_scores import by_block, in_half

Sketch = Callable[[SelectRequest, int, int], tuple[Tensor, Tensor, Tensor]]
_LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Case:
    """One layer.

    Args:
        decay: direction i of queries, and of keys, is exp(-decay * i) as strong as the first; the
            directions of both are rotated at random.
        mean: of keys, times their own size.
        padding: a part of the first entry's keys is hidden, and so are single keys.
        broken: put into one query and one key, NaN or inf; 0 for none.
        strided: batch, heads and rows as a model's projection leaves them, [B, L, H, D].
        like: ``keys``: all keys are equal; ``queries``: all are 0; ``row``: one row only is not 0;
            ``channels``: sizes of channels differ a thousandfold, the other way round in keys.
    """

    seed: int
    num_q: int = 96
    num_k: int = 96
    offset: int = 0
    right: int = 0
    block_k: int = 16
    batch: int = 1
    kv_heads: int = 1
    groups: int = 2
    dim: int = 64
    decay: float = 0.25
    mean: float = 0.0
    size: float = 1.0
    scale: float = 0.125
    padding: bool = False
    broken: float = 0.0
    strided: bool = False
    like: str = ""
    dtype: torch.dtype = torch.float16
    device: str = "cpu"

    @property
    def key_blocks(self) -> int:
        return -(-self.num_k // self.block_k)

    def _vectors(self, heads: int, length: int, draw: torch.Generator) -> Tensor:
        strength = torch.exp(-self.decay * torch.arange(self.dim))
        turn, _ = torch.linalg.qr(torch.randn(heads, self.dim, self.dim, generator=draw))
        vectors = torch.randn(self.batch, heads, length, self.dim, generator=draw)
        return self.size * (vectors * strength) @ turn

    def request(self) -> SelectRequest:
        draw = torch.Generator().manual_seed(self.seed)
        q = self._vectors(self.kv_heads * self.groups, self.num_q, draw)
        k = self._vectors(self.kv_heads, self.num_k, draw)
        k = k + self.mean * self.size * torch.randn(1, self.kv_heads, 1, self.dim, generator=draw)
        if self.like == "keys":
            k = k[:, :, :1].expand_as(k).clone()
        elif self.like == "queries":
            q = torch.zeros_like(q)
        elif self.like == "row":
            q[:, :, 1:] = 0
        elif self.like == "channels":
            strength = 1000.0 ** torch.linspace(-0.5, 0.5, self.dim)
            q, k = q * strength, k / strength
        mask = None
        if self.padding:
            mask = torch.rand(self.batch, self.num_k, generator=draw) > 0.1
            mask[0, : self.num_k // 4] = False
        if self.broken:
            k[-1, 0, self.num_k // 2, 3] = self.broken
            q[-1, -1, self.num_q // 3, 5] = self.broken
        q, k = (t.to(self.dtype).to(self.device) for t in (q, k))
        if self.strided:
            q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
        mask = None if mask is None else mask.to(self.device)
        rows = default_rows(self.batch, self.num_q, self.num_k, self.offset, mask, q.device)
        none = torch.zeros(0, dtype=torch.int64, device=q.device)
        geometry = Geometry(self.offset, -1, self.right, self.block_k, self.block_k)
        return SelectRequest(
            *(q, k, k[:, :, :0], none, none, none, geometry, rows, mask),
            scale=self.scale,
            limits=Limits(),
            probe=lambda *_: (none, none),
        )


def by_pytorch(request: SelectRequest, block_k: int, key_blocks: int) -> tuple[Tensor, ...]:
    """What the kernels replace."""
    scored = in_half(sketches(request))
    return scored.queries, *by_block(scored, key_blocks, block_k)


def scores(queries: Tensor, keys: Tensor, num_k: int) -> Tensor:
    """float64 [B, Hq, Lq, Lk] of a sketch, in units of log2."""
    line = keys.transpose(2, 3).flatten(2, 3)[:, :, :num_k].double()
    groups = queries.shape[1] // keys.shape[1]
    return queries.double() @ line.repeat_interleave(groups, 1).transpose(-1, -2)


def logits(request: SelectRequest) -> Tensor:
    """float64 [B, Hq, Lq, Lk] less those of the mean key, in units of log2; of finite inputs."""
    q, k = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (request.q, request.k))
    visible = visible_keys(request.rows, request.key_mask, k.shape[2])[:, None, :, None]
    mean = (k * visible).sum(2, keepdim=True) / visible.sum(2, keepdim=True).clamp(min=1)
    groups = q.shape[1] // k.shape[1]
    k = (k - mean).repeat_interleave(groups, 1)
    return request.scale * _LOG2E * (q @ k.transpose(-1, -2))


def without_rounding(request: SelectRequest) -> Tensor:
    """float64 [B, Hq, Lq, Lk] of the reference's directions, in units of log2."""
    of_queries, of_keys, mean = (t.double() for t in projections(request))
    q, k = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (request.q, request.k))
    groups = q.shape[1] // k.shape[1]
    left = q @ of_queries
    right = (k - mean[:, :, None]).repeat_interleave(groups, 1) @ of_keys
    return request.scale * _LOG2E * (left @ right.transpose(-1, -2))


def error(got: Tensor, want: Tensor, request: SelectRequest) -> Tensor:
    """float64 [B, Hq] root mean square of ``got - want`` but for a constant of each row.

    Over pairs of rows and keys that are no padding, and finite.
    """
    visible = visible_keys(request.rows, request.key_mask, request.k.shape[2])[:, None]
    whole = request.k.isfinite().all(-1) & visible
    whole = whole.repeat_interleave(request.q.shape[1] // request.k.shape[1], 1)[:, :, None]
    pairs = whole & request.q.isfinite().all(-1)[..., None]
    differ = torch.where(pairs, got - want, 0.0)
    count = pairs.sum(-1, keepdim=True).clamp(min=1)
    differ = torch.where(pairs, differ - differ.sum(-1, keepdim=True) / count, 0.0)
    return (differ.square().sum((2, 3)) / pairs.sum((2, 3)).clamp(min=1)).sqrt()


def assert_agrees(case: Case, sketch: Sketch, *, eight: bool = False) -> None:
    """The sketch tells logits as well as PyTorch's does; zeros and marks are at the same places.

    Args:
        eight: numbers of 8 bits are expected. Each is off by up to 1/16, one with another by 1/40,
            and a product by 1/28.
    """
    request = case.request()
    found = sketch(request, case.block_k, case.key_blocks)
    wanted = by_pytorch(request, case.block_k, case.key_blocks)
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape and got.device == want.device
        eighth = eight and want.dtype == torch.float16
        assert got.dtype == (torch.float8_e4m3fn if eighth else want.dtype)
        assert got.float().isfinite().all(), case
        assert got.is_contiguous()
    found = tuple(t.half() if t.dtype == torch.float8_e4m3fn else t for t in found)
    assert torch.equal(found[2], wanted[2]), case
    row_is_broken = ~request.q.isfinite().all(-1)
    assert (found[0][row_is_broken] == 0).all()
    key = torch.arange(case.key_blocks * case.block_k, device=request.k.device)
    gone = torch.nn.functional.pad(~request.k.isfinite().all(-1), (0, len(key) - case.num_k))
    gone = gone.repeat_interleave(case.groups, 1)
    line = found[1].transpose(2, 3).flatten(2, 3)
    assert (line[gone | (key >= case.num_k)] == 0).all()

    truth = logits(request)
    size = error(torch.zeros_like(truth), truth, request)
    got, want = (scores(*pair[:2], case.num_k) for pair in (found, wanted))
    ours, theirs = error(got, truth, request), error(want, truth, request)
    # The reference rounds directions and products to the inputs' type.
    most = 1.01 * theirs + (0.05 if eight else 1e-3) * size + 1e-9
    assert (ours <= most).all(), f"{case}: {ours} above {theirs}, logits {size}"
    if eight:
        return
    if case.decay <= 0.05:
        # Where float32 knows all directions: with steeper ones the last are lost in rounding.
        apart = error(got, without_rounding(request), request)
        # .0031 on an H200 for bfloat16 channels that differ a thousandfold.
        assert (apart <= 0.005 * size + 1e-9).all(), f"{case}: {apart} of {size} apart"


CASES = [
    Case(1),
    Case(2, dim=80, groups=3, padding=True, batch=2, num_q=70, num_k=101),
    Case(3, dim=128, groups=4, kv_heads=2, strided=True, dtype=torch.bfloat16, decay=0.05),
    Case(4, dim=256, groups=1, dtype=torch.bfloat16, padding=True, decay=0.05, mean=3.0),
    Case(5, num_q=50, num_k=200, offset=150, mean=30.0, block_k=64),
    Case(6, batch=2, broken=float("nan"), dtype=torch.bfloat16),
    Case(7, broken=float("inf"), right=-1, num_q=33, num_k=64, scale=-0.3),
    Case(8, dim=40, groups=1, decay=0.0),
    Case(9, dim=40, like="keys"),
    Case(10, like="queries"),
    Case(11, dim=80, like="row", dtype=torch.bfloat16),
    Case(12, like="channels", decay=0.0, dtype=torch.bfloat16),
    Case(13, decay=1.0),
    Case(14, decay=0.0, num_q=200, num_k=300, right=-1),
    Case(15, num_q=1, num_k=70, offset=69, groups=1, dim=128),
    Case(16, num_q=40, num_k=1, right=-1),
    Case(17, num_q=40, num_k=40, dtype=torch.bfloat16, size=1e17, scale=1e-17),
    Case(18, num_q=40, num_k=40, dtype=torch.bfloat16, size=1e-25),
    Case(19, scale=0.0),
]
#: Whole key blocks; sizes and scales that leave logits of one size.
BALANCED = [
    Case(41, decay=0.02),
    Case(42, decay=0.02, size=1e3, scale=1e-6, dtype=torch.bfloat16),
    Case(43, decay=0.02, like="channels", groups=1, dim=128, dtype=torch.bfloat16),
]
#: More rows than are sampled, where the number of samples is ``FEW``.
SAMPLED = [
    Case(21, num_q=200, num_k=330, offset=130, padding=True, decay=0.05),
    Case(22, num_q=130, num_k=165, right=-1, groups=3, dtype=torch.bfloat16, decay=0.05),
]
FEW = 128


def shifted(case: Case) -> tuple[SelectRequest, SelectRequest]:
    """A request, and the same with a constant added to all keys: their sketch is the same."""
    request = case.request()
    far = request.k + torch.full((), 64.0, dtype=request.k.dtype)
    near = far - torch.full((), 64.0, dtype=request.k.dtype)
    return replace(request, k=near), replace(request, k=far)
