"""Groups of files: whole or absent, whoever is killed, and never believed when damaged."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sparse_compiler.runtime import cache_group
from sparse_compiler.runtime.cache_contents import contents
from sparse_compiler.runtime.cache_group import (
    BinaryFacts,
    GroupBroken,
    SourceFacts,
    collect_leftovers,
    group_names,
    locked,
    publish,
    read_group,
    remove_group,
    update_facts,
)

FILES = {"a.cubin": b"\x00\x01" * 64, "a.json": b'{"shared": 1024}'}
FACTS = BinaryFacts(kernel="attend_0", function="attend", target="cuda:90", shared=1024)
fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def content_of(root: Path, name: str) -> dict[str, bytes] | None:
    group = read_group(root, name)
    return None if group is None else group.files


def test_a_group_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_group(tmp_path, "g") is None
    path = publish(tmp_path, "g", FILES, FACTS)
    group = read_group(tmp_path, "g")
    assert group is not None
    assert (group.path, group.files, group.facts) == (path, FILES, FACTS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["g"]


def test_publishing_the_same_again_touches_nothing(tmp_path: Path) -> None:
    path = publish(tmp_path, "g", FILES, FACTS)
    before = path.stat().st_ino
    publish(tmp_path, "g", FILES, BinaryFacts())
    assert path.stat().st_ino == before


def test_another_content_takes_the_place_whole(tmp_path: Path) -> None:
    publish(tmp_path, "g", FILES, FACTS)
    publish(tmp_path, "g", {"b": b"new"}, FACTS)
    assert content_of(tmp_path, "g") == {"b": b"new"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["g"]


def test_a_flipped_bit_is_noticed_at_every_place(tmp_path: Path) -> None:
    path = publish(tmp_path, "g", FILES, FACTS)
    for file in path.iterdir():
        whole = file.read_bytes()
        for place in range(len(whole)):
            changed = bytearray(whole)
            changed[place] ^= 1 << place % 8
            file.write_bytes(changed)
            with pytest.raises(GroupBroken):
                read_group(tmp_path, "g")
        file.write_bytes(whole)
    assert content_of(tmp_path, "g") == FILES


def _mix(path: Path) -> None:
    other = publish(path.parent, "other", {"a.cubin": b"else", "a.json": b"{}"}, FACTS)
    shutil.copy(other / "a.json", path / "a.json")


def _borrow_meta(path: Path) -> None:
    other = publish(path.parent, "other", FILES, FACTS)
    shutil.copy(other / "meta.json", path / "meta.json")


def _link(path: Path) -> None:
    (path / "a.json").rename(path.parent / "elsewhere")
    (path / "a.json").symlink_to(path.parent / "elsewhere")


def _link_all(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: (path / "a.cubin").write_bytes(FILES["a.cubin"][:50]),
    "emptied": lambda path: (path / "a.cubin").write_bytes(b""),
    "missing": lambda path: (path / "a.cubin").unlink(),
    "extra": lambda path: (path / "a.ptx").write_bytes(b"x"),
    "no_meta": lambda path: (path / "meta.json").unlink(),
    "huge_meta": lambda path: (path / "meta.json").write_bytes(b" " * (1 << 21)),
    "mixed": _mix,
    "meta_of_another": _borrow_meta,
    "linked_file": _link,
    "linked_group": _link_all,
    "empty": lambda path: (shutil.rmtree(path), path.mkdir()),
    "file": lambda path: (shutil.rmtree(path), path.write_text("x")),
    "pipe": lambda path: ((path / "a.json").unlink(), os.mkfifo(path / "a.json")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_group_is_noticed_and_can_be_replaced(tmp_path: Path, damage: str) -> None:
    path = publish(tmp_path, "g", FILES, FACTS)
    DAMAGE[damage](path)
    with pytest.raises(GroupBroken):
        read_group(tmp_path, "g")
    publish(tmp_path, "g", FILES, FACTS)
    assert content_of(tmp_path, "g") == FILES


def test_facts_change_by_one_rename_and_files_stay(tmp_path: Path) -> None:
    publish(tmp_path, "g", FILES, SourceFacts("torch 1"))
    group = read_group(tmp_path, "g")
    assert group is not None
    update_facts(tmp_path, group, SourceFacts("torch 1", sites=("layers.*",)))
    again = read_group(tmp_path, "g")
    assert again is not None
    assert again.facts == SourceFacts("torch 1", sites=("layers.*",))
    assert again.files == FILES
    assert group_names(tmp_path) == ["g"]


def test_removing_a_group_does_not_follow_links(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "letter").write_text("dear")
    root = tmp_path / "root"
    root.mkdir()
    path = publish(root, "g", FILES, FACTS)
    (path / "inside").symlink_to(precious)
    (root / "h").symlink_to(precious)
    remove_group(root, "g")
    remove_group(root, "h")
    assert list(root.iterdir()) == []
    assert (precious / "letter").read_text() == "dear"


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        publish(tmp_path, "g", FILES, FACTS)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_go_only_if_old_and_unlocked(tmp_path: Path) -> None:
    old, young, held = (tmp_path / f".new-{name}-abcdefgh" for name in ("old", "young", "held"))
    for path in (old, young, held):
        path.mkdir()
        (path / "part").write_text("half")
    for path in (old, held):
        os.utime(path, (1, 1))
    (tmp_path / ".hidden").mkdir()
    os.utime(tmp_path / ".hidden", (1, 1))
    publish(tmp_path, "g", FILES, FACTS)
    ready, done = multiprocessing.Event(), multiprocessing.Event()
    process = multiprocessing.get_context("fork").Process(
        target=_hold, args=(tmp_path, "held", ready, done)
    )
    process.start()
    assert ready.wait(20)
    assert collect_leftovers(tmp_path) == [old.name]
    done.set()
    process.join()
    assert collect_leftovers(tmp_path) == [held.name]
    assert young.is_dir()
    assert (tmp_path / ".hidden").is_dir()
    assert content_of(tmp_path, "g") == FILES


def _hold(root: Path, name: str, ready: object, done: object) -> None:
    with locked(root, name):
        ready.set()  # type: ignore[attr-defined]
        done.wait(20)  # type: ignore[attr-defined]


@fork
def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    ready, done = multiprocessing.Event(), multiprocessing.Event()
    process = multiprocessing.get_context("fork").Process(
        target=_hold, args=(tmp_path, "g", ready, done)
    )
    process.start()
    assert ready.wait(20)
    with locked(tmp_path, "g", timeout=0.0) as free:
        assert not free
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with locked(tmp_path, "g", timeout=5.0) as free:
        assert free


def test_without_locks_everything_still_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(self: object, **_: object) -> None:
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(cache_group.FileLock, "acquire", no_locks)
    with locked(tmp_path, "g") as free:
        assert free
        publish(tmp_path, "g", FILES, FACTS)
    assert content_of(tmp_path, "g") == FILES


def _versions(number: int) -> dict[str, bytes]:
    """Files that name their version: a mixture would show two numbers."""
    return {"code": b"%d " % number * 4000, "data": b"%d" % number}


def _rewrite(root: Path, seed: int, with_lock: bool) -> None:
    chooser = random.Random(seed)
    while True:
        name, number = f"g{chooser.randrange(3)}", chooser.randrange(100)
        if with_lock:
            with locked(root, name):
                publish(root, name, _versions(number), FACTS)
        else:
            publish(root, name, _versions(number), FACTS)


def _unmixed(files: dict[str, bytes]) -> bool:
    return files == _versions(int(files["data"]))


@fork
@pytest.mark.parametrize("with_lock", [True, False])
def test_readers_never_see_a_mixture_while_others_write(tmp_path: Path, with_lock: bool) -> None:
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=_rewrite, args=(tmp_path, seed, with_lock)) for seed in range(3)
    ]
    for writer in writers:
        writer.start()
    seen = 0
    stop = time.monotonic() + 2.0
    while time.monotonic() < stop:
        for name in group_names(tmp_path):
            try:
                files = content_of(tmp_path, name)
            except GroupBroken:  # replaced while it was read
                continue
            seen += files is not None
            assert files is None or _unmixed(files)
    for writer in writers:
        writer.kill()
        writer.join()
    assert seen > 20


@fork
def test_kill_9_at_any_moment_leaves_groups_whole_or_absent(tmp_path: Path) -> None:
    """Sixty writers, each killed within its first milliseconds; what is there is always whole."""
    chooser = random.Random(7)
    context = multiprocessing.get_context("fork")
    whole = 0
    for seed in range(60):
        writer = context.Process(target=_rewrite, args=(tmp_path, seed, True))
        writer.start()
        time.sleep(chooser.uniform(0.0, 0.03))
        writer.kill()
        writer.join()
        for name in group_names(tmp_path):
            files = content_of(tmp_path, name)  # raises if broken
            assert files is not None
            assert _unmixed(files)
            whole += 1
    assert whole > 30
    for name in ("g0", "g1", "g2"):
        with locked(tmp_path, name, timeout=5.0) as free:
            assert free
            publish(tmp_path, name, _versions(5), FACTS)
        assert content_of(tmp_path, name) == _versions(5)
    collect_leftovers(tmp_path, min_age=0.0)
    assert {p.name for p in tmp_path.iterdir()} == {"g0", "g1", "g2", ".locks"}
    assert contents(tmp_path.parent / "absent") == []
