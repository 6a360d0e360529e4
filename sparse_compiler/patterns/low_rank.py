"""Low rank: every row is scored against every key, in the few directions that matter for products.

The means of neighbours lose what single keys are: a rotary position turns each of them by another
angle. A projection loses nothing of that kind. The queries of each head, and the keys that they see,
are projected on the 32 directions that explain most of their products, whatever the model put there,
and every pair of row and key is scored with half (D 64) or a quarter (D 128) of the arithmetic; in 8
bits, where the kernels have them, that costs what 16 directions in 16 bits do. Query heads of one key
head ask for different things: 32 directions that they share miss more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_compiler.patterns.base import BlockRule, Scored, SelectRequest
from sparse_compiler.patterns.ranking import real_rows
from sparse_compiler.patterns.row_scores import RowScored
from sparse_compiler.patterns.visible import visible_keys

__all__ = ["COSTS_AS", "RANK", "SAMPLES", "TURNS", "LowRank", "projections", "sketches"]

RANK = 32
#: Directions of 16 bits that take as long: predicted costs were fitted to those, and 32 directions of
#: 8 bits have as many bytes, and as many cycles of Hopper's matrix units. Where a GPU has no 8 bits,
#: and for heads of at most 32 numbers, the prediction is too low.
COSTS_AS = 16
SAMPLES = 4096  # rows, and keys, from which second moments are taken
TURNS = 2  # of the subspace iteration, two steps each


def sketches(request: SelectRequest) -> Scored:
    """Queries and keys in ``RANK`` directions; a group is one key.

    Each query head has directions, and so keys, of its own: keys [B, Hq, Lk, RANK]. Heads of at most
    ``RANK`` numbers are taken as they are, the keys shared.
    """
    dim = request.q.shape[3]
    if dim <= RANK:
        finite = request.k.isfinite().all(-1)
        keys = torch.where(finite[..., None], request.k, 0)
        queries, scale = request.q, request.scale
        queries = torch.where(queries.isfinite().all(-1, keepdim=True), queries, 0)
        if scale < 0:
            queries, scale = -queries, -scale
        return Scored(queries, keys, ~finite, 1, scale)
    of_queries, of_keys, mean = projections(request)
    kv_heads = request.k.shape[1]
    queries = torch.matmul(request.q, of_queries.to(request.q.dtype))
    # A row with a NaN or inf votes for nothing: it must not choose for its neighbours.
    queries = torch.where(queries.isfinite().all(-1, keepdim=True), queries, 0)
    if request.scale < 0:
        queries = -queries
    # The directions of all query heads of a key head side by side: its keys are read once.
    of_keys = of_keys.unflatten(1, (kv_heads, -1)).transpose(2, 3)
    side_by_side = of_keys.flatten(3)
    # Before rounding, so that a large mean costs no digits.
    keys = torch.matmul(request.k.float(), side_by_side)
    keys = (keys - torch.matmul(mean[:, :, None], side_by_side)).to(request.k.dtype)
    keys = keys.unflatten(3, of_keys.shape[3:]).transpose(2, 3).flatten(1, 2)
    finite = keys.isfinite().all(-1)
    keys = torch.where(finite[..., None], keys, 0)
    return Scored(queries, keys, ~finite, 1, abs(request.scale))


def projections(request: SelectRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Directions of queries and of keys whose products stand for the logits, and the mean key.

    With A the second moments of a head's queries and B the covariance of its key head's keys, the best
    W of rank r has columns that span the leading invariant subspace of B A; with W' A W = 1, q . k is
    q'W . W'A k. Moments come from up to 4096 rows and keys, spread evenly. No host synchronisation.

    Returns:
        float32 [B, Hq, D, r] of queries, [B, Hq, D, r] of keys, [B, Hkv, D] mean.
    """
    q, k = request.q, request.k
    (batch, heads, num_q, dim), (_, kv_heads, num_k, _) = q.shape, k.shape
    every = -(-num_q // SAMPLES)
    first, past = (t[:, None, None, None] for t in real_rows(request))
    place = torch.arange(0, num_q, every, device=q.device)[:, None]
    rows = q[:, :, ::every].float()
    rows = torch.where((place >= first) & (place < past) & rows.isfinite(), rows, 0).double()
    every = -(-num_k // SAMPLES)
    visible = visible_keys(request.rows, request.key_mask, num_k)[:, None, ::every, None]
    keys = torch.where(visible & k[:, :, ::every].isfinite(), k[:, :, ::every].double(), 0)
    count = visible.sum(2).clamp(min=1)
    mean = keys.sum(2) / count
    keys = torch.where(visible, keys - mean[:, :, None], 0)
    of_rows = rows.transpose(-1, -2) @ rows / rows.shape[2]
    of_keys = keys.transpose(-1, -2) @ keys / count[..., None]
    basis = _start(dim, q.device).expand(batch, heads, -1, -1)
    step = of_keys.repeat_interleave(heads // kv_heads, 1) @ of_rows
    step = step @ step
    step = step / step.abs().amax((-1, -2), keepdim=True).clamp(min=1e-100)
    for _ in range(TURNS):
        basis = _orthonormal(step @ basis, of_rows)
    return basis.float(), (of_rows @ basis).float(), mean.float()


def _start(dim: int, device: torch.device) -> Tensor:
    """Where the iteration begins, float64 [D, RANK], the same every time.

    Cosines whose frequencies also change along a column: where the moments are those of some
    channels only, as rotary positions make them, low frequencies would be nearly the same there
    (half of 64 channels: 16 of 32 columns lost). The numbers are found by trying; the worst ratio of
    singular values on 32 of 64 to 256 channels, halves, every second and such, is 640.
    """
    place = torch.arange(dim, device=device)
    step = 452 * place[:, None] ** 2 + 329 * place[:, None] * (2 * place[:RANK] + 1)
    phase = (step + 512 * place[:RANK]) % 1021
    return torch.cos(phase.double() * (2 * math.pi / 1021))


def _orthonormal(basis: Tensor, metric: Tensor) -> Tensor:
    """Columns of the same span with basis' metric basis = 1, float64 [..., D, r]."""
    basis = basis / basis.norm(dim=-2, keepdim=True).clamp(min=1e-100)
    gram = basis.transpose(-1, -2) @ metric @ basis
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    # Without a check, which would wait for the device; the addition keeps it from failing.
    factor = torch.linalg.cholesky_ex(gram + (1e-11 * size + 1e-30) * identity).L
    return torch.linalg.solve_triangular(factor, basis.transpose(-1, -2), upper=False).transpose(
        -1, -2
    )


class LowRank(RowScored):
    """Keep key blocks with a key that holds ``first`` millionths of some row's mass, at rank 32.

    See ``RowScored`` for ``second`` and what is always kept.

    Costs RANK / D of dense attention's score products and a maximum in place of its exponentials; with
    operands of 8 bits (``triton_sketch``) the products take half of that. Misses keys that differ from
    others only in directions beyond the 32 that explain most of a head's products; a soft cap is not
    seen; on Hopper, blocks that lie 15.9 log2 units or more below the best of 64 neighbours. Under a
    causal mask the choice for a row block depends on what follows it through the directions alone,
    which come from a sample of all rows and keys.

    Source: that keys have low rank is from Loki (arXiv 2406.02542), which projects keys alone, for
    decoding; here queries weigh the directions, and rows are scored one by one.
    """

    name = "low_rank"
    number = 10
    usual = 7000
    rule = BlockRule(number, every=32, operands=sketches, rank=COSTS_AS)
