"""Which directory may hold code: owned by the user or root along its whole path, else refused.

The rule is that of ssh and sudo. Whoever can write a directory can put code there; whoever can
write one of its ancestors can put another directory in its place. So every directory that is
passed on the way must belong to the user or root and must not be writable by others. A sticky
ancestor (``/tmp``) may be: nobody else can rename or remove an entry there that the user owns.
Symbolic links are followed one by one, and the links themselves are held to the same rule.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparse_compiler.errors import CacheUnsafe

__all__ = ["Trusted", "is_private", "trusted_directory", "why_unsafe"]

_LOGGER = logging.getLogger(__name__)
_MAX_LINKS = 40
_OTHERS = stat.S_IWGRP | stat.S_IWOTH

#: Wanted directory -> the private one that took its place in this process.
_replacements: dict[str, Path] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Trusted:
    """A directory in use.

    Args:
        path: resolved, without symbolic links.
        instead_of: the directory that was wanted but is not trusted, or None.
        reason: why not; empty if it is.
    """

    path: Path
    instead_of: Path | None = None
    reason: str = ""


def _passed(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every directory, link and file that the system passes when it resolves ``path``, from /."""
    absolute = Path(os.path.abspath(path))
    current = Path(absolute.anchor)
    yield current, current.lstat()
    waiting = list(reversed(absolute.parts[1:]))
    links = 0
    while waiting:
        part = waiting.pop()
        if part == "..":
            current = current.parent
            continue
        entry = current / part
        status = entry.lstat()
        yield entry, status
        if not stat.S_ISLNK(status.st_mode):
            current = entry
            continue
        links += 1
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = Path(os.readlink(entry))
        if target.is_absolute():
            current = Path(target.anchor)
        waiting += reversed([p for p in target.parts if p != target.anchor])


def _only_mine(entry: Path, status: os.stat_result) -> bool:
    """Whether the entry's group holds nobody but the user: the "user private groups" of Linux."""
    import grp
    import pwd

    try:
        if "system.posix_acl_access" in os.listxattr(entry):
            return False  # the group bits are then the list's mask, not the group's right
        me = pwd.getpwuid(os.getuid())
        group = grp.getgrgid(status.st_gid)
    except (KeyError, OSError, AttributeError):
        return False
    return (
        group.gr_gid == me.pw_gid
        and group.gr_name == me.pw_name
        and set(group.gr_mem) <= {me.pw_name}
    )


def _fault(entry: Path, status: os.stat_result, owners: set[int], *, last: bool) -> str:
    if status.st_uid not in owners:
        return f"{entry} belongs to user {status.st_uid}"
    if stat.S_ISLNK(status.st_mode):
        return ""
    if not stat.S_ISDIR(status.st_mode):
        return f"{entry} is not a directory"
    writers = status.st_mode & _OTHERS
    if not writers or (not last and status.st_mode & stat.S_ISVTX):
        return ""
    if not last and writers == stat.S_IWGRP and _only_mine(entry, status):
        return ""
    who = "everybody" if writers & stat.S_IWOTH else f"group {status.st_gid}"
    return f"{entry} can be written by {who} (mode {stat.S_IMODE(status.st_mode):o})"


def why_unsafe(path: str | os.PathLike[str], *, trust_owner: bool = False) -> str:
    """What lets somebody else put files below ``path``; empty if nothing does.

    Args:
        path: an existing directory; relative paths and symbolic links are followed.
        trust_owner: the owner of the directory itself counts as trusted, like the user and root.
    Raises:
        OSError: the path does not exist or cannot be looked at.
    """
    if not hasattr(os, "getuid"):  # Windows: the user's profile is private by its access list
        return "" if Path(path).is_dir() else f"{path} is not a directory"
    owners = {0, os.getuid()}
    passed = list(_passed(Path(path)))
    real = Path(path).resolve(strict=True)
    if trust_owner:
        owners.add(real.stat().st_uid)
    for entry, status in passed:
        fault = _fault(entry, status, owners, last=entry == real)
        if fault:
            return fault
    return ""


def is_private(directory: Path) -> bool:
    """Whether only this user and root can put files there: code is imported from it."""
    try:
        return not why_unsafe(directory)
    except OSError:
        return False


def trusted_directory(wanted: Path) -> Trusted:
    """``wanted``, created if need be, or a private temporary directory in its place.

    The replacement lives as long as the process, serves every request for the same directory, and
    is announced once, with the reason, as a warning.

    Raises:
        CacheUnsafe: the place for temporary directories is not safe either.
    """
    reason = _unusable(wanted)
    if not reason:
        return Trusted(wanted.resolve())
    with _lock:
        private = _replacements.get(os.path.abspath(wanted))
        if private is None or not private.is_dir():
            private = _temporary(reason)
            _replacements[os.path.abspath(wanted)] = private
            _LOGGER.warning(
                "kernel cache %s is not used: %s; kernels of this process go to %s and are "
                "compiled again next time. Set SPARSE_COMPILER_CACHE to a directory of your own.",
                wanted,
                reason,
                private,
            )
    return Trusted(private, wanted, reason)


def _unusable(wanted: Path) -> str:
    try:
        _make(wanted)
        problem = why_unsafe(wanted)
    except OSError as error:
        return str(error)
    if not problem and not os.access(wanted, os.W_OK | os.X_OK):
        return f"{wanted} cannot be written"
    return problem


def _make(directory: Path) -> None:
    """``mkdir -p`` in which every directory that is made is the user's alone, whatever the umask."""
    absolute = Path(os.path.abspath(directory))
    missing = []
    while not os.path.lexists(absolute):
        missing.append(absolute)
        absolute = absolute.parent
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)


def _temporary(reason: str) -> Path:
    private = Path(tempfile.mkdtemp(prefix="sparse_compiler_")).resolve()
    problem = why_unsafe(private)
    if problem:
        private.rmdir()
        raise CacheUnsafe(
            "the directory for generated kernels",
            "one that only you and root can write",
            problem,
            where=f"temporary directory; the cache itself is refused because {reason}",
            fix="Set SPARSE_COMPILER_CACHE to a directory of your own.",
        )
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a forked child leaves it to its parent
            shutil.rmtree(private, ignore_errors=True)

    atexit.register(remove)
    return private
