"""Which blocking and break-even a site gets, and that the graph's operators receive them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sparse_compiler
from sparse_compiler.errors import ShapeMismatch
from sparse_compiler.ir.pattern import HeadPattern, LayerPatterns
from sparse_compiler.ir.shape import NEVER, SiteShape, Tile
from sparse_compiler.runtime import dispatch, triton_executor
from sparse_compiler.runtime.cpu_executor import CpuExecutor
from sparse_compiler.runtime.triton_executor import TritonExecutor
from sparse_compiler.runtime.tune import load_constants

SHAPE = SiteShape(1, 32, 8, 65536, 65536, 128, 128)
SLASH = LayerPatterns((HeadPattern("vertical_slash", 1000, 1000),) * 32, "test")
SCORED_FEW = LayerPatterns((TritonExecutor.auto,) * 6, "test")
BLOCKS = LayerPatterns((HeadPattern("block_sparse", 100),) * 32, "test")
SCORED = LayerPatterns((TritonExecutor.auto,) * 32, "test")
MIXED = LayerPatterns((*SLASH.heads[:16], *BLOCKS.heads[:16]), "test")
USUAL = Tile(64, 64, TritonExecutor.min_tokens)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine whose GPU is named by the test; no user's tuning is read."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_executor, "load_constants", _shipped_only)
    triton_executor._constants.cache_clear()
    triton_executor._tile.cache_clear()
    yield monkeypatch
    triton_executor._constants.cache_clear()
    triton_executor._tile.cache_clear()


def _shipped_only(device: str) -> object:
    return load_constants(device, Path("/nonexistent"))


def _tile(monkeypatch: pytest.MonkeyPatch, device: str, patterns: LayerPatterns) -> Tile:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    return TritonExecutor().tile(SHAPE, patterns)


def test_a_measured_device_gets_the_models_break_even(on_device: pytest.MonkeyPatch) -> None:
    tile = _tile(on_device, "NVIDIA H200", SLASH)
    assert (tile.block_q, tile.block_k) == (64, 64)
    assert 4096 <= tile.min_tokens < USUAL.min_tokens
    published = LayerPatterns((HeadPattern("vertical_slash", 1000, 6096),) * 32, "test")
    assert _tile(on_device, "NVIDIA H200", published).min_tokens > tile.min_tokens


def test_blocks_alone_get_rows_of_the_hopper_kernel(on_device: pytest.MonkeyPatch) -> None:
    tile = _tile(on_device, "NVIDIA H200", BLOCKS)
    assert (tile.block_q, tile.block_k) == (128, 64), "key blocks are counted, so they stay"
    mixed = _tile(on_device, "NVIDIA H200", MIXED)
    assert (mixed.block_q, mixed.block_k) == (64, 64), "one launch serves bands and blocks"


@pytest.mark.parametrize("device", ["NVIDIA A100-SXM4-80GB", "a GPU that nobody has seen"])
def test_estimates_change_nothing(on_device: pytest.MonkeyPatch, device: str) -> None:
    assert _tile(on_device, device, SLASH) == USUAL
    assert _tile(on_device, device, BLOCKS) == USUAL


def test_scored_rows_get_the_break_even_of_device_and_shape(
    on_device: pytest.MonkeyPatch,
) -> None:
    tile = _tile(on_device, "NVIDIA H200", SCORED)
    assert (tile.block_q, tile.block_k) == (64, 64), "the best of more rows would keep more"
    assert 4096 < tile.min_tokens < 32768
    few = replace(SHAPE, heads=6, kv_heads=2, head_dim=64, value_dim=64)
    assert tile.min_tokens < TritonExecutor().tile(few, SCORED_FEW).min_tokens < 65536


def test_scored_rows_that_nobody_measured_pay_later(on_device: pytest.MonkeyPatch) -> None:
    cautious = Tile(64, 64, 32768)
    assert _tile(on_device, "NVIDIA A100-SXM4-80GB", SCORED) == cautious
    on_device.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    executor = TritonExecutor()
    assert executor.tile(replace(SHAPE, causal=False), SCORED) == cautious, "may not be a kernel's"
    assert executor.tile(SHAPE, replace(SCORED, budget=0.1)) == cautious


def test_scored_rows_beside_a_band_are_paid_for(on_device: pytest.MonkeyPatch) -> None:
    beside = LayerPatterns((*SLASH.heads[:16], *SCORED.heads[:16]), "test")
    slash, mixed = (_tile(on_device, "NVIDIA H200", p).min_tokens for p in (SLASH, beside))
    assert slash < mixed < 32768


def test_nothing_known_of_the_sizes_changes_nothing(on_device: pytest.MonkeyPatch) -> None:
    on_device.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert TritonExecutor().tile(None, SLASH) == USUAL


def test_other_executors_keep_their_blocking() -> None:
    cpu = CpuExecutor()
    assert cpu.tile(SHAPE, SLASH) == Tile(cpu.block_q, cpu.block_k, cpu.min_tokens)


class _Attention(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_the_graph_gets_the_tile_of_its_site(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[SiteShape | None] = []

    def tile(self: CpuExecutor, shape: SiteShape | None, patterns: LayerPatterns) -> Tile:
        asked.append(shape)
        return Tile(128, 32, 300)

    monkeypatch.setattr(CpuExecutor, "tile", tile)
    blockings: list[tuple[int, int]] = []
    select = dispatch.select.select_index

    def spy(request: object, *arguments: object) -> object:
        blockings.append((request.geometry.block_q, request.geometry.block_k))  # type: ignore[attr-defined]
        return select(request, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(dispatch.select, "select_index", spy)
    torch._dynamo.reset()
    model = torch.compile(
        _Attention(), backend="minference", options={"inner": "eager", "pattern": "vertical_slash"}
    )
    q = torch.randn(1, 2, 640, 16)
    with torch.inference_mode():
        model(q, q, q)
        assert blockings == [(128, 32)]
        assert asked == [SiteShape(1, 2, 2, 640, 640, 16, 16, dtype="float32")]
        short = q[:, :, :256]
        model(short, short, short)
    assert blockings == [(128, 32)], "256 keys are below the tile's break-even"


def test_wrong_sizes_of_a_shape_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match="multiple"):
        replace(SHAPE, kv_heads=5)


def test_a_budget_or_an_odd_head_size_keeps_the_usual_tile(on_device: pytest.MonkeyPatch) -> None:
    on_device.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert TritonExecutor().tile(SHAPE, replace(SLASH, budget=1.0)) == USUAL
    odd = replace(SHAPE, head_dim=100, value_dim=100)
    tile = TritonExecutor().tile(odd, BLOCKS)
    assert tile.block_q == 64, "rows of 200 bytes are no TMA tiles, so no Hopper kernel either"


def test_without_a_causal_order_sparse_pays_earlier(on_device: pytest.MonkeyPatch) -> None:
    on_device.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    both = [
        TritonExecutor().tile(replace(SHAPE, causal=c), BLOCKS).min_tokens for c in (True, False)
    ]
    assert both[0] > both[1]


def test_a_mask_without_causal_order_reaches_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[SiteShape | None] = []

    def tile(self: CpuExecutor, shape: SiteShape | None, patterns: LayerPatterns) -> Tile:
        asked.append(shape)
        return Tile(128, 32, NEVER)

    class Encoder(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    monkeypatch.setattr(CpuExecutor, "tile", tile)
    torch._dynamo.reset()
    with torch.inference_mode():
        report = sparse_compiler.explain(Encoder(), (torch.randn(1, 2, 640, 16),))
    (site,) = report.sites
    assert asked[0] is not None
    assert not asked[0].causal
    assert site.code == "SHORT"
    assert "every length" in site.reason
