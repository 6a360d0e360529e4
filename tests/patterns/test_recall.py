"""``target_recall``: which patterns can say it, what they keep, and what the option refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from estimator_cases import Call
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import sparse_compiler
from sparse_compiler.backend import parse_options
from sparse_compiler.config import RECALL_PATTERNS
from sparse_compiler.errors import OptionInvalid, PatternInvalid
from sparse_compiler.ir.index import Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.listed import RECALL_BLOCKS
from sparse_compiler.patterns.policy import uniform
from sparse_compiler.patterns.ranking import PEAK_WHOLE, PEAKS, wanted_for_share

ROWS, BAND = HeadPattern("low_rank", 7000, 0), HeadPattern("vertical_slash", 512, 100)
INF = math.inf


def test_the_names_that_can_are_those_of_the_registry() -> None:
    assert set(RECALL_PATTERNS) == set(registry.recall_names())
    assert registry.get("low_rank").from_recall(0.9) is None
    assert registry.get("switching").from_recall(0.9) is None


@pytest.mark.parametrize("name", RECALL_PATTERNS)
@pytest.mark.parametrize(("recall", "share"), [(0.95, 950), (0.9995, 1000), (0.57, 570), (1e-4, 1)])
def test_a_share_is_rounded_up_to_whole_per_mille(name: str, recall: float, share: int) -> None:
    expected = HeadPattern(name, share, RECALL_BLOCKS)
    assert registry.get(name).from_recall(recall) == expected


# ---- the cut -----------------------------------------------------------------------------------

scores_of = st.lists(
    st.one_of(st.just(-INF), st.just(INF), st.floats(-25, 0, width=32)), min_size=1, max_size=40
)


def _cut(scores: torch.Tensor, share: int, always: torch.Tensor) -> torch.Tensor:
    everything = torch.ones_like(always)
    return wanted_for_share(torch.tensor(share), scores, everything, always)


@given(scores=scores_of, share=st.integers(0, 1000), seed=st.integers(0, 99))
def test_what_goes_is_the_least_and_as_much_as_may(
    scores: list[float], share: int, seed: int
) -> None:
    found = torch.tensor(scores)[None, None]
    draw = torch.Generator().manual_seed(seed)
    always = torch.rand(found.shape, generator=draw) < 0.2
    kept = _cut(found, share, always)
    assert (kept | ~always).all()
    loose = (found > -INF) & ~always
    gone = loose & ~kept
    mass = (found.double().exp() * PEAKS).clamp(max=1.0)
    allowed = (1 - share / 1000) * float(mass.sum().clamp(max=1.0))
    slack = 1e-5 * allowed + len(scores) / PEAK_WHOLE
    lost = float(mass[gone].sum())
    assert lost <= allowed + slack
    if (loose & kept).any():
        least = found[loose & kept].amin()
        assert not gone.any() or least >= found[gone].amax()
        assert share == 1000 or lost + float(mass[loose & kept].min()) >= allowed - slack


@given(scores=scores_of, shares=st.tuples(st.integers(0, 1000), st.integers(0, 1000)))
def test_a_larger_share_keeps_no_less(scores: list[float], shares: tuple[int, int]) -> None:
    found = torch.tensor(scores)[None, None]
    nothing = torch.zeros_like(found, dtype=torch.bool)
    fewer, more = (_cut(found, share, nothing) for share in sorted(shares))
    assert (more | ~fewer).all()


def test_equal_blocks_go_from_the_end_and_in_proportion() -> None:
    # Broad attention: the best key of each of 100 blocks holds nearly nothing.
    even = torch.full((1, 1, 100), -11.0)
    nothing = torch.zeros_like(even, dtype=torch.bool)
    for share, count in ((0, 0), (1, 1), (500, 50), (1000, 100)):
        kept = _cut(even, share, nothing)[0, 0]
        assert int(kept.sum()) in (count, min(100, count + 1)), share
        assert kept[: int(kept.sum())].all()


def test_a_block_that_alone_holds_the_rest_never_goes() -> None:
    one = torch.tensor([[[math.log(0.03), -20.0, -20.0]]])
    nothing = torch.zeros_like(one, dtype=torch.bool)
    # 4 x .03 is more than .1, whatever else there is; a block is no more than everything.
    assert _cut(one, 900, nothing)[0, 0, 0]
    assert not _cut(one, 500, nothing)[0, 0, 1:].any()


# ---- patterns ----------------------------------------------------------------------------------


def _call(name: str, share: int, **options: Any) -> Call:
    return Call(heads=(HeadPattern(name, share, RECALL_BLOCKS),) * 2, **options)


calls = st.builds(
    dict,
    num_q=st.integers(20, 200),
    seed=st.integers(0, 50),
    batch=st.integers(1, 2),
    hidden=st.sampled_from([(0, 0, 0), (0, 0, 0), (9, 0, 0), (0, 20, 3)]),
    documents=st.sampled_from([0, 0, 3]),
)


@pytest.mark.parametrize("name", RECALL_PATTERNS)
@given(options=calls, share=st.sampled_from([0, 700, 950]), right=st.sampled_from([0, 0, -1]))
def test_laws_of_the_index(name: str, options: dict[str, Any], share: int, right: int) -> None:
    options["geometry"] = Geometry(0, -1, right, 32, 16)
    options["num_k"] = options["num_q"]
    call = _call(name, share, **options)
    covered, allowed = call.covered(), call.allowed()
    assert covered.max() <= 1
    kept = covered.bool() & allowed
    # No row that sees a key loses all of them, and more is kept for more.
    assert (kept.any(-1) | ~allowed.any(-1)).all()
    more = _call(name, 990, **options).covered().bool() & allowed
    assert (more | ~kept).all()


@pytest.mark.parametrize("name", RECALL_PATTERNS)
@pytest.mark.parametrize("right", [0, -1])
def test_all_of_the_mass_is_every_visible_pair(name: str, right: int) -> None:
    # Without content every key has the same mass.
    call = _call(name, 1000, geometry=Geometry(0, -1, right, 32, 16), hidden=(0, 7, 0))
    kept = call.covered(*call.empty()).bool() & call.allowed()
    assert torch.equal(kept, call.allowed().expand_as(kept))


@pytest.mark.parametrize("name", RECALL_PATTERNS)
def test_the_bound_holds_whatever_the_share(name: str) -> None:
    heads = (HeadPattern(name, 1000, 2),) * 2
    call = Call(heads=heads, num_q=400, num_k=400)
    counts = call.index(*call.qkv()).num_blocks
    # 128 keys in blocks of 16, or what is always kept where that is more.
    assert int(counts.max()) <= 8


# ---- the option --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.01, True, "0.9", float("nan"), float("inf")])
def test_an_impossible_share_is_refused(value: object) -> None:
    with pytest.raises(OptionInvalid, match="target_recall"):
        parse_options({"target_recall": value})


def test_a_share_is_kept_as_a_number() -> None:
    assert parse_options({"target_recall": 1}).target_recall == 1.0
    assert parse_options({"target_recall": None, "budget": 0.5}).target_recall is None
    for name in ("auto", *RECALL_PATTERNS):
        assert parse_options({"target_recall": 0.9, "pattern": name}).pattern == name


def test_one_way_to_say_what_is_kept(tmp_path: Any) -> None:
    path = tmp_path / "config.json"
    path.write_text("[]")
    for other in ({"budget": 0.1}, {"config": path}):
        with pytest.raises(OptionInvalid, match="'target_recall' must be absent"):
            parse_options({"target_recall": 0.9, **other})
    for pattern in ("low_rank", "switching", "dense", {"*": ("adaptive", 900, 0)}, ["adaptive"]):
        with pytest.raises(OptionInvalid, match="low_rank_recall") as caught:
            parse_options({"target_recall": 0.9, "pattern": pattern})
        for name in RECALL_PATTERNS:
            assert name in str(caught.value)


def test_zero_config_asks_the_pattern_that_the_mask_and_the_executor_afford() -> None:
    def name(causal: bool, auto: HeadPattern, unlisted: bool = False) -> str:
        [head] = uniform("auto", 1, causal=causal, auto=auto, unlisted=unlisted, recall=0.9)
        assert (head.first, head.second) == (900, RECALL_BLOCKS)
        return head.name

    assert name(True, ROWS) == "low_rank_recall"
    assert name(True, ROWS, unlisted=True) == name(True, BAND) == "switching_recall"
    assert name(False, ROWS) == name(False, BAND) == "adaptive"
    with pytest.raises(PatternInvalid, match="target_recall"):
        uniform("a_shape", 1, causal=True, auto=BAND, recall=0.9)


class _Attention(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("name", ["auto", "low_rank_recall"])
def test_a_compiled_model_follows_the_option(name: str) -> None:
    # Rows of a block look for one far key each, which holds nearly all.
    q, k, v = (torch.randn(1, 2, 512, 16) for _ in "qkv")
    q[:, :, 448:] = 8 * k[:, :, 200:201]
    dense, errors = _Attention()(q, k, v), []
    for recall in (0.5, 0.99, 1.0):
        model = _Attention()
        options = {
            "target_recall": recall,
            "pattern": name,
            "min_tokens": 0,
            "executor": "reference",
            "inner": "eager",
        }
        compiled = torch.compile(model, backend="minference", options=options)
        with torch.inference_mode():
            got = compiled(q, k, v)
        [site] = sparse_compiler.explain(model, (q, k, v), options=options).sites
        assert ("budget 1" in site.pattern) == (recall == 1.0), site.pattern
        errors.append(float((got - dense).norm() / dense.norm()))
    assert errors[2] < 1e-5
    assert errors[1] < 0.25
    assert errors[2] <= errors[1] <= errors[0]
