"""The cache of generated sources: right text, whole files, private directories."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import platformdirs
import pytest

from sparse_compiler.codegen.spec import ProbeSpec
from sparse_compiler.runtime import kernel_cache
from sparse_compiler.runtime.kernel_cache import KernelCache, is_private, load_kernels

TEXT = "VALUE = 41\n\n\ndef answer():\n    return VALUE + 1\n"
ROOT = Path(__file__).parents[2]


def test_the_file_holds_exactly_the_text_and_is_imported(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    module = cache.load("attend", TEXT)
    path = cache.path("attend", TEXT)
    assert module.answer() == 42
    assert path.read_bytes() == TEXT.encode()
    assert module.__file__ == str(path)
    assert path.name.startswith("attend_")
    assert cache.load("attend", TEXT) is module
    assert not list(tmp_path.glob("*.tmp"))


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
    path.write_text(TEXT.replace("41", "13"))
    os.utime(path, (10**9, 10**9))
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(path)], check=True)
    assert KernelCache(tmp_path).load("attend", TEXT).answer() == 42


def test_many_threads_and_processes_agree(tmp_path: Path) -> None:
    def load(number: int) -> int:
        return KernelCache(tmp_path).load("attend", TEXT).answer()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(load, range(32))) == {42}
    code = (
        "import sys; from sparse_compiler.runtime.kernel_cache import KernelCache;"
        f"print(KernelCache(sys.argv[1]).load('attend', {TEXT!r}).answer())"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "shared")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in processes] == ["42", "42"]


def test_the_default_directory_is_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    assert KernelCache().directory == tmp_path / "sparse_compiler" / "kernels"
    assert is_private(tmp_path / "sparse_compiler" / "kernels")


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


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
def test_a_directory_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert not is_private(tmp_path)


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
