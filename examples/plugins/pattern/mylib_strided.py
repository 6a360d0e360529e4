"""A pattern: every n-th key and a local window, as in Sparse Transformers (Child et al., 2019)."""

import torch

from sparse_compiler.plugins import BandChoice, HeadPattern, Limits, Pattern, SelectRequest, pattern


@pattern
class Strided(Pattern):
    """Keep every ``first``-th visible key and the last ``second`` distances; nothing is estimated."""

    name = "strided"
    number = 1001  # below 1000 is for the built-in ones
    component = "band"

    def default(self) -> HeadPattern:
        return HeadPattern(self.name, 64, 1024)

    def limits(self, head: HeadPattern, block_q: int, block_k: int, causal: bool = True) -> Limits:
        # How many columns depends on the length: no limit.
        return Limits(columns=-1, distances=head.second)

    def from_budget(
        self, budget: float, num_keys: int, block_q: int, causal: bool = True
    ) -> HeadPattern:
        # A row of a causal mask sees half of the keys: spend half of its share on each.
        tokens = max(2, round(budget * num_keys / 2))
        return HeadPattern(self.name, max(1, round(num_keys / tokens)), tokens // 2)

    def choose(self, request: SelectRequest) -> BandChoice:
        batch, _, num_q, _ = request.q.shape
        device, stride = request.q.device, request.first.clamp(min=1)
        key = torch.arange(request.k.shape[2], device=device)
        start = request.rows[:, 3].long()[:, None, None]  # of each batch entry's keys
        columns = (key >= start) & ((key - start) % stride[None, :, None] == 0)
        distance = torch.arange(request.geometry.distance_size(num_q), device=device)
        local = distance < request.second[:, None].clamp(min=1)
        return BandChoice(columns, local.expand(batch, -1, -1))

    def density(self, head: HeadPattern, num_keys: int, block_q: int) -> float:
        return min(1.0, 1 / max(1, head.first) + 2 * (head.second + block_q) / num_keys)
