"""``minference kernels why``: sites as text and from saved explanations, tables, error messages."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from sparse_compiler.cli import app
from sparse_compiler.codegen.constants import DENSE
from sparse_compiler.errors import OptionInvalid
from sparse_compiler.ir.pattern import HeadPattern, LayerPatterns
from sparse_compiler.ir.shape import SiteShape
from sparse_compiler.why import parse_site, print_measured, print_why, why

SITE = "32x8x131072x128:bfloat16:vertical_slash(512,2048)"


@pytest.fixture(autouse=True)
def no_tuning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Constants of whoever runs the tests must not matter."""
    monkeypatch.setenv("SPARSE_COMPILER_CACHE", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "shape", "pattern"),
    [
        (
            SITE,
            SiteShape(1, 32, 8, 131072, 131072, 128, 128),
            HeadPattern("vertical_slash", 512, 2048),
        ),
        (
            "2*16x16x512/4096x192/128:float16:block_sparse( 50 )",
            SiteShape(2, 16, 16, 512, 4096, 192, 128, "float16"),
            HeadPattern("block_sparse", 50),
        ),
        (
            "4x1x4096x64:float32:a_shape",
            SiteShape(1, 4, 1, 4096, 4096, 64, 64, "float32"),
            HeadPattern("a_shape", 128, 3968),
        ),
    ],
)
def test_sites_are_read(text: str, shape: SiteShape, pattern: HeadPattern) -> None:
    assert parse_site(text) == (shape, pattern)
    assert parse_site(f"{shape}:{pattern.name}({pattern.first},{pattern.second})") == (
        shape,
        pattern,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("32x8x131072x128", "of three parts"),
        ("32x8x131072:bfloat16:dense", "sizes of a site"),
        ("32x8x1024x128:bf16:dense", "one of float16, bfloat16, float32"),
        ("32x8x1024x128:bfloat16:slash(1,2)", "name of dense, a_shape, vertical_slash"),
        ("32x8x1024x128:bfloat16:a_shape(1,2", "pattern of a site"),
        ("32x5x1024x128:bfloat16:dense", "a multiple of its 5 key heads"),
        ("8x8x0x128:bfloat16:dense", "positive"),
        ("8x8x4096/1024x128:bfloat16:dense", "at most its 1024 keys"),
    ],
)
def test_errors_name_the_part_and_show_an_example(text: str, message: str) -> None:
    with pytest.raises(OptionInvalid) as error:
        parse_site(text)
    assert message in str(error.value)
    assert "For example: 32x8x131072x128:bfloat16" in str(error.value)


def explanation(tmp_path: Path, **fields: object) -> Path:
    shapes = {"query": "[1, 4, s0, 64]", "key": "[1, 2, s0, 64]", "value": "[1, 2, s0, 64]"}
    pattern = "3 x vertical_slash(100, 200) + 1 x block_sparse(10, 0)"
    site = {"shapes": shapes, "pattern": pattern, "reason": ""} | fields
    path = tmp_path / "explained.json"
    path.write_text(json.dumps([{"sites": []}, {"sites": [site]}]))
    return path


def test_a_site_of_a_saved_explanation(tmp_path: Path) -> None:
    path = explanation(tmp_path)
    ranking = why(f"{path}#0", tokens=65536)
    assert ranking.shape == SiteShape(1, 4, 2, 65536, 65536, 64, 64)
    assert isinstance(ranking.pattern, LayerPatterns)
    assert ranking.pattern.names == ("vertical_slash", "block_sparse")
    with pytest.raises(OptionInvalid, match="give its length with --tokens"):
        why(f"{path}#0")
    with pytest.raises(OptionInvalid, match="index out of range"):
        why(f"{path}#1", tokens=4096)
    with pytest.raises(OptionInvalid, match="an existing file"):
        why(f"{path}x#0")


def test_a_declined_site_says_so(tmp_path: Path) -> None:
    path = explanation(tmp_path, pattern="", reason="one query row: a decode step")
    with pytest.raises(OptionInvalid, match="one query row: a decode step"):
        why(f"{path}#0", tokens=4096)


def test_the_ranking_is_shown_with_terms_and_obstacles() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    print_why(
        why(SITE.replace("vertical_slash(512,2048)", "block_sparse"), device="NVIDIA A100"), console
    )
    text = console.export_text()
    for word in (
        "64x64",
        "matrix",
        "quantisation",
        "needs wgmma",
        "Chosen",
        "estimates",
        "gather K, V",
    ):
        assert word in text
    assert why(SITE, density=0.05).of(why(SITE).ranked[0].candidate).density == pytest.approx(0.05)
    with pytest.raises(OptionInvalid, match="0 < density"):
        why(SITE, density=2.0)


def results(tmp_path: Path, **fields: object) -> Path:
    row = {"tokens": 32768, "block_q": 64, "block_k": 64, "density": 0.39, "cudnn_ms": 14.5}
    row |= {"attend_ms": 7.8, "select_ms": 2.4} | fields
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"results": [row]}))
    return path


def test_predictions_stand_beside_measurements(tmp_path: Path) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    print_measured(results(tmp_path), why(SITE), console, schedule="plain")
    text = console.export_text()
    assert "/ 14.5" in text
    assert "/ 7.8" in text
    assert "plain 64x64" in text
    with pytest.raises(OptionInvalid, match="one that can run there"):
        print_measured(results(tmp_path, block_q=32), why(SITE), console)
    with pytest.raises(OptionInvalid, match=r"JSON file of benchmarks/attention\.py"):
        print_measured(tmp_path, why(SITE), console)


def test_the_command_prints_and_fails_politely() -> None:
    good = CliRunner().invoke(app, ["kernels", "why", SITE, "--tokens", "4096"])
    assert good.exit_code == 0, good.output
    assert "Stays dense" in good.output
    bad = CliRunner().invoke(app, ["kernels", "why", "nonsense"])
    assert bad.exit_code == 2
    assert "of three parts" in bad.output
    assert "[/Lk]" in bad.output, "the grammar is no markup"
    assert CliRunner().invoke(app, ["kernels", "why", "--help"]).exit_code == 0


def test_short_prompts_stay_dense() -> None:
    assert why(SITE, tokens=2048).best.candidate.schedule == DENSE
