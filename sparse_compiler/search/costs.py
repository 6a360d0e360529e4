"""What a pattern costs against dense attention: by the cost model's constants, or by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparse_compiler.codegen.attention_work import (
    Clustering,
    Covered,
    amounts_dense,
    amounts_sparse,
    cover,
    scoring,
)
from sparse_compiler.codegen.constants import (
    DENSE,
    Constants,
    TileConstants,
    shipped,
    tile_key,
)
from sparse_compiler.codegen.cost import predict
from sparse_compiler.errors import OptionInvalid
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.ir.shape import SiteShape
from sparse_compiler.patterns import registry
from sparse_compiler.runtime.observe import AttentionCall
from sparse_compiler.runtime.tune import load_constants

__all__ = ["CostModel", "cost_model", "measure", "shape_of"]

#: Block sizes for which every device has constants.
_BLOCKS = (64, 64)
_ROUNDS = 3


def shape_of(call: AttentionCall) -> SiteShape:
    """The sizes of a call, for the cost model; of a mask it knows only whether it is causal."""
    num_q, num_k = call.q.shape[2], call.k.shape[2]
    return SiteShape(
        batch=call.q.shape[0],
        heads=call.q.shape[1],
        kv_heads=call.k.shape[1],
        num_q=min(num_q, num_k),
        num_k=num_k,
        head_dim=call.q.shape[3],
        value_dim=call.v.shape[3],
        dtype=str(call.q.dtype).removeprefix("torch."),
        causal=call.banded,
    )


@dataclass(frozen=True)
class CostModel:
    """Predicted time over that of dense attention.

    Args:
        constants: of the device; None counts the pairs worked at, for executors nobody measured.
        blocks: row and key block that the prediction is for; None is what the call has.
        note: what a reader must know about the constants.
    """

    constants: Constants | None
    blocks: tuple[int, int] | None
    note: str

    def blocking(self, call: AttentionCall) -> tuple[int, int]:
        """Row and key block with which a call's candidates are tried."""
        return self.blocks or (call.geometry.block_q, call.geometry.block_k)

    def share(
        self, shape: SiteShape, head: HeadPattern, density: float, size: tuple[int, int]
    ) -> float:
        """Time of a layer whose heads all are like this one, over that of dense.

        Args:
            density: measured share of the allowed pairs.
            size: row and key block.
        """
        key = tile_key("plain", *size)
        constants = self.constants or _pairs_only(key)
        if key not in constants.tiles:
            raise OptionInvalid(
                "the blocks of a search by the cost model",
                f"among those with constants for {constants.device}",
                f"{size[0]} x {size[1]}",
                fix="Run `minference tune`, or search with cost='measured'.",
            )
        pairs = density * shape.allowed_pairs
        pattern = registry.get(head.name)
        if shape.causal and pattern.component == "band":
            expected = cover(head, shape, *size, Clustering())
            covered = expected.scaled(pairs / max(expected.counted, 1.0))
        else:
            # Of blocks nothing is wasted but what the mask hides in them.
            covered = Covered(wanted=pairs, blocks=pairs)
        ranked, scored = 0.0, scoring(head, shape, size[1])
        if not scored.heads and registry.summary_group((pattern,), size[1]):
            ranked = shape.batch * shape.heads * (shape.num_q / size[0]) * (shape.num_k / size[1])
        amounts = amounts_sparse(shape, covered, *size, ranked=ranked, scored=scored)
        spent = sum(predict(constants, constants.tiles[key], amounts).values())
        dense = predict(constants, constants.tiles[DENSE], amounts_dense(shape))
        return spent / sum(dense.values())


def _pairs_only(key: str) -> Constants:
    tile = TileConstants(matrix=1.0)
    some = shipped("").constants
    return Constants(
        device="any",
        origin="pairs worked at",
        tiles={DENSE: tile, key: tile},
        l2=0.0,
        hbm=0.0,
        miss=0.0,
        l2_size=0.0,
        launch=0.0,
        select=0.0,
        select_key=0.0,
        select_pair=0.0,
        # Nobody measured scoring there either: as much slower than products as on GPUs.
        score=some.score / some.tiles[DENSE].matrix,
        score_row=0.0,
        score_start=0.0,
    )


def cost_model(executor: str, device: str | None) -> CostModel:
    """The model for an executor, or for a device by name wherever the search runs.

    Args:
        executor: its own name, not ``auto``.
        device: as ``torch.cuda.get_device_name`` gives it, e.g. ``NVIDIA H200``; None is this one.
    """
    if device is None and executor == "triton" and torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    if device is None:
        note = f"executor {executor} has no constants: cost is the share of pairs worked at"
        return CostModel(None, None, note)
    loaded = load_constants(device)
    note = loaded.note or f"constants of {device}, tuned here"
    return CostModel(loaded.constants, _BLOCKS, note)


def measure(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, the median of three after one that is not counted."""
    times = []
    for _ in range(_ROUNDS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
