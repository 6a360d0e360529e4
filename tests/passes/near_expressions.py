"""Near misses of one expression; see ``near_misses``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from near_misses import MIN, Function, scores, see

__all__ = ["EXPRESSIONS"]

EXPRESSIONS: dict[str, Function] = {
    "over rows": lambda q, k, v: scores(q, k).softmax(-2) @ v,
    "over heads": lambda q, k, v: scores(q, k).softmax(1) @ v,
    "over the batch": lambda q, k, v: scores(q, k).softmax(0) @ v,
    "transposed weights": lambda q, k, v: scores(q, k).softmax(-1).mT @ v,
    "over rows of the transpose": lambda q, k, v: scores(q, k).mT.softmax(-1) @ v,
    "scores returned": lambda q, k, v: ((s := scores(q, k)).softmax(-1) @ v, s),
    "scores summed": lambda q, k, v: (s := q @ k.mT).softmax(-1) @ v + s.sum(),
    "weights returned": lambda q, k, v: ((w := scores(q, k).softmax(-1)) @ v, w),
    "weights multiplied": lambda q, k, v: (scores(q, k).softmax(-1) * 0.5) @ v,
    "weights of keys": lambda q, k, v: (scores(q, k).softmax(-1) * k[:, :, None, :, 0]) @ v,
    "gated": lambda q, k, v: (scores(q, k).softmax(-1) * q[..., :1].sigmoid()) @ v,
    "normalised again": lambda q, k, v: F.normalize(scores(q, k).softmax(-1), p=2, dim=-1) @ v,
    "masked after": lambda q, k, v: ((q @ k.mT).softmax(-1) * see(q, k)) @ v,
    "tril after": lambda q, k, v: (q @ k.mT).softmax(-1).tril() @ v,
    "masked before and after": lambda q, k, v: (scores(q, k).softmax(-1) * see(q, k)) @ v,
    "masked wider after": lambda q, k, v: scores(q, k).softmax(-1).tril(2) @ v,
    "masked narrower after": lambda q, k, v: scores(q, k).softmax(-1).tril(-1) @ v,
    "relu": lambda q, k, v: scores(q, k).relu() @ v,
    "sigmoid": lambda q, k, v: scores(q, k).sigmoid() @ v,
    "log softmax": lambda q, k, v: scores(q, k).clamp(-50).log_softmax(-1) @ v,
    "softmin": lambda q, k, v: F.softmin(scores(q, k).clamp(-50), -1) @ v,
    "negated": lambda q, k, v: (-(q @ k.mT)).softmax(-1) @ v,
    "gumbel": lambda q, k, v: (scores(q, k) / 0.5).softmax(-1).round() @ v,
    "squared scores": lambda q, k, v: (q @ k.mT).square().softmax(-1) @ v,
    "absolute scores": lambda q, k, v: (q @ k.mT).abs().softmax(-1) @ v,
    "clamped scores": lambda q, k, v: (q @ k.mT).clamp(-1, 1).softmax(-1) @ v,
    "temperature of keys": lambda q, k, v: (q @ k.mT * torch.linspace(0, 1, 24)).softmax(-1) @ v,
    "temperature of rows": lambda q, k, v: (
        (q @ k.mT * torch.linspace(0, 1, 24)[:, None]).softmax(-1) @ v
    ),
    "temperature of pairs": lambda q, k, v: ((q @ k.mT) * see(q, k)).softmax(-1) @ v,
    "zero temperature": lambda q, k, v: (q @ k.mT * 0.0).softmax(-1) @ v,
    "mask of -1e4": lambda q, k, v: (q @ k.mT + (~see(q, k)) * -1e4).softmax(-1) @ v,
    "mask of -5": lambda q, k, v: (q @ k.mT).masked_fill(~see(q, k), -5.0).softmax(-1) @ v,
    "mask of +5": lambda q, k, v: (q @ k.mT + see(q, k) * 5.0).softmax(-1) @ v,
    "mask of +max": lambda q, k, v: (q @ k.mT).masked_fill(see(q, k), -MIN).softmax(-1) @ v,
    "mask scaled after": lambda q, k, v: (scores(q, k) * 1e-38).softmax(-1) @ v,
    "other mask of keys": lambda q, k, v: (q @ k.mT + torch.linspace(0, -9, 24)).softmax(-1) @ v,
    # The first row sees nothing: see test_rows_that_see_nothing_are_zero.
    "strictly earlier": lambda q, k, v: (
        ((q @ k.mT).masked_fill(see(q, k).mT, MIN).softmax(-1) @ v)[:, :, 1:]
    ),
    "aliased keys and values": lambda q, k, v: scores(k, k).softmax(-1) @ k,
    "values are queries": lambda q, k, v: scores(q, k).softmax(-1) @ q,
    "values transposed": lambda q, k, v: scores(q, k).softmax(-1) @ v[:, :, :8].mT.repeat(1, 1, 3, 1),
    "reversed keys": lambda q, k, v: scores(q, k.flip(-2)).softmax(-1) @ v,
    "shifted weights": lambda q, k, v: scores(q, k).softmax(-1).roll(1, -1) @ v,
    "heads turned": lambda q, k, v: scores(q, k).flip(1).softmax(-1) @ v,
    "added weights": lambda q, k, v: (scores(q, k).softmax(-1) + torch.eye(24)) @ v,
    "added outputs": lambda q, k, v: torch.baddbmm(
        *(v.flatten(0, 1), scores(q, k).softmax(-1).flatten(0, 1), v.flatten(0, 1)), beta=2, alpha=3
    ),
    "half softmax": lambda q, k, v: (q @ k.mT).softmax(-1, dtype=torch.float64).float() @ v,
}  # fmt: skip
