"""``stats``: what sparse attention really computed in the newest call of each site."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sparse_compiler import models
from sparse_compiler.runtime import recorder

__all__ = ["LayerStats", "stats"]


@dataclass(frozen=True)
class LayerStats:
    """One site's newest call.

    Args:
        layer: module path, or the node's name.
        num_q, num_k: sizes of the call, tokens.
        density: for each query head, computed over allowed pairs.
        index_ms: time of selection for all heads together.
    """

    layer: str
    num_q: int
    num_k: int
    density: list[float]
    index_ms: float

    @property
    def mean_density(self) -> float:
        return sum(self.density) / len(self.density)


def stats(model: nn.Module) -> list[LayerStats]:
    """Density and index time per layer and head; waits for the device.

    Args:
        model: the module that was compiled, or the compiled wrapper of it.
    Returns:
        One entry for each site that has run sparse, in graph order; the newest graph of a layer
        comes last. Empty before the first sparse call.
    """
    found = []
    for graph in models.graphs_of(model):
        for site in graph.report.sites:
            record = recorder.read(site.number) if site.number >= 0 else None
            if record is not None:
                found.append(
                    LayerStats(
                        layer=site.layer or site.name,
                        num_q=record.num_q,
                        num_k=record.num_k,
                        density=record.density.tolist(),
                        index_ms=record.index_ms,
                    )
                )
    return found
