"""An architecture hint: a model of stages of blocks, whose layers have two numbers in their paths.

``stages.1.blocks.0`` is layer 2 of a model with two blocks in its first stage: the path alone does not
say so. The first block of the model reads raw tokens and must stay dense.
"""

import re

import torch.nn.functional as F
from torch import Tensor, nn

from sparse_compiler.plugins import ArchitectureHint, HeadPattern, architecture

DEPTHS = (2, 2)


class Block(nn.Module):
    """Causal self-attention [B, L, E] with a residual."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(out.transpose(1, 2).flatten(2))


class StageModel(nn.Module):
    """Stages of blocks."""

    def __init__(self, size: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleDict({"blocks": nn.ModuleList(Block(size, heads) for _ in range(depth))})
            for depth in DEPTHS
        )

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            for block in stage["blocks"]:
                x = block(x)
        return x


@architecture
class StagesHint(ArchitectureHint):
    """Blocks are numbered through all stages; the first stays dense, the last stage looks near."""

    def applies(self, path: str, classes: tuple[str, ...]) -> bool:
        return any(name.endswith("mylib_stages.Block") for name in classes)

    def layer(self, path: str) -> int | None:
        found = re.search(r"stages\.(\d+)\.blocks\.(\d+)", path)
        if found is None:
            return None
        stage, block = (int(number) for number in found.groups())
        return sum(DEPTHS[:stage]) + block

    def dense(self, path: str) -> bool:
        return self.layer(path) == 0

    def pattern(self, path: str) -> HeadPattern | None:
        return HeadPattern("a_shape", 16, 128) if "stages.1." in path else None
