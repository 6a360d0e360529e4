"""The density of block lists at another length, from what they hold row by row in a sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["density_at"]

#: Row blocks without which no line is fitted.
_LEAST = 8
#: Row blocks that see less than this share of the sample's keys are left out of the fit.
_EARLY = 1 / 4


def density_at(
    counts: Tensor,
    num_keys: int,
    size: tuple[int, int],
    tokens: int,
    bound: Tensor,
    shorter: Tensor | None = None,
) -> Tensor:
    """Share of the causal pairs that block lists cover in a prompt of ``tokens`` tokens.

    A row block that ends at position e, counted from 1, lists

        c(e) = min(s(e) * (tokens / num_keys) ** growth, bound, blocks that it sees)

    key blocks, with s(e) from ``counts`` where the sample reaches that far, else level * e ** exponent.
    The line is fitted to the row blocks of the sample's later three quarters: the exponent by least
    squares between log s and log e, the level so that line and lists hold as many blocks in all.
    ``growth`` is how much more the same rows list in a longer prompt, since a choice may depend on all
    of it: of the sums over the rows of ``shorter`` the exponent between its length and the sample's.
    Exponents are at least 0 (what is kept does not grow) and together at most 1 (it is a share). With
    fewer than 8 row blocks to fit, the sample's own share is returned.

    Args:
        counts: [H, row blocks], listed key blocks of a sample, a row block's own among them.
        num_keys: tokens of the sample.
        size: row and key block, in rows and keys.
        bound: [H], the most key blocks that a row block may list at ``tokens``.
        shorter: as ``counts``, of the first whole row blocks of the sample as a prompt of their own;
            None is no growth.
    Returns:
        float64 [H], from 0 to 1, on the device of ``counts``.
    """
    counts = counts.double()
    ends, _ = _row_blocks(num_keys, size[0], counts.device)
    later = ends > num_keys * _EARLY
    if int(later.sum()) < _LEAST:
        return _share(counts, num_keys, size)
    growth = torch.zeros_like(counts[:, 0])
    if shorter is not None:
        more = counts[:, : shorter.shape[1]].sum(-1) / shorter.double().sum(-1)
        growth = (more.log() / math.log(num_keys / (shorter.shape[1] * size[0]))).clamp(0, 1)
    level, exponent = _fit(counts[:, later], ends[later], 1 - growth)
    ends, _ = _row_blocks(tokens, size[0], counts.device)
    line = level[:, None] * ends ** exponent[:, None]
    # The sample's last row block may have fewer rows than it has there.
    known = ends.shape[0] if tokens <= num_keys else num_keys // size[0]
    line = torch.cat([counts[:, :known], line[:, known:]], 1)
    line = line * (tokens / num_keys) ** growth[:, None]
    line = line.minimum(bound.to(line)[:, None]).minimum((ends / size[1]).ceil())
    return _share(line, tokens, size)


def _row_blocks(tokens: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """End of each row block and how many rows it has, float64."""
    ends = torch.arange(rows, tokens + rows, rows, device=device, dtype=torch.float64)
    ends = ends.clamp(max=tokens)
    return ends, ends - torch.arange(0, tokens, rows, device=device)


def _fit(counts: Tensor, ends: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Level and exponent [H], at most ``most`` [H], of the line through counts [H, X] at ends [X]."""
    place, height = ends.log(), counts.clamp(min=1).log()
    place = place - place.mean()
    height = height - height.mean(-1, keepdim=True)
    exponent = ((height * place).sum(-1) / place.square().sum()).clamp(min=0).minimum(most)
    # A line through the logarithms is one of geometric means, below what is listed.
    return counts.sum(-1) / (ends ** exponent[:, None]).sum(-1), exponent


def _share(counts: Tensor, tokens: int, size: tuple[int, int]) -> Tensor:
    """Pairs of lists [H, row blocks] over allowed ones; of own blocks, only what is not hidden."""
    ends, rows = _row_blocks(tokens, size[0], counts.device)
    hidden = (ends / size[1]).ceil() * size[1] - ends + (rows - 1) / 2
    kept = (rows * (counts * size[1] - hidden)).sum(-1)
    return (kept / (rows * (ends - (rows - 1) / 2)).sum()).clamp(0, 1)
