"""Which directories are trusted to hold code, along their whole path."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sparse_compiler.errors import CacheUnsafe
from sparse_compiler.runtime import cache_directory
from sparse_compiler.runtime.cache_directory import (
    Trusted,
    is_private,
    trusted_directory,
    why_unsafe,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
as_root = pytest.mark.skipif(
    hasattr(os, "getuid") and os.getuid() != 0, reason="only root can give files away"
)
STRANGER = 54321


@pytest.fixture(autouse=True)
def _own_replacements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_directory, "_replacements", {})


def make(path: Path, mode: int = 0o700, owner: int | None = None) -> Path:
    path.mkdir()
    path.chmod(mode)
    if owner is not None:
        os.chown(path, owner, owner)
    return path


def test_a_private_directory_is_used_as_it_is(tmp_path: Path) -> None:
    assert why_unsafe(make(tmp_path / "cache")) == ""
    assert trusted_directory(tmp_path / "cache") == Trusted((tmp_path / "cache").resolve())


def test_missing_directories_are_made_for_the_user_alone(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        found = trusted_directory(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    assert found.reason == ""
    for path in (tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o722, 0o702])
def test_an_ancestor_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    """Whoever can write it can rename the private directory below and put another in its place."""
    open_to_all = make(tmp_path / "open")
    inner = make(open_to_all / "cache")
    assert is_private(inner)
    open_to_all.chmod(mode)
    assert str(open_to_all) in why_unsafe(inner)
    assert not is_private(inner)


def test_a_sticky_ancestor_is_like_tmp(tmp_path: Path) -> None:
    sticky = make(tmp_path / "sticky", 0o1777)
    assert why_unsafe(make(sticky / "cache")) == ""
    assert "everybody" in why_unsafe(sticky), "as the cache itself it takes anybody's files"


@as_root
def test_a_strangers_directory_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    theirs = make(tmp_path / "theirs")
    inner = make(theirs / "cache")
    os.chown(theirs, STRANGER, STRANGER)
    assert "belongs to user 54321" in why_unsafe(inner)
    sticky = make(tmp_path / "sticky", 0o1777)
    squatted = make(sticky / "cache", owner=STRANGER)
    assert "belongs to user 54321" in why_unsafe(squatted), "made in /tmp before us"


@as_root
def test_the_owner_of_a_shared_directory_is_trusted_on_request_only(tmp_path: Path) -> None:
    team = make(tmp_path / "team", 0o755, owner=STRANGER)
    assert why_unsafe(team)
    assert why_unsafe(team, trust_owner=True) == ""
    team.chmod(0o775)
    assert "group" in why_unsafe(team, trust_owner=True)
    inner = make(team / "cache", 0o755, owner=STRANGER + 1)
    team.chmod(0o755)
    assert "belongs to user 54321" in why_unsafe(inner, trust_owner=True)


def test_links_are_followed_and_what_they_lead_to_is_judged(tmp_path: Path) -> None:
    real = make(tmp_path / "real")
    link = tmp_path / "link"
    link.symlink_to("real")
    assert why_unsafe(link) == ""
    assert trusted_directory(link).path == real.resolve(), "a link changed later has no effect"
    open_to_all = make(tmp_path / "open")
    target = make(open_to_all / "cache")
    open_to_all.chmod(0o777)
    (tmp_path / "bad").symlink_to(target)
    assert str(open_to_all) in why_unsafe(tmp_path / "bad")


def test_a_link_that_stands_in_an_open_directory_is_refused(tmp_path: Path) -> None:
    """It leads to a private directory now, and anywhere tomorrow."""
    real = make(tmp_path / "real")
    open_to_all = make(tmp_path / "open")
    (open_to_all / "link").symlink_to(real)
    assert why_unsafe(open_to_all / "link") == ""
    open_to_all.chmod(0o777)
    assert str(open_to_all) in why_unsafe(open_to_all / "link")


@as_root
def test_a_strangers_link_is_refused(tmp_path: Path) -> None:
    real = make(tmp_path / "real")
    sticky = make(tmp_path / "sticky", 0o1777)
    (sticky / "link").symlink_to(real)
    assert why_unsafe(sticky / "link") == ""
    os.lchown(sticky / "link", STRANGER, STRANGER)
    assert "belongs to user" in why_unsafe(sticky / "link")


def test_dots_and_relative_paths_mean_what_the_system_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "a")
    make(tmp_path / "a" / "deep")
    make(tmp_path / "b")
    (tmp_path / "b" / "up").symlink_to("../a/deep/..")
    monkeypatch.chdir(tmp_path)
    assert why_unsafe("b/up") == ""
    (tmp_path / "a").chmod(0o777)
    assert str(tmp_path / "a") in why_unsafe("b/up")


def test_a_loop_of_links_is_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        why_unsafe(tmp_path / "a")
    assert "symbolic links" in trusted_directory(tmp_path / "a").reason


def test_a_group_of_one_may_write_an_ancestor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distributions with umask 002 give every user a group of their own."""
    parent = make(tmp_path / "parent")
    inner = make(parent / "cache")
    parent.chmod(0o775)
    monkeypatch.setattr(cache_directory, "_only_mine", lambda *_: True)
    assert why_unsafe(inner) == ""
    monkeypatch.setattr(cache_directory, "_only_mine", lambda *_: False)
    assert "group" in why_unsafe(inner)
    parent.chmod(0o777)
    monkeypatch.setattr(cache_directory, "_only_mine", lambda *_: True)
    assert "everybody" in why_unsafe(inner)


def test_a_group_with_other_members_is_not_a_group_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import grp
    import pwd

    status = tmp_path.stat()
    me = pwd.struct_passwd(("ann", "x", os.getuid(), status.st_gid, "", "/", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: me)
    for group, expected in (
        (("ann", "x", status.st_gid, []), True),
        (("ann", "x", status.st_gid, ["ann"]), True),
        (("ann", "x", status.st_gid, ["ann", "bob"]), False),
        (("staff", "x", status.st_gid, []), False),
    ):
        monkeypatch.setattr(grp, "getgrgid", lambda gid, g=group: grp.struct_group(g))
        assert cache_directory._only_mine(tmp_path, status) is expected
    monkeypatch.setattr(grp, "getgrgid", lambda gid: grp.struct_group(("ann", "x", gid, [])))
    monkeypatch.setattr(os, "listxattr", lambda path: ["system.posix_acl_access"])
    assert not cache_directory._only_mine(tmp_path, status), "an access list may name anybody"


def test_the_replacement_is_private_one_for_all_and_announced_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = make(tmp_path / "shared", 0o777)
    with caplog.at_level(logging.WARNING):
        first, second = trusted_directory(shared), trusted_directory(shared)
    assert first.path == second.path
    assert first.instead_of == shared
    assert is_private(first.path)
    assert caplog.text.count("is not used") == 1
    assert "can be written by everybody" in caplog.text
    assert str(first.path) in caplog.text
    assert not list(shared.iterdir())


def test_the_replacement_goes_away_with_the_process(tmp_path: Path) -> None:
    shared = make(tmp_path / "shared", 0o777)
    code = (
        "import sys; from pathlib import Path;"
        "from sparse_compiler.runtime.cache_directory import trusted_directory;"
        "print(trusted_directory(Path(sys.argv[1])).path)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(shared)], capture_output=True, text=True, check=True
    )
    assert "sparse_compiler_" in done.stdout
    assert not Path(done.stdout.strip()).exists()


def test_nothing_is_used_if_the_temporary_place_is_open_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = make(tmp_path / "shared", 0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    with pytest.raises(CacheUnsafe, match="SPARSE_COMPILER_CACHE"):
        trusted_directory(shared)
    assert not list(shared.iterdir())


def test_a_file_in_the_way_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "not a directory" in trusted_directory(tmp_path / "file").reason
    assert trusted_directory(tmp_path / "file" / "deeper").reason
