"""``minference cache``: listing, verifying, clearing."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sparse_compiler.cli import app
from sparse_compiler.cli_cache import short_age, short_size
from sparse_compiler.runtime.cache_contents import contents
from sparse_compiler.runtime.cache_group import BinaryFacts, locked, publish
from sparse_compiler.runtime.kernel_cache import KernelCache

TEXT = "VALUE = 41\n"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSE_COMPILER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def filled(directory: Path) -> KernelCache:
    cache = KernelCache(directory)
    cache.load("attend", TEXT)
    cache.load("probe", TEXT + "\n")
    facts = BinaryFacts("attend_0", "attend", "cuda:90", 1024, 200, 0)
    publish(cache.binaries, "ABC", {"attend.cubin": b"code"}, facts)
    return cache


def run(*arguments: str, answer: str | None = None) -> Any:
    return CliRunner().invoke(app, ["cache", *arguments], input=answer)


def test_an_absent_cache_is_empty_and_stays_absent(directory: Path) -> None:
    for command in ("ls", "verify"):
        done = run(command)
        assert done.exit_code == 0
        assert "0 groups" in done.stdout
    assert run("clear").exit_code == 0
    assert not directory.exists()


def test_ls_names_every_group(filled: KernelCache) -> None:
    done = run("ls")
    assert done.exit_code == 0
    for entry in contents(filled.directory):
        assert entry.name in done.stdout
    assert "attend cuda:90 of attend_0" in done.stdout
    assert "3 groups" in done.stdout


def test_verify_passes_a_whole_cache_and_names_what_is_broken(filled: KernelCache) -> None:
    assert run("verify").exit_code == 0
    path = filled.path("attend", TEXT)
    path.write_text(TEXT.replace("41", "43"))
    (filled.binaries / "ABC" / "attend.cubin").unlink()
    done = run("verify")
    assert done.exit_code == 1
    assert f"broken: kernels/{path.stem}: {path.name} was changed" in done.stdout
    assert "broken: binaries/ABC: attend.cubin is missing" in done.stdout
    assert "2 of 3" in done.stdout
    assert "probe_" not in done.stdout, "the whole one is not named"
    assert "was changed" in run("ls").stdout


def test_verify_notices_a_source_that_was_sealed_under_another_name(filled: KernelCache) -> None:
    """All sums are right, but the text is not the one that the name is a hash of."""
    path = filled.path("attend", TEXT)
    group = contents(filled.directory)[0].group
    assert group is not None
    publish(filled.sources, path.stem, {path.name: b"VALUE = 66\n"}, group.facts)
    done = run("verify")
    assert done.exit_code == 1
    assert "not the hash of its text" in done.stdout


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
def test_an_unsafe_directory_is_reported_and_left_alone(filled: KernelCache) -> None:
    filled.directory.chmod(0o777)
    for command in (("verify",), ("clear", "--yes")):
        done = run(*command)
        assert done.exit_code == 1
        assert "can be written by everybody" in done.stdout
    assert len(contents(filled.directory)) == 3


def test_clear_asks_first(filled: KernelCache) -> None:
    done = run("clear", answer="n\n")
    assert done.exit_code == 1
    assert "Remove 3 groups" in done.stdout
    assert len(contents(filled.directory)) == 3
    assert run("clear", answer="y\n").exit_code == 0
    assert contents(filled.directory) == []


def test_clear_removes_leftovers_and_leaves_other_files(filled: KernelCache) -> None:
    (filled.sources / ".new-attend_1-abcdefgh").mkdir()
    constants = filled.directory / "constants.json"
    constants.write_text("{}")
    done = run("clear", "--yes")
    assert done.exit_code == 0
    assert "3 groups removed" in done.stdout
    assert [p.name for p in filled.sources.iterdir()] == [".locks"]
    assert constants.exists()
    assert filled.load("attend", TEXT).VALUE == 41
    assert KernelCache(filled.directory).load("attend", TEXT).VALUE == 41


def test_clear_never_follows_links_out(filled: KernelCache, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "group").mkdir(parents=True)
    (outside / "group" / "letter").write_text("dear")
    (filled.sources / "link").symlink_to(outside / "group")
    (filled.path("attend", TEXT).parent / "deep").symlink_to(outside)
    filled.binaries.rename(tmp_path / "moved")
    filled.binaries.symlink_to(outside)
    assert run("clear", "--yes").exit_code == 0
    assert (outside / "group" / "letter").read_text() == "dear"
    assert [p.name for p in filled.sources.iterdir()] == [".locks"]


def _hold(root: Path, name: str, ready: Any, done: Any) -> None:
    with locked(root, name):
        ready.set()
        done.wait(30)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_clear_respects_locks(filled: KernelCache) -> None:
    name = filled.path("attend", TEXT).stem
    context = multiprocessing.get_context("fork")
    ready, over = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(filled.sources, name, ready, over))
    holder.start()
    assert ready.wait(20)
    done = run("clear", "--yes")
    over.set()
    holder.join()
    assert done.exit_code == 1
    assert f"kept, since another process is writing them: {name}" in done.stdout
    assert [entry.name for entry in contents(filled.directory)] == [name]


def test_env_shows_the_state_of_the_cache(
    filled: KernelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state() -> dict[str, Any]:
        return json.loads(CliRunner().invoke(app, ["env"]).stdout)["cache"]

    whole = state()
    assert (whole["kernels"], whole["state"]) == (2, "ok")
    assert "shared" not in whole
    monkeypatch.setenv("SPARSE_COMPILER_SHARED_CACHE", "/team")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    path = filled.path("attend", TEXT)
    path.unlink()
    broken = state()
    assert broken["state"] == f"broken: {path.stem}"
    assert broken["shared"] == "/team"
    if hasattr(os, "getuid"):
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton").chmod(0o777)
        filled.directory.chmod(0o777)
        assert "can be written by everybody" in state()["state"]
        filled.directory.chmod(0o700)
        assert importlib.util.find_spec("triton") is None or "not private" in state()["triton"]
    monkeypatch.setenv("SPARSE_COMPILER_CACHE", str(tmp_path / "absent"))
    assert state()["state"] == "not created yet"


def test_sizes_and_ages_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (0, 1023, 1024, 20480, 3 * 2**20, 2**31)
    assert [short_size(size) for size in sizes] == [
        *("0 B", "1023 B", "1.0 KB", "20 KB", "3.0 MB", "2.0 GB")
    ]
    monkeypatch.setattr("time.time", lambda: 1_000_000.0)
    ages = (1_000_010, 999_990, 999_700, 990_000, 500_000)
    assert [short_age(moment) for moment in ages] == ["0 s", "10 s", "5 min", "3 h", "6 d"]
