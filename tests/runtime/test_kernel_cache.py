"""The cache of generated sources: right text, whole files, private directories."""

from __future__ import annotations

import inspect
import linecache
import logging
import multiprocessing
import os
import random
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from sparse_compiler.codegen.spec import ProbeSpec
from sparse_compiler.runtime import kernel_cache, requester
from sparse_compiler.runtime.cache_contents import contents
from sparse_compiler.runtime.cache_group import SourceFacts, read_group
from sparse_compiler.runtime.kernel_cache import KernelCache, is_private, load_kernels

TEXT = "VALUE = 41\n\n\ndef answer():\n    return VALUE + 1\n"


def test_the_file_holds_exactly_the_text_and_is_imported(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    module = cache.load("attend", TEXT)
    path = cache.path("attend", TEXT)
    assert module.answer() == 42
    assert path.read_bytes() == TEXT.encode()
    assert module.__file__ == str(path)
    assert path.name.startswith("attend_")
    assert cache.load("attend", TEXT) is module
    assert {p.name for p in path.parent.iterdir()} == {path.name, "meta.json"}
    assert {p.name for p in cache.sources.iterdir()} == {path.parent.name, ".locks"}


def test_the_key_depends_on_text_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = KernelCache(tmp_path)
    before = cache.key(TEXT)
    assert before == KernelCache(tmp_path / "other").key(TEXT)
    assert before != cache.key(TEXT + "\n")
    monkeypatch.setattr(kernel_cache, "environment", lambda: "torch 9, triton 9")
    assert before != cache.key(TEXT)


@pytest.mark.parametrize("damage", ["truncated", "tampered", "empty", "binary"])
def test_a_damaged_file_is_written_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = KernelCache(tmp_path)
    first.load("attend", TEXT)
    path = first.path("attend", TEXT)
    path.write_bytes(
        {
            "truncated": TEXT[:20].encode(),
            "tampered": TEXT.replace("41", "13").encode(),
            "empty": b"",
            "binary": b"\xff\x00\xfe",
        }[damage]
    )
    with caplog.at_level(logging.WARNING):
        assert KernelCache(tmp_path).load("attend", TEXT).answer() == 42
    assert path.read_bytes() == TEXT.encode()
    assert "changed on disk" in caplog.text


def test_stale_bytecode_is_not_used(tmp_path: Path) -> None:
    """A rewrite within the same second and of the same length would match a bytecode file's stamp."""
    cache = KernelCache(tmp_path)
    path = cache.path("attend", TEXT)
    path.parent.mkdir()
    path.write_text(TEXT.replace("41", "13"))
    os.utime(path, (10**9, 10**9))
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(path)], check=True)
    assert KernelCache(tmp_path).load("attend", TEXT).answer() == 42


def test_the_text_that_was_compared_is_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that changes between the check and the import has no effect, in Triton neither."""
    cache = KernelCache(tmp_path)
    real = kernel_cache._ensure

    def ensure_then_change(path: Path, *rest: Any) -> None:
        real(path, *rest)
        path.write_text(TEXT.replace("41", "13"))

    monkeypatch.setattr(kernel_cache, "_ensure", ensure_then_change)
    module = cache.load("attend", TEXT)
    assert module.answer() == 42
    linecache.checkcache()
    assert inspect.getsource(module) == TEXT
    assert inspect.getsource(module.answer) in TEXT


def test_the_meta_file_names_spec_versions_and_sites(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    cache = KernelCache(tmp_path)
    spec = ProbeSpec(dtype="float16", head_dim=64, groups=1)
    requester.name_sites({7: "model.layers.31.self_attn", 8: "model.layers.2.self_attn", 9: "enc"})
    for site in (7, 8, 9, -1, 12345):
        with requester.requested_by(site):
            module = load_kernels(cache, spec)
    name = Path(module.__file__ or "").stem
    group = read_group(cache.sources, name)
    assert group is not None
    facts = group.facts
    assert isinstance(facts, SourceFacts)
    assert facts.sites == ("enc", "model.layers.*.self_attn")
    assert facts.template == "probe.py.jinja"
    assert facts.spec["head_dim"] == 64
    assert facts.environment == kernel_cache.environment()
    assert "self_attn" not in group.files[f"{name}.py"].decode(), "the key is a hash of the text"
    again = KernelCache(tmp_path)
    load_kernels(again, spec)
    assert read_group(again.sources, name).facts == facts  # type: ignore[union-attr]


def test_an_operator_tells_its_site() -> None:
    seen = []

    @requester.for_site
    def operator(value: int, site: int) -> int:
        seen.append(requester.current_site())
        return value

    requester.name_sites({70: "model.layers.3.attn"})
    assert operator(1, 70) == 1
    assert operator(2, site=70) == 2
    assert operator(3, -1) == 3
    assert seen == ["model.layers.*.attn", "model.layers.*.attn", ""]
    assert requester.current_site() == ""


def test_many_threads_agree(tmp_path: Path) -> None:
    def load(number: int) -> int:
        return KernelCache(tmp_path).load("attend", TEXT).answer()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(load, range(32))) == {42}


def _text(number: int) -> str:
    return f"VALUE = {number}\n" * 500 + "\n\ndef answer():\n    return VALUE\n"


def _load_all(root: Path, start: Any, results: Any) -> None:
    start.wait(30)
    cache = KernelCache(root)
    results.put([cache.load("attend", _text(number)).answer() for number in range(20)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_many_processes_load_the_same_kernels_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    processes = [
        context.Process(target=_load_all, args=(tmp_path, start, results)) for _ in range(6)
    ]
    for process in processes:
        process.start()
    start.set()
    assert [results.get(timeout=60) for _ in processes] == [list(range(20))] * 6
    for process in processes:
        process.join()
    assert len(contents(tmp_path)) == 20
    assert not [entry for entry in contents(tmp_path) if entry.problem]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_kill_9_while_kernels_are_written_then_everything_loads(tmp_path: Path) -> None:
    chooser = random.Random(3)
    context = multiprocessing.get_context("fork")
    for _ in range(12):
        start = context.Event()
        process = context.Process(target=_load_all, args=(tmp_path, start, context.Queue()))
        process.start()
        start.set()
        time.sleep(chooser.uniform(0.005, 0.04))
        process.kill()
        process.join()
        assert not [entry for entry in contents(tmp_path) if entry.problem]
    cache = KernelCache(tmp_path)
    assert [cache.load("attend", _text(number)).answer() for number in range(20)] == [*range(20)]
    assert len(contents(tmp_path)) == 20


def test_the_default_directory_is_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SPARSE_COMPILER_CACHE", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    assert KernelCache().directory == tmp_path / "sparse_compiler"
    assert KernelCache().sources == tmp_path / "sparse_compiler" / "kernels"
    assert is_private(tmp_path / "sparse_compiler")


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
@pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777])
def test_a_directory_that_others_can_write_is_refused(
    tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    cache = KernelCache(shared)
    with caplog.at_level(logging.WARNING):
        directory = cache.directory
    assert directory != shared
    assert is_private(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert "not used" in caplog.text
    assert str(shared) in caplog.text
    assert cache.load("attend", TEXT).answer() == 42
    assert not list(shared.iterdir())


def test_a_path_that_is_a_file_is_replaced_by_a_private_directory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with caplog.at_level(logging.WARNING):
        assert KernelCache(file).load("attend", TEXT).answer() == 42
    assert "not used" in caplog.text


def test_a_spec_is_rendered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    rendered = []
    real = kernel_cache.emit
    monkeypatch.setattr(kernel_cache, "emit", lambda spec: rendered.append(spec) or real(spec))
    cache = KernelCache(tmp_path)
    spec = ProbeSpec(dtype="float16", head_dim=64, groups=1)
    assert load_kernels(cache, spec) is load_kernels(cache, spec)
    assert rendered == [spec]


def test_threads_that_ask_at_once_get_one_module(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from sparse_compiler.codegen.spec import WorkListSpec
    from sparse_compiler.runtime.kernel_cache import load_kernels

    cache = KernelCache(tmp_path / "cache")
    with ThreadPoolExecutor(8) as pool:
        modules = list(pool.map(lambda _: load_kernels(cache, WorkListSpec()), range(32)))
    assert len({id(module) for module in modules}) == 1


def test_the_launcher_keeps_the_kernels_that_it_knows_by_id() -> None:
    import gc
    import weakref

    import torch

    from sparse_compiler.runtime.triton_launch import Launcher

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: {1: None}

    launch, kernel = Launcher(), Kernel()
    alive = weakref.ref(kernel)
    launch(kernel, 1, [torch.zeros(1)], [], [], num_warps=4)
    del kernel
    gc.collect()
    assert alive() is not None, "its id must not be given to another kernel"
