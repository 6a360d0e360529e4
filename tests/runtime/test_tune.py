"""Fitting, keeping and loading the constants; what is measured is counted right."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import product
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_compiler.codegen.attention_work import amounts_scoring, scoring
from sparse_compiler.codegen.choose import SCHEDULES
from sparse_compiler.codegen.constants import (
    DENSE,
    Constants,
    TileConstants,
    shipped,
    tile_key,
)
from sparse_compiler.codegen.cost import Amounts, predict
from sparse_compiler.codegen.resources import Resources
from sparse_compiler.errors import ExecutorUnavailable
from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.ir.shape import SiteShape
from sparse_compiler.patterns import registry
from sparse_compiler.runtime import tune as tuning_module
from sparse_compiler.runtime.reference import covered_pairs
from sparse_compiler.runtime.tune import FORMAT, Tuning, load_constants, store, tuning_path
from sparse_compiler.runtime.tune_fit import Sample, fit_constants, fit_scoring, non_negative_fit
from sparse_compiler.runtime.tune_index import (
    BandPlan,
    band_index,
    block_index,
    with_few_directions,
)
from sparse_compiler.runtime.tune_kernels import select
from sparse_compiler.runtime.tune_measure import Bench, Sizes

NAME = "NVIDIA H200"
START = shipped(NAME).constants
TRUE = replace(
    START,
    miss=0.08,
    l2=0.0,
    hbm=0.0,
    select=0.33,
    select_key=0.07,
    select_pair=1.2,
    score=2.0,
    score_row=1.5,
    score_start=0.9,
    tiles={
        DENSE: TileConstants(matrix=1.1, exponent=0.35, program=0.01),
        "plain:64x64": TileConstants(matrix=1.6, exponent=0.2, gather=0.05, test=0.1, program=0.03),
    },
)
SMALL = Sizes(
    heads=2,
    kv_heads=1,
    short=256,
    long=512,
    far=0,
    dense=(128, 192, 256, 512),
    select=(128,),
    unit=2,
)


def measured(noise: float = 0.0) -> list[Sample]:
    """What a device with the constants ``TRUE`` would show for the real list of measurements."""
    bench = Bench(torch.device("meta"), {"plain": lambda *_: None})
    samples = []
    bench._inputs = lambda shape: (torch.empty(1, device="meta"),) * 3  # type: ignore[method-assign]
    bench._median = lambda function: 1.0  # type: ignore[method-assign]
    bench.device = torch.device("cpu")
    sizes = Sizes(heads=4, kv_heads=1, select=())
    for name, step in bench.steps(sizes=sizes):
        if "128x" not in name:
            samples += step()
    for keys, triples in ((1e6, 0.0), (1e7, 0.0), (1e6, 1e9), (1e7, 2e9)):
        nothing = dict.fromkeys(("tiles", "asked", "flops", "exponents", "streamed"), 0.0)
        amounts = Amounts(**nothing, launches=0, index_keys=keys, index_pairs=triples, has_index=1)
        samples.append(Sample("select", f"{keys} {triples}", amounts, 1.0))
    head = registry.get("low_rank").default()
    for tokens, heads, width in product((4096, 16384, 131072), (32, 8), (128, 64)):
        shape = SiteShape(1, heads, heads, tokens, tokens, width, width)
        amounts = amounts_scoring(scoring(head, shape, 64))
        samples.append(Sample("score", f"{tokens} {heads} {width}", amounts, 1.0))
    generator = np.random.default_rng(0)
    found = []
    for sample in samples:
        tile = TRUE.tiles.get(sample.tile, TRUE.tiles[DENSE])
        ms = sum(predict(TRUE, tile, sample.amounts).values())
        found.append(replace(sample, ms=ms * float(np.exp(noise * generator.normal()))))
    return found


def test_the_fit_recovers_constants_from_exact_times() -> None:
    fit = fit_constants(measured(), replace(START, l2=0.0, hbm=0.0))
    scores = ("score", "score_row", "score_start")
    for name in ("miss", "select", "select_key", "select_pair", *scores):
        assert getattr(fit.constants, name) == pytest.approx(getattr(TRUE, name), rel=0.1), name
    plain, true = fit.constants.tiles["plain:64x64"], TRUE.tiles["plain:64x64"]
    for name in ("matrix", "exponent", "gather", "test", "program"):
        assert getattr(plain, name) == pytest.approx(getattr(true, name), rel=0.15), name
    assert max(fit.worst.values()) < 0.02


def test_noise_moves_predictions_little() -> None:
    fit = fit_constants(measured(noise=0.03), replace(START, l2=0.0, hbm=0.0))
    assert max(fit.errors.values()) < 0.05
    assert all(v >= 0 for tile in fit.constants.tiles.values() for v in vars(tile).values())


def test_scoring_took_no_longer_than_the_fit_says() -> None:
    samples = [s for s in measured(noise=0.2) if s.tile in ("score", "select")]
    constants = fit_constants(samples, START).constants
    ratios = [
        sum(predict(constants, constants.tiles[DENSE], s.amounts).values()) / s.ms
        for s in samples
        if s.tile == "score"
    ]
    assert min(ratios) > 0.9999
    assert fit_scoring([s for s in samples if s.tile == "select"], START) is START


def test_few_directions_fill_the_lists_of_scored_rows() -> None:
    """Or choosing among blocks would be measured where there is no choice."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 4096, 64, generator=generator) for _ in range(2))
    plain = AttentionIndex(*select("low_rank", q, k)()).num_blocks.sum()
    index = AttentionIndex(*select("low_rank", *with_few_directions(q, k))())
    full = index.blocks.shape[-1]
    counts = index.num_blocks[0, :, full:]
    assert (counts == full).float().mean() > 0.9
    assert int(plain) < 0.65 * int(index.num_blocks.sum())


def test_bandwidth_floors_contradict_no_measurement() -> None:
    samples = measured()
    fit = fit_constants(samples, replace(START, l2=10.0, hbm=0.0))
    for sample in samples:
        if sample.amounts.tiles and sample.amounts.working_set <= START.l2_size:
            floor = fit.constants.l2 * sample.amounts.tiles * sample.amounts.streamed / 1e9
            assert floor <= sample.ms * 1.0001


@given(seed=st.integers(0, 500))
def test_non_negative_fit_is_optimal(seed: int) -> None:
    """The conditions of Karush, Kuhn and Tucker, which are sufficient for a convex problem."""
    generator = np.random.default_rng(seed)
    parts = generator.random((8, 3))
    times = generator.random(8) + 0.5
    found = non_negative_fit(parts, times, np.zeros(3))
    gradient = (parts / times[:, None]).T @ ((parts @ found) / times - 1)
    assert (found >= 0).all()
    assert np.abs(gradient[found > 1e-9]).max(initial=0) < 1e-6
    assert (gradient > -1e-6).all()


def test_what_no_sample_tells_keeps_its_prior() -> None:
    parts = np.array([[1.0, 0.0], [2.0, 0.0]])
    found = non_negative_fit(parts, np.array([3.0, 6.0]), np.array([1.0, 7.0]))
    assert found == pytest.approx([3.0, 7.0], rel=1e-2)


def tuning(constants: Constants = START, **fields: object) -> Tuning:
    made = Tuning(
        format=FORMAT,
        device=NAME,
        versions=tuning_module._versions(),
        constants=replace(constants, origin="test", select=0.125),
        reports={"plain:64x64:128:bfloat16": Resources(115_000, 215, 0)},
    )
    return replace(made, **fields)


def test_stored_constants_come_back(tmp_path: Path) -> None:
    path = store(tuning(), tmp_path)
    assert path == tuning_path(NAME, tmp_path) == tmp_path / "nvidia_h200.json"
    loaded = load_constants(NAME, tmp_path)
    assert (loaded.code, loaded.note) == ("TUNED", "")
    assert loaded.constants.select == 0.125
    assert loaded.constants.tiles == START.tiles
    assert loaded.reports["plain:64x64:128:bfloat16"].registers == 215
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".lock"]


def test_without_a_file_the_shipped_constants_serve_and_say_so(tmp_path: Path) -> None:
    loaded = load_constants("NVIDIA A100-SXM4-80GB", tmp_path)
    assert loaded.code == "ESTIMATE"
    assert "minference tune" in loaded.note
    assert loaded.target == "sm_80"
    assert load_constants("Abacus", tmp_path).constants.device == "other device"


@pytest.mark.parametrize(
    "fields",
    [{"format": FORMAT + 1}, {"format": FORMAT - 1}, {"versions": {"torch": "1", "triton": "1"}}],
)
def test_other_versions_are_ignored_quietly(
    fields: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store(tuning(**fields), tmp_path)
    with caplog.at_level(logging.INFO):
        assert load_constants(NAME, tmp_path).code != "TUNED"
    assert [r.levelno for r in caplog.records] == [logging.INFO]
    assert "run `minference tune` again" in caplog.text


def broken(kind: str) -> bytes:
    good = msgspec.json.encode(tuning())
    plain = msgspec.json.decode(good)
    if kind == "cut":
        return good[: len(good) // 2]
    if kind == "negative":
        plain["constants"]["tiles"][DENSE]["matrix"] = -1.0
    if kind == "free":
        plain["constants"]["tiles"]["plain:64x64"] = {"matrix": 0.0}
    if kind == "free scores":
        plain["constants"] |= {"score": 0.0, "score_row": 0.0, "score_start": 0.0}
    if kind == "no scores":
        del plain["constants"]["score"]
    if kind == "no dense":
        del plain["constants"]["tiles"][DENSE]
    if kind == "text":
        plain["constants"]["miss"] = "0.5"
    if kind == "device":
        plain["device"] = "NVIDIA H100"
    return b"\xff\xfe" if kind == "bytes" else msgspec.json.encode(plain)


KINDS = [
    "cut",
    "negative",
    "free",
    "free scores",
    "no scores",
    "no dense",
    "text",
    "device",
    "bytes",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_file_is_ignored_with_a_warning(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuning_path(NAME, tmp_path).write_bytes(broken(kind))
    loaded = load_constants(NAME, tmp_path)
    assert loaded.code != "TUNED"
    assert loaded.constants == START
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "is broken" in caplog.text


@pytest.mark.parametrize("block_q", [32, 64])
@pytest.mark.parametrize("plan", [BandPlan(3), BandPlan(1, 4, 5), BandPlan(2, 3, 7, columns=20)])
def test_pairs_of_a_measured_band_are_counted_as_the_index_covers_them(
    plan: BandPlan, block_q: int
) -> None:
    shape = SiteShape(1, 2, 1, 256, 256, 16, 16)
    geometry = Geometry(0, -1, 0, block_q, 32)
    index, covered = band_index(shape, geometry, plan, torch.device("cpu"))
    count = covered_pairs(index, geometry, 256, 256)
    assert int(count.max()) == 1
    alone, _ = band_index(shape, geometry, replace(plan, columns=0), torch.device("cpu"))
    band = int(covered_pairs(alone, geometry, 256, 256).sum())
    # Tiles that reach past the first key are worked at whole, so at most one a row block more.
    rows = 2 * (256 // block_q)
    assert 0 <= covered.whole + covered.edge - band < rows * block_q * geometry.block_k
    # The oracle lists a column for rows before it too; a kernel stops at the row block's end.
    ends = (torch.arange(256) // block_q + 1) * block_q
    seen = int((count * (torch.arange(256)[None, :] < ends[:, None])).sum())
    assert seen - band <= covered.columns <= rows * block_q * plan.columns


def test_pairs_of_measured_blocks_are_counted_as_the_index_covers_them() -> None:
    shape = SiteShape(1, 2, 1, 256, 256, 16, 16)
    geometry = Geometry(0, -1, 0, 64, 32)
    index, covered = block_index(shape, geometry, 3, torch.device("cpu"))
    count = covered_pairs(index, geometry, 256, 256)
    assert int(count.max()) == 1
    assert covered.blocks == int(count.sum())


def test_every_step_measures_what_it_names() -> None:
    """On the CPU, at toy sizes: the calls and the counts, not the times."""
    seen = []

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: object, g: Geometry
    ) -> None:
        seen.append((g.block_q, g.block_k, q.shape[3]))

    bench = Bench(torch.device("cpu"), {"plain": attend, "hopper": attend})
    samples = [sample for _, step in bench.steps(sizes=SMALL) for sample in step()]
    assert {s.tile for s in samples} == {
        DENSE,
        "select",
        "score",
        *(
            tile_key(s, *tile)
            for s, kinds in SCHEDULES.items()
            for k in kinds.values()
            for tile in k
        ),
    }
    assert {width for *_, width in seen} == {64, 128}
    assert all(s.ms > 0 for s in samples)
    assert len({(s.tile, s.name) for s in samples}) == len(samples)
    fit = fit_constants(samples, bench.bandwidths(START))
    assert set(fit.constants.tiles) == {s.tile for s in samples} - {"select", "score"}
    scored = [s for s in samples if s.tile == "score"]
    assert {s.name.rpartition(" ")[2] for s in scored} == {"64", "128"}
    assert all(s.amounts.scored_rows and not s.amounts.index_keys for s in scored)


def test_a_kernel_that_does_not_fit_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: object, g: Geometry
    ) -> None:
        if g.block_k == 128:
            raise ExecutorUnavailable("kernel", "within the device's limits", "spills 8 bytes")

    bench = Bench(torch.device("cpu"), {"plain": attend})
    samples = [sample for _, step in bench.steps(sizes=SMALL) for sample in step()]
    fit = fit_constants(samples, START)
    assert set(fit.constants.tiles) == {DENSE, "plain:64x64", "plain:128x64"}
    assert "plain:128x128 is left out: kernel must be within" in caplog.text


def test_a_missing_device_is_refused_with_a_way_out() -> None:
    with pytest.raises(ExecutorUnavailable, match="Run it on the machine"):
        tuning_module.tune(device=99)
