"""The cost model: counts derived from expressions, formulas against their meaning."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from sparse_compiler.codegen import library
from sparse_compiler.codegen.constants import DENSE, Constants, TileConstants, shipped
from sparse_compiler.codegen.cost import TERMS, Amounts, linear_parts, predict
from sparse_compiler.codegen.rules import Rule, derive_rules, tile_work
from sparse_compiler.errors import ExpressionInvalid

TILE = TileConstants(matrix=1.5, exponent=0.3, gather=0.03, test=0.2, program=0.02)
DEVICE = Constants(
    device="none",
    origin="test",
    tiles={DENSE: TILE},
    l2=0.0,
    hbm=0.0,
    miss=0.05,
    l2_size=1e6,
    launch=0.004,
    select=0.4,
    select_key=0.2,
    select_pair=2.0,
    score=4.0,
    score_row=3.0,
    score_start=0.5,
)
WORK = Amounts(
    tiles=2e6,
    asked=1.5e6,
    flops=2e6,
    exponents=4096,
    streamed=32768,
    gathered=1e6,
    tested=5e5,
    programs=4e4,
    working_set=4e6,
    index_keys=1e6,
    index_pairs=1e6,
    has_index=1,
    scored=2e12,
    scored_rows=1e6,
    has_scores=1,
)


def rule(name: str, extents: dict[str, int], axis: str, **options: str) -> Rule:
    rules = derive_rules(getattr(library, name)(), extents, **options)
    return next(found for found in rules if found.axis.axis == axis)


def test_attention_tile_is_counted_from_its_expression() -> None:
    found = rule("attention", {"m": 64, "n": 32, "d": 128, "e": 16}, "n")
    work = tile_work(found, "n")
    assert work.flops == 2 * 64 * 32 * (128 + 16)
    assert work.exponents == 64 * 32
    assert (work.streamed, work.resident, work.stored) == (32 * 144, 64 * 128, 64 * 16)
    assert found.gathered == ("K", "V")
    assert dict(found.micro_tile)["K"] == (1, 1, 1, 128)


def test_other_expressions_are_counted_by_the_same_code() -> None:
    product = rule("matmul", {"m": 128, "k": 64, "o": 32}, "m", sparse="A")
    assert (product.gathered, product.scattered) == (("A",), ("C",))
    assert dict(product.micro_tile) == {"A": (1, 64), "C": (1, 32)}
    assert tile_work(product, "k").flops == 2 * 128 * 64 * 32
    expert = rule("grouped_matmul", {"t": 128, "k": 64, "o": 32}, "t", sparse="gate")
    assert (expert.gathered, expert.scattered) == (("gate", "X"), ("Y",))
    ffn = rule("sparse_ffn", {"t": 128, "k": 64, "f": 64, "o": 32}, "f")
    assert ffn.gathered == ("U", "W")
    assert tile_work(ffn, "f").flops == 2 * 128 * 64 * (64 + 32)
    assert tile_work(ffn, "f").exponents == 0
    assert "gather U, W" in ffn.describe()


def test_no_rule_along_an_axis_that_may_not_move() -> None:
    assert {r.axis.axis for r in derive_rules(library.convolution(), {})} == {"c"}
    assert "h" not in {r.axis.axis for r in derive_rules(library.attention(), {})}


def test_unknown_axes_and_operands_are_refused() -> None:
    with pytest.raises(ExpressionInvalid, match="one of m, k, o, but got 'z'"):
        derive_rules(library.matmul(), {"z": 3})
    with pytest.raises(ExpressionInvalid, match="one of A, B, but got 'Z'"):
        derive_rules(library.matmul(), {}, sparse="Z")


def test_terms_are_what_they_say() -> None:
    terms = predict(DEVICE, TILE, WORK)
    assert terms["matrix"] == pytest.approx(1.5e6 * 2e6 / 1e12 * 1.5)
    assert terms["exponent"] == pytest.approx(1.5e6 * 4096 / 1e9 * 0.3)
    per_tile = 2e6 / 1e12 * 1.5 + 4096 / 1e9 * 0.3
    assert terms["quantisation"] == pytest.approx(5e5 * per_tile)
    assert terms["gather"] == pytest.approx(0.03 + 0.5 * 0.2)
    assert terms["hbm"] == pytest.approx(0.05 * 2e6 * 32768 / 1e9 * 0.75)
    assert terms["programs"] == pytest.approx(0.8)
    assert terms["index"] == pytest.approx(0.4 + 0.2 + 0.002)
    assert terms["score"] == pytest.approx(0.5 + 3.0 + 2 * 4.0)
    assert terms["launch"] == pytest.approx(0.004)
    assert terms["l2"] == terms["combine"] == 0
    assert set(terms) == set(TERMS)


def test_bandwidth_is_a_floor_under_the_computation() -> None:
    compute = sum(predict(DEVICE, TILE, WORK)[t] for t in ("matrix", "exponent", "quantisation"))
    compute += predict(DEVICE, TILE, WORK)["gather"]
    traffic = WORK.tiles * WORK.streamed / 1e9
    slow = replace(DEVICE, l2=2 * compute / traffic)
    assert predict(slow, TILE, WORK)["l2"] == pytest.approx(compute)
    assert predict(replace(DEVICE, l2=0.5 * compute / traffic), TILE, WORK)["l2"] == 0
    memory = replace(WORK, distinct=1e9, working_set=0)
    assert predict(replace(DEVICE, hbm=compute + 3), TILE, memory)["hbm"] == pytest.approx(3)
    assert predict(replace(DEVICE, hbm=0.5), TILE, replace(WORK, parts=1e9))["combine"] == 1


def test_what_fits_the_cache_is_not_lost() -> None:
    assert predict(DEVICE, TILE, replace(WORK, working_set=1e6))["hbm"] == 0


@given(st.data())
def test_the_parts_of_the_fit_add_up_to_the_prediction(data: st.DataObject) -> None:
    numbers = st.floats(0, 1e6)
    amounts = Amounts(**{f.name: data.draw(numbers) for f in fields(Amounts)})
    amounts = replace(amounts, asked=min(amounts.asked, amounts.tiles), has_index=0, parts=0)
    amounts = replace(amounts, index_keys=0, index_pairs=0, scored=0, scored_rows=0, has_scores=0)
    tile = TileConstants(**{f.name: data.draw(st.floats(0, 10)) for f in fields(TileConstants)})
    parts = linear_parts(amounts, DEVICE.l2_size)
    total = sum(parts[f.name] * getattr(tile, f.name) for f in fields(TileConstants))
    total += parts["miss"] * DEVICE.miss + amounts.launches * DEVICE.launch
    assert sum(predict(DEVICE, tile, amounts).values()) == pytest.approx(total, rel=1e-6, abs=1e-9)


def test_formulas_use_every_constant_and_amount() -> None:
    used = {str(s) for term in TERMS.values() for s in sympy.sympify(term).free_symbols}
    constants = {f"c_{f.name}" for f in fields(TileConstants)}
    constants |= {
        f"c_{f.name}"
        for f in fields(Constants)
        if f.name not in ("device", "origin", "tiles", "score_host")
    }
    assert used == constants | {f"n_{f.name}" for f in fields(Amounts)}


@pytest.mark.parametrize(
    "name", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB", "AMD Instinct MI300X", "x"]
)
def test_every_device_has_shipped_constants_with_a_dense_tile(name: str) -> None:
    entry = shipped(name)
    assert entry.constants.tiles[DENSE].matrix > 0
    assert entry.measured or "estimat" in entry.constants.origin
    assert min(entry.constants.score, entry.constants.score_row, entry.constants.score_start) > 0
