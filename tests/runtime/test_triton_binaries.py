"""What Triton compiles from our sources: in our cache, whole, and nobody else's kernels moved."""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.cache import FileCacheManager, get_cache_manager

from sparse_compiler.codegen.spec import KernelSpec
from sparse_compiler.runtime import triton_binaries
from sparse_compiler.runtime.ahead import TARGETS, Launch, compile_launch
from sparse_compiler.runtime.cache_contents import binaries_of, contents
from sparse_compiler.runtime.cache_group import BinaryFacts, GroupBroken, publish, read_group
from sparse_compiler.runtime.kernel_cache import KernelCache, load_kernels
from sparse_compiler.runtime.prepare import prepare
from sparse_compiler.runtime.triton_binaries import Place, place_of, placing

HOPPER = TARGETS["sm_90"]
SMALL = """import triton
import triton.language as tl


@triton.jit
def add_one(out, size):
    at = tl.arange(0, 16)
    tl.store(out + at, tl.load(out + at, mask=at < size) + 1, mask=at < size)


@triton.jit(do_not_specialize=["size"])
def multiply(q, k_stride0, lse, scale, size):
    at = tl.arange(0, 16)
    tile = tl.load(q + at[:, None] * k_stride0 + at[None, :], mask=at[None, :] < size, other=0.0)
    tl.store(lse + at, tl.sum(tl.dot(tile, tl.trans(tile)) * scale, 1))


@triton.jit
def broken(out, size):
    tl.store(out + tl.arange(0, 16), undefined_name)
"""


@dataclass(frozen=True, kw_only=True)
class SmallSpec(KernelSpec):
    @property
    def template(self) -> str:
        return "small.py.jinja"


SPEC = SmallSpec(dtype="float16", head_dim=16, groups=1, num_stages=1)
MULTIPLY = Launch(SPEC, "multiply", types={"size": "i32"})


@pytest.fixture(autouse=True)
def users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Triton's own directory, empty."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "users"))
    triton_binaries._team_trusted.cache_clear()
    return tmp_path / "users"


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return with_small(KernelCache(tmp_path / "ours"))


def with_small(cache: KernelCache) -> KernelCache:
    """``cache``, to which ``SPEC`` means the source ``SMALL``."""
    cache.by_spec[SPEC] = cache.load("small", SMALL, SPEC)
    return cache


def compile_small(module: ModuleType, function: str = "add_one") -> Any:
    kernel = getattr(module, function)
    source = ASTSource(fn=kernel, signature={"out": "*fp32", "size": "i32"}, constexprs={})
    return triton.compile(source, target=HOPPER, options={"num_warps": 1})


def compile_placed(module: ModuleType, function: str = "add_one") -> Any:
    with placing(place_of(getattr(module, function))):
        return compile_small(module, function)


def binary(cache: KernelCache) -> Path:
    (found,) = [entry.path for entry in contents(cache.directory) if entry.kind == "binaries"]
    return found


def test_binaries_lie_beside_the_source_and_are_found_again(
    cache: KernelCache, users_cache: Path
) -> None:
    module = cache.load("small", SMALL)
    first = compile_placed(module)
    group = read_group(cache.binaries, binary(cache).name)
    assert group is not None
    assert group.files["add_one.cubin"] == first.asm["cubin"]
    facts = group.facts
    assert isinstance(facts, BinaryFacts)
    assert (facts.function, facts.target) == ("add_one", "cuda:90")
    assert facts.kernel == Path(module.__file__ or "").stem
    assert facts.shared == first.metadata.shared
    assert facts.registers > 0
    assert facts.stack == 0
    assert not users_cache.exists()
    assert not list(cache.binaries.glob(".new-*"))

    hits = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
        again = compile_placed(KernelCache(cache.directory).load("small", SMALL))
    assert hits == [True]
    assert again.asm["cubin"] == first.asm["cubin"]
    assert again.metadata == first.metadata


def test_other_kernels_stay_in_the_users_directory(cache: KernelCache, users_cache: Path) -> None:
    module = cache.load("small", SMALL)
    with placing(place_of(module.add_one)):
        thread = threading.Thread(target=compile_small, args=(module,))
        thread.start()
        thread.join()
        assert isinstance(get_cache_manager("00"), triton_binaries._GroupManager)
    assert isinstance(get_cache_manager("00"), FileCacheManager)
    assert knobs.cache.manager_class is None
    assert list(users_cache.rglob("*.cubin"))
    assert not contents(cache.directory)[1:]


def test_a_manager_that_the_user_chose_is_respected(
    cache: KernelCache, users_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_MANAGER", "triton.runtime.cache:FileCacheManager")
    compile_placed(cache.load("small", SMALL))
    assert list(users_cache.rglob("*.cubin"))
    assert len(contents(cache.directory)) == 1


@pytest.mark.parametrize("damage", ["flipped", "truncated", "mixed", "meta"])
def test_a_damaged_binary_is_compiled_again(
    cache: KernelCache, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Triton once took the code of one process with the metadata of another: NaN."""
    module = cache.load("small", SMALL)
    whole = compile_placed(module).asm["cubin"]
    path = binary(cache)
    cubin, meta = path / "add_one.cubin", path / "add_one.json"
    if damage == "flipped":
        cubin.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    elif damage == "truncated":
        cubin.write_bytes(whole[:100])
    elif damage == "mixed":
        meta.write_text(meta.read_text().replace('"shared": 0', '"shared": 4096'))
    else:
        (path / "meta.json").write_text("{}")
    assert [entry.path for entry in contents(cache.directory) if entry.problem] == [path]
    with caplog.at_level(logging.WARNING):
        again = compile_placed(KernelCache(cache.directory).load("small", SMALL))
    assert again.asm["cubin"] == whole
    assert again.metadata.shared == 0
    assert "is not used" in caplog.text
    assert not [entry for entry in contents(cache.directory) if entry.problem]


def test_a_failed_compilation_leaves_neither_files_nor_locks(cache: KernelCache) -> None:
    module = cache.load("small", SMALL)
    for _ in range(2):  # the second would wait for a lock that the first kept
        with pytest.raises(triton.compiler.errors.CompilationError):
            compile_placed(module, "broken")
    assert len(contents(cache.directory)) == 1
    assert not list(cache.binaries.glob(".new-*"))
    assert knobs.cache.manager_class is None


def test_launchers_are_kept_one_by_one(cache: KernelCache, users_cache: Path) -> None:
    place = Place("small", cache.binaries)
    with placing(place):
        manager = get_cache_manager("ab" * 16)
        assert manager.get_file("launcher.so") is None
        path = manager.put(b"\x7fELF", "launcher.so", binary=True)
    assert Path(path).read_bytes() == b"\x7fELF"
    with placing(place):
        assert get_cache_manager("ab" * 16).get_file("launcher.so") == path
    assert not users_cache.exists()


def test_a_teams_binaries_are_copied_and_then_ours(cache: KernelCache, tmp_path: Path) -> None:
    theirs = KernelCache(tmp_path / "team")
    compile_placed(theirs.load("small", SMALL))
    before = sorted(p for p in (tmp_path / "team").rglob("*"))
    ours = KernelCache(tmp_path / "ours", shared=tmp_path / "team")
    hits = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
        compile_placed(ours.load("small", SMALL))
    assert hits == [True]
    assert binary(ours).is_relative_to(tmp_path / "ours")
    assert sorted(p for p in (tmp_path / "team").rglob("*")) == before, "read only"


def test_the_team_is_named_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place_of(KernelCache(tmp_path).load("small", SMALL).add_one).shared is None
    monkeypatch.setenv("SPARSE_COMPILER_SHARED_CACHE", "/team")
    place = place_of(KernelCache(tmp_path).load("small", SMALL).add_one)
    assert place.shared == Path("/team/binaries")
    assert place.root == tmp_path / "binaries"


def test_prepare_has_nothing_to_do_for_the_interpreter(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (done,) = prepare(cache, [MULTIPLY], target=HOPPER)
    assert "interprets" in done.error


@pytest.mark.parametrize("trouble", ["open", "damaged", "launcher"])
def test_what_a_team_cannot_vouch_for_is_not_taken(
    tmp_path: Path, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = KernelCache(tmp_path / "team")
    compile_placed(theirs.load("small", SMALL))
    path = binary(theirs)
    if trouble == "open":
        (tmp_path / "team").chmod(0o777)
    elif trouble == "damaged":
        (path / "add_one.cubin").write_bytes(b"")
    else:
        group = read_group(theirs.binaries, path.name)
        assert group is not None
        publish(theirs.binaries, path.name, {**group.files, "x.so": b"\x7fELF"}, group.facts)
    hits = []
    ours = KernelCache(tmp_path / "ours", shared=tmp_path / "team")
    with knobs.compilation.scope(), caplog.at_level(logging.WARNING):
        knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
        compile_placed(ours.load("small", SMALL))
    assert hits == [False]
    assert ("is not used" in caplog.text) == (trouble != "launcher")


class _Device:
    """A driver without a device: enough to compile for a launch."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


@pytest.fixture
def hopper() -> Iterator[None]:
    before = driver._active
    driver.set_active(_Device(HOPPER))
    yield
    driver._active = before


def test_a_launch_finds_what_was_prepared(cache: KernelCache, hopper: None) -> None:
    """Types, alignment and options of a prepared kernel are those of the launch."""
    (done,) = prepare(cache, [MULTIPLY])
    assert (done.launch, done.error) == (MULTIPLY, "")
    assert done.shared >= 0
    module = with_small(KernelCache(cache.directory)).by_spec[SPEC]
    hits = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
        for length in (1000, 1024, 1):
            arguments = (torch.float16, 4096, torch.float32, 0.125, length)
            options = {"num_warps": SPEC.num_warps, "num_stages": SPEC.num_stages}
            module.multiply.warmup(*arguments, grid=(1,), **options)
    assert hits == [True], "one kernel for every length, and from the cache"
    ((report,),) = binaries_of(contents(cache.directory)).values()
    assert report.function == "multiply"


def test_prepare_reports_what_does_not_compile_and_goes_on(cache: KernelCache) -> None:
    broken = Launch(SPEC, "broken", types={"out": "*fp32", "size": "i32"})
    bad, good = prepare(cache, [broken, MULTIPLY], target=HOPPER)
    assert "undefined_name" in bad.error
    assert good.error == ""
    assert prepare(cache, []) == ()


def test_many_threads_prepare_one_kernel_once(cache: KernelCache) -> None:
    hits = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
        prepare(cache, [MULTIPLY] * 4, target=HOPPER, workers=4)
    assert sorted(hits) == [False, True, True, True]


def test_a_spec_compiles_for_a_device_that_is_not_here(cache: KernelCache) -> None:
    module = load_kernels(cache, SPEC)
    with placing(place_of(module.multiply)):
        compiled = compile_launch(MULTIPLY, module, TARGETS["gfx942"])
    assert "amdgcn" in compiled.asm
    (reports,) = binaries_of(contents(cache.directory)).values()
    assert reports[0].target == "hip:gfx942"
    assert reports[0].registers > 0


COMPILE_FOREVER = """
import itertools, sys
sys.path.insert(0, sys.argv[2])
from test_triton_binaries import KernelCache, SMALL, compile_placed

for number in itertools.count():
    cache = KernelCache(sys.argv[1])
    compile_placed(cache.load("small", SMALL.replace("+ 1", f"+ {number}")))
    print(number, flush=True)
"""


def test_kill_9_while_kernels_compile_leaves_only_whole_groups(tmp_path: Path) -> None:
    chooser = random.Random(11)
    for _ in range(2):
        arguments = [
            sys.executable,
            "-c",
            COMPILE_FOREVER,
            str(tmp_path),
            str(Path(__file__).parent),
        ]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "0\n"
            time.sleep(chooser.uniform(0.0, 0.4))
            process.kill()
        entries = contents(tmp_path)
        assert len(entries) >= 2
        assert not [entry for entry in entries if entry.problem]
    cache = KernelCache(tmp_path)
    hits = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
        compile_placed(cache.load("small", SMALL.replace("+ 1", "+ 0")))
    assert hits == [True]
    assert len({entry.name for entry in contents(tmp_path)}) == len(contents(tmp_path))


def test_a_group_of_another_kernel_is_refused(cache: KernelCache) -> None:
    """A directory that somebody renamed or copied over another."""
    compile_placed(cache.load("small", SMALL))
    path = binary(cache)
    shutil.copytree(path, path.parent / "OTHER")
    with pytest.raises(GroupBroken, match="belongs to"):
        read_group(cache.binaries, "OTHER")
