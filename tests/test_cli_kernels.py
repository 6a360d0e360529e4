"""``minference kernels``: listing and printing generated kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from sparse_compiler import cli_kernels
from sparse_compiler.cli import app
from sparse_compiler.cli_kernels import short_spec
from sparse_compiler.runtime.cache_group import BinaryFacts, SourceFacts, publish
from sparse_compiler.runtime.kernel_cache import KernelCache

TEXT = "VALUE = [41]  # [red]not markup[/red]\n"
SPEC: dict[str, bool | int | float | str] = {
    "dtype": "bfloat16",
    "head_dim": 128,
    "value_dim": 64,
    "groups": 4,
    "causal": True,
    "window": False,
    "block_q": 64,
    "block_k": 128,
    "num_warps": 8,
    "num_stages": 3,
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelCache:
    monkeypatch.setenv("SPARSE_COMPILER_CACHE", str(tmp_path))
    return KernelCache(tmp_path)


def fill(cache: KernelCache) -> str:
    """A kernel with facts and two compilations; returns its name."""
    path = cache.path("attend", TEXT)
    facts = SourceFacts("torch 1", "attend.py.jinja", SPEC, ("model.layers.*.self_attn",))
    publish(cache.sources, path.stem, {path.name: TEXT.encode()}, facts)
    for key, registers, stack in (("AAA", 215, 0), ("BBB", 255, 64)):
        target = "cuda:90" if key == "AAA" else "cuda:80"
        report = BinaryFacts(path.stem, "attend", target, 116 * 1024, registers, stack)
        publish(cache.binaries, key, {"attend.cubin": b"x"}, report)
    publish(cache.binaries, "CCC", {"launcher.so": b"x"}, BinaryFacts(path.stem))
    return path.stem


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["kernels", *arguments])


def test_list_shows_spec_origin_and_resources(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparse_compiler.runtime.kernel_cache.environment", lambda: "torch 1")
    name = fill(cache)
    done = run("list")
    assert done.exit_code == 0
    for part in (
        name,
        "bf16 D128 Dv64 G4 64x128 w8 s3 causal",
        "model.layers.*.self_attn",
        "attend cuda:90: 215 reg, 116 KB shared, no spill",
        "attend cuda:80: 255 reg, 116 KB shared, 64 B spilled",
    ):
        assert part in done.stdout
    assert "launcher" not in done.stdout


def test_list_of_an_empty_cache_says_so(cache: KernelCache) -> None:
    done = run("list")
    assert done.exit_code == 0
    assert "No kernels" in done.stdout


def test_print_gives_the_very_text_when_piped(cache: KernelCache) -> None:
    cache.load("attend", TEXT)
    name = cache.path("attend", TEXT).stem
    for given in (name, "att", name[:12]):
        done = run("print", given)
        assert done.exit_code == 0
        assert done.stdout == TEXT


def test_print_highlights_in_a_terminal(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.load("attend", TEXT)
    monkeypatch.setattr(
        cli_kernels, "Console", lambda: Console(force_terminal=True, color_system="truecolor")
    )
    done = run("print", "attend")
    assert "\x1b[" in done.stdout
    assert "not markup" in done.stdout


def test_print_refuses_what_is_unknown_or_ambiguous(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    cache.load("attend", TEXT)
    cache.load("attend", TEXT + "\n")
    names = [cache.path("attend", text).stem for text in (TEXT, TEXT + "\n")]
    unknown = run("print", "probe")
    assert unknown.exit_code == 2
    assert "'probe'" in unknown.output
    assert names[0] in unknown.output
    ambiguous = run("print", "attend")
    assert ambiguous.exit_code == 2
    assert all(name in ambiguous.output for name in names)
    assert "Give more letters" in ambiguous.output


def test_an_exact_name_wins_over_a_prefix(cache: KernelCache) -> None:
    cache.load("attend", TEXT)
    path = cache.path("attend", TEXT)
    publish(cache.sources, f"{path.stem}0", {f"{path.stem}0.py": b"other"}, SourceFacts("torch 1"))
    assert run("print", path.stem).stdout == TEXT


def test_print_does_not_show_a_broken_kernel(cache: KernelCache) -> None:
    cache.load("attend", TEXT)
    cache.path("attend", TEXT).write_text("\x1b[2J wipes the screen")
    done = run("print", "attend")
    assert done.exit_code == 1
    assert "was changed" in done.output
    assert "\x1b" not in done.output


def test_a_spec_of_a_new_template_is_still_shown() -> None:
    assert short_spec(SPEC) == "bf16 D128 Dv64 G4 64x128 w8 s3 causal"
    assert short_spec({"dtype": "float8", "rows": 3, "split": True}) == "split"
    assert short_spec({}) == ""


def test_commands_of_other_modules_get_their_own_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    help_text = run("why", "--help")
    assert help_text.exit_code == 0
    assert "minference kernels why" in help_text.output or "kernels why" in help_text.output
    done = run("why")
    assert done.exit_code == 2
    tune = CliRunner().invoke(app, ["tune", "--help"])
    assert tune.exit_code == 0
    assert "--json" in tune.output
