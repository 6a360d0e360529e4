"""The parts of the attention benchmark that need no GPU: inputs, counting, errors, arguments."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import attention
import million
from inputs import block_mask_index, retriever_inputs, structured_inputs
from pairs import attend_rows, count_work, error_on_rows, keys_of_rows, relative_error
from peers import cover_index
from rich.console import Console
from rounds import Timing
from sparse import Sparse

from sparse_compiler.errors import OptionInvalid, ShapeMismatch
from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.runtime.reference import allowed_pairs, attend_reference, covered_pairs
from sparse_compiler.testing import random_index


def causal_pairs(index: AttentionIndex, geometry: Geometry, size: int) -> torch.Tensor:
    """bool [Hq, N, N], by enumeration."""
    covered = covered_pairs(index, geometry, size, size)[0] > 0
    return covered & allowed_pairs(1, size, size, geometry)


@given(
    seed=st.integers(0, 999),
    size=st.integers(1, 150),
    block_q=st.sampled_from([16, 32]),
    block_k=st.sampled_from([16, 32]),
)
def test_counted_and_listed_pairs_are_those_of_the_oracle(
    seed: int, size: int, block_q: int, block_k: int
) -> None:
    geometry = Geometry(0, -1, 0, block_q, block_k)
    kinds = ("band", "blocks", "none", "band")
    index = random_index(seed, geometry, batch=1, num_q=size, num_k=size, kinds=kinds)
    want = causal_pairs(index, geometry, size)
    work = count_work(index, geometry, size)
    assert work.covered == int(want.sum())
    assert work.allowed == len(kinds) * size * (size + 1) / 2
    rows = torch.arange(size)
    for head in range(len(kinds)):
        assert torch.equal(keys_of_rows(index, geometry, head, rows, size), want[head])


def test_counting_refuses_another_mask() -> None:
    geometry = Geometry(0, 5, 0, 16, 16)
    index = random_index(0, geometry, batch=1, num_q=32, num_k=32)
    with pytest.raises(ShapeMismatch, match="causal from the first key"):
        count_work(index, geometry, 32)


def test_heads_that_share_a_slot_count_each() -> None:
    geometry = Geometry(0, -1, 0, 16, 16)
    index = random_index(3, geometry, batch=1, num_q=64, num_k=64, kinds=("band", "blocks"))
    parts = dict(zip(index.__dataclass_fields__, index.tensors(), strict=True))
    twice = AttentionIndex(**parts | {"slots": index.slots.repeat(2, 1)})
    assert count_work(twice, geometry, 64).covered == 2 * count_work(index, geometry, 64).covered


def test_errors_on_rows_are_those_of_whole_tensors() -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 4, 90, 16), torch.randn(1, 2, 90, 16), torch.randn(1, 2, 90, 16)
    geometry = Geometry(0, -1, 0, 16, 16)
    kinds = ("band", "blocks", "none", "band")
    index = random_index(2, geometry, batch=1, num_q=90, num_k=90, kinds=kinds)
    rows = torch.tensor([0, 3, 15, 16, 60, 89])
    want, want_lse = attend_reference(q, k, v, index, geometry, scale=0.25)
    out, lse = attend_rows(q, k, v, rows, index, geometry)
    torch.testing.assert_close(out, want[0][:, rows])
    torch.testing.assert_close(lse, want_lse[0][:, rows])
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    assert error_on_rows(dense, q, k, v, rows) < 1e-6
    assert error_on_rows(1.5 * dense, q, k, v, rows) == pytest.approx(0.5, rel=1e-5)
    dense[0, 1, 60, 3] = float("nan")
    assert relative_error(dense, attend_rows(q, k, v, rows)[0], rows) == float("inf")


@pytest.mark.parametrize("blocks", [(64, 64), (128, 128), (64, 128)])
def test_a_block_mask_has_the_density_that_was_asked_for(blocks: tuple[int, int]) -> None:
    size, heads = 8192, 3
    index = block_mask_index(size, heads, blocks, 0.1, device="cpu")
    geometry = Geometry(0, -1, 0, *blocks)
    assert count_work(index, geometry, size).density == pytest.approx(0.1, abs=0.01)
    counts = index.num_blocks[0]
    listed = torch.arange(index.blocks.shape[-1]) < counts[..., None]
    # Ascending and distinct, as the index promises.
    rising = index.blocks[0].diff(dim=-1) > 0
    assert bool((rising | ~listed[..., 1:]).all())
    rows = torch.tensor([0, 200, 5000, size - 1])
    for head in range(heads):
        seen = keys_of_rows(index, geometry, head, rows, size)
        assert bool(seen[:, 0].all())
        assert bool(seen[torch.arange(4), rows].all())
    lists = [index.blocks[0, head][listed[head]] for head in range(heads)]
    assert not torch.equal(lists[0], lists[1])


def test_a_full_block_mask_is_dense_and_a_tiny_one_keeps_the_diagonal() -> None:
    geometry = Geometry(0, -1, 0, 64, 64)
    full = block_mask_index(1000, 2, (64, 64), 1.0, device="cpu")
    assert count_work(full, geometry, 1000).density == 1.0
    least = block_mask_index(1000, 2, (64, 64), 1e-6, device="cpu")
    assert int(least.num_blocks.max()) == 2
    with pytest.raises(OptionInvalid, match="0 < density <= 1"):
        block_mask_index(1000, 2, (64, 64), 0.0, device="cpu")


@given(seed=st.integers(0, 999), size_q=st.sampled_from([32, 64, 128, 256]))
def test_the_flex_mask_covers_the_index_and_counts_itself(seed: int, size_q: int) -> None:
    size, geometry = 512, Geometry(0, -1, 0, size_q, 64)
    kinds = ("band", "blocks")
    index = random_index(seed, geometry, batch=1, num_q=size, num_k=size, kinds=kinds, share=0.05)
    lists = cover_index(index, geometry, size)
    assert lists.blocks == (128, 128)
    mask = _dense(lists, size)
    want = causal_pairs(index, geometry, size)
    assert not bool((want & ~mask).any())
    # No block without a pair of a row block that shares its rows.
    touched = torch.nn.functional.max_pool2d(want.float(), 128)
    spread = max(1, size_q // 128)
    touched = touched.view(2, -1, spread, size // 128).amax(2).repeat_interleave(spread, 1)
    kept = torch.nn.functional.max_pool2d(mask.float(), 128)
    lower = torch.ones(size // 128, size // 128).tril()
    assert torch.equal(kept, touched * lower) or size_q < 128
    assert lists.density == pytest.approx(float(mask.sum()) / (size * (size + 1)))


def _dense(lists: Any, size: int) -> torch.Tensor:
    """bool [Hq, N, N] that FlexAttention makes of the lists."""
    heads, (size_q, size_k) = lists.partial.shape[1], lists.blocks
    mask = torch.zeros(heads, size, size, dtype=torch.bool)
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    for name, test in (("partial", True), ("full", False)):
        values, counts = getattr(lists, name)[0], getattr(lists, f"num_{name}")[0]
        for head in range(heads):
            for row in range(size // size_q):
                for column in values[head, row, : counts[head, row]].tolist():
                    block = (
                        slice(row * size_q, (row + 1) * size_q),
                        slice(column * size_k, (column + 1) * size_k),
                    )
                    assert not mask[head][block].any(), "a block listed twice"
                    mask[head][block] = causal[block] if test else True
    assert not bool((mask & ~causal).any())
    return mask


def test_the_flex_mask_of_block_heads_is_the_very_same() -> None:
    index = block_mask_index(1024, 2, (64, 64), 0.3, device="cpu")
    geometry = Geometry(0, -1, 0, 64, 64)
    lists = cover_index(index, geometry, 1024)
    assert lists.blocks == (64, 64)
    assert torch.equal(_dense(lists, 1024), causal_pairs(index, geometry, 1024))
    assert lists.density == pytest.approx(count_work(index, geometry, 1024).density)
    with pytest.raises(ShapeMismatch, match="multiple of the blocks"):
        cover_index(index, geometry, 1000)


def test_structured_inputs_have_sinks_columns_slashes_and_local_mass() -> None:
    size = 4096
    q, k, v = structured_inputs(size, device="cpu", heads=4, kv_heads=1)
    assert q.shape == (1, 4, size, 128) and k.shape == v.shape == (1, 1, size, 128)
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    again = structured_inputs(size, device="cpu", heads=4, kv_heads=1)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), again, strict=True))
    local = sinks = 0.0
    for head in range(4):
        scores = q[0, head, -64:].float() @ k[0, 0].float().T * 128**-0.5
        rows = torch.arange(size - 64, size)
        hidden = torch.arange(size) > rows[:, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        distance = rows[:, None] - torch.arange(size)
        local += float(weights[(distance >= 0) & (distance < 200)].sum()) / 256
        sinks += float(weights[:, :4].sum()) / 256
        # The best 400 columns and 400 distances of several thousand hold most of the rest.
        columns = weights.sum(0).topk(400).values.sum() / 64
        assert float(columns) > 0.4
    assert 0.2 < local < 0.95
    # Four of four thousand keys.
    assert 0.01 < sinks < 0.8


def test_density_of_vertical_slash_is_what_the_docstring_says() -> None:
    size = 32768
    pattern = HeadPattern("vertical_slash", 512, 2048)
    q, k, v = structured_inputs(size, device="cpu", heads=4, kv_heads=1)
    sparse = Sparse(q, k, v, pattern, (64, 64), executor="reference")
    work = count_work(AttentionIndex(*sparse.select()), sparse.geometry, size)
    assert work.density == pytest.approx(0.30, abs=0.06)


def test_structured_inputs_refuse_impossible_shapes() -> None:
    with pytest.raises(OptionInvalid, match="multiple of kv_heads"):
        structured_inputs(64, device="cpu", heads=3, kv_heads=2)


def test_retriever_inputs_are_what_its_layers_attend_with() -> None:
    layers = retriever_inputs(1024, device="cpu")
    assert len(layers) == 4
    for q, k, v in layers:
        assert q.shape == (1, 6, 1024, 64) and k.shape == v.shape == (1, 2, 1024, 64)
        assert bool(q.isfinite().all()) and q.dtype == torch.bfloat16
    assert not torch.equal(layers[0][0], layers[1][0])


@pytest.mark.parametrize("name", ["vertical_slash", "block_sparse", "a_shape"])
def test_the_operators_are_called_as_a_graph_calls_them(name: str) -> None:
    q, k, v = (t.float() for t in structured_inputs(300, device="cpu", heads=2, kv_heads=1))
    pattern = HeadPattern(name, 2 if name == "block_sparse" else 40, 60)
    sparse = Sparse(q, k, v, pattern, (64, 64), executor="reference")
    index = AttentionIndex(*sparse.select())
    out, _ = sparse.attend(index)
    assert torch.equal(out, sparse.run())
    rows = torch.arange(300)
    own, _ = attend_rows(q, k, v, rows, index, sparse.geometry)
    assert relative_error(out, own, rows) < 1e-5
    assert 0 < count_work(index, sparse.geometry, 300).density < 1
    assert error_on_rows(sparse.declined(), q, k, v, rows) < 1e-5


def test_operators_need_a_pattern_or_an_index() -> None:
    q, k, v = structured_inputs(64, device="cpu", heads=1, kv_heads=1)
    with pytest.raises(OptionInvalid, match="one of the two"):
        Sparse(q, k, v, None, (64, 64))


@torch.inference_mode()
def test_the_check_of_a_layer_passes_a_right_one_and_fails_a_wrong_one() -> None:
    inputs = structured_inputs(700, device="cpu", heads=4, kv_heads=2)
    pattern = HeadPattern("vertical_slash", 40, 60)

    class Broken(Sparse):
        def attend(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
            out, lse = super().attend(*arguments)
            out[0, 3, -1] = out[0, 3, -2]
            return out, lse

    class Unwritten(Sparse):
        def attend(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
            out, lse = super().attend(*arguments)
            holes = torch.empty_like(out)
            holes[..., :300, :] = out[..., :300, :]
            return holes, lse

    for kind, words in ((Sparse, ""), (Broken, "above twice"), (Unwritten, "never written")):
        sparse = kind(*inputs, pattern, (64, 64), executor="reference")
        found = "; ".join(million.failures(million.check_layer(sparse)))
        assert (words in found) if words else not found


def test_rows_on_both_sides_of_an_overflow_are_checked() -> None:
    odd = (1 << 20) + 7
    rows = million.rows_to_check(odd, 64, [(32, 128), (8, 128)])
    assert {0, odd - 1} <= set(rows) and rows == sorted(set(rows))
    for power in (30, 31, 32):
        place = 2**power // 128
        if place < 32 * odd:
            assert {(place - 1) % odd, place % odd} <= set(rows)
    assert max(million.rows_to_check(200, 64, [(4, 16)])) == 199


def test_ratios_pair_the_rounds() -> None:
    timing = Timing(ms={"a": [10.0, 40.0, 90.0], "b": [5.0, 10.0]})
    assert timing.ratio("a", "b") == 3.0
    assert timing.median("a") == 40.0


def test_layers_are_averaged_and_failures_shown() -> None:
    first = {"tokens": 8, "ours_ms": 1.0, "flex_failed": "OutOfMemoryError: x", "heads": [6, 2]}
    merged = attention._mean([first, first | {"ours_ms": 3.0}])
    assert merged["ours_ms"] == 2.0 and merged["heads"] == [6, 2]
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(attention.table_of([merged], "title"))
    text = console.export_text()
    assert "failed" in text and "ours ms" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--only", "ours,mystery"], "mystery"),
        (["--only", ""], "none"),
        (["--pattern", "spiral"], "invalid choice"),
        (["--pattern", "block_mask", "--density", "2"], "in (0, 1]"),
        (["--density", ".1"], "does not apply"),
        (["--repeats", "0"], "at least 1"),
        (["--lengths", "64"], "at least 128"),
    ],
)
def test_wrong_arguments_are_named(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        attention.parse(argv)
    assert words in capsys.readouterr().err


def test_arguments_become_patterns() -> None:
    arguments = attention.parse(["--vertical", "30", "--slash", "800", "--only", "ours,cudnn"])
    assert attention.head_pattern(arguments, 4096, 64) == HeadPattern("vertical_slash", 30, 800)
    assert arguments.only == ["ours", "cudnn"]
    arguments = attention.parse(["--pattern", "block_sparse", "--density", ".1"])
    assert attention.head_pattern(arguments, 65536, 64).first == round(0.1 * 65536 / 2 / 64)
