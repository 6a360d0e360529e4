"""Files that belong together appear together, by one rename, and are checked before use.

A group is a directory: its files and ``meta.json``, which names the sha256 of each and is sealed
by a sha256 of its own. Writers fill a hidden sibling and rename it, so a group is absent or whole,
whoever is killed and when. A group that a disk or a person has damaged fails its sums and counts
as absent.

Locks only spare double work: without them everything stays correct, since a rename cannot mix.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock, Timeout

__all__ = [
    "BinaryFacts",
    "Facts",
    "Group",
    "GroupBroken",
    "SourceFacts",
    "collect_leftovers",
    "group_names",
    "locked",
    "publish",
    "read_group",
    "remove_group",
    "update_facts",
]

_LOGGER = logging.getLogger(__name__)

META = "meta.json"
LOCKS = ".locks"
_HIDDEN = re.compile(r"^\.(?P<kind>new|old)-(?P<name>.+)-(?P<random>[^-]{8})$")
_LEFTOVER_AGE = 3600.0
_MAX_META = 1 << 20
LOCK_TIMEOUT = 600.0


class SourceFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="source"):
    """About a generated module.

    Args:
        environment: versions that its key holds.
        template: what it was rendered from; empty for a text that no spec made.
        spec: the fields of its spec.
        sites: layers that asked for it, numbers in their paths replaced by ``*``.
    """

    environment: str
    template: str = ""
    spec: dict[str, bool | int | float | str] = {}
    sites: tuple[str, ...] = ()


class BinaryFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="binary"):
    """About what Triton compiled.

    Args:
        kernel: the source's group, e.g. ``attend_1f...``; empty for a launcher.
        function: the kernel's name.
        target: e.g. ``cuda:90``.
        shared: bytes of shared memory.
        registers, stack: of one thread, stack in bytes; -1 where no tool tells. A stack holds what
            was spilled.
    """

    kernel: str = ""
    function: str = ""
    target: str = ""
    shared: int = -1
    registers: int = -1
    stack: int = -1


Facts = SourceFacts | BinaryFacts


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    name: str
    files: dict[str, str]
    facts: Facts


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sha256: str
    body: msgspec.Raw


_FORMAT = 1


class Group:
    """A group as read from disk, its sums checked.

    Attributes:
        path: its directory.
        files: name -> content.
        facts: what is known about it.
    """

    def __init__(self, path: Path, files: Mapping[str, bytes], facts: Facts) -> None:
        self.path = path
        self.files = dict(files)
        self.facts = facts


class GroupBroken(Exception):
    """A group is not what was written; the text says which file and how. Never leaves the cache."""


def _seal(name: str, files: Mapping[str, bytes], facts: Facts) -> bytes:
    sums = {file: hashlib.sha256(data).hexdigest() for file, data in sorted(files.items())}
    encoded = msgspec.json.encode(_Body(_FORMAT, name, sums, facts))
    body = msgspec.json.format(encoded, indent=2)
    return b'{"sha256": "%s",\n"body": %s}\n' % (hashlib.sha256(body).hexdigest().encode(), body)


def _unseal(path: Path) -> _Body:
    data = _read_plain(path / META, _MAX_META)
    try:
        sealed = msgspec.json.decode(data, type=_Sealed)
        body = bytes(sealed.body)
        if hashlib.sha256(body).hexdigest() != sealed.sha256:
            raise GroupBroken(f"{META} was changed")
        decoded = msgspec.json.decode(body, type=_Body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise GroupBroken(f"{META} cannot be read: {error}") from None
    if decoded.format != _FORMAT:
        raise GroupBroken(f"{META} has format {decoded.format}, not {_FORMAT}")
    if decoded.name != path.name:
        raise GroupBroken(f"{META} belongs to {decoded.name}")
    return decoded


def _read_plain(path: Path, limit: int | None = None) -> bytes:
    """Content of a regular file; links are not followed."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        with open(os.open(path, flags), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if limit is not None and size > limit:
                raise GroupBroken(f"{path.name} has {size} bytes")
            return stream.read()
    except FileNotFoundError:
        raise GroupBroken(f"{path.name} is missing") from None
    except OSError as error:
        raise GroupBroken(f"{path.name} cannot be read: {error.strerror}") from None


def read_group(root: Path, name: str) -> Group | None:
    """The group, or None if there is none.

    Raises:
        GroupBroken: it is there but not whole, or not what was written.
    """
    path = root / name
    if not os.path.lexists(path):
        return None
    if path.is_symlink() or not path.is_dir():
        raise GroupBroken("not a directory")
    body = _unseal(path)
    try:
        present = set(os.listdir(path)) - {META}
    except OSError as error:  # moved away meanwhile
        raise GroupBroken(f"it cannot be listed: {error.strerror}") from None
    strange = present - set(body.files)
    if strange:
        raise GroupBroken(f"{min(strange)} does not belong to it")
    files = {}
    for file, digest in body.files.items():
        if Path(file).name != file:
            raise GroupBroken(f"{META} names a file outside: {file}")
        files[file] = _read_plain(path / file)
        if hashlib.sha256(files[file]).hexdigest() != digest:
            raise GroupBroken(f"{file} was changed")
    return Group(path, files, body.facts)


def _read_or_none(root: Path, name: str) -> Group | None:
    try:
        return read_group(root, name)
    except GroupBroken:
        return None


def publish(root: Path, name: str, files: Mapping[str, bytes], facts: Facts) -> Path:
    """Make ``root/name`` hold exactly these files and facts; the caller holds the group's lock.

    A whole group with the same files is left as it is. Another one is moved out of the way first:
    between the two renames the group is absent, never mixed.

    Returns:
        The group's directory.
    """
    path = root / name
    found = _read_or_none(root, name)
    if found is not None and found.files == dict(files):
        return path
    new = Path(tempfile.mkdtemp(dir=root, prefix=f".new-{name}-"))
    try:
        for file, data in {**files, META: _seal(name, files, facts)}.items():
            (new / file).write_bytes(data)
        for _ in range(16):
            _move_away(root, name)
            try:
                new.rename(path)
                return path
            except OSError:  # a writer without a lock was faster; its group may do
                again = _read_or_none(root, name)
                if again is not None and again.files == dict(files):
                    return path
        raise OSError(f"cannot put {path} in place: it comes back as often as it is moved away")
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _move_away(root: Path, name: str) -> None:
    path = root / name
    if not os.path.lexists(path):
        return
    aside = Path(tempfile.mkdtemp(dir=root, prefix=f".old-{name}-"))
    try:
        path.rename(aside / "group")
    except FileNotFoundError:
        pass
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def update_facts(root: Path, group: Group, facts: Facts) -> None:
    """Replace what is known about a group, by one rename; the caller holds the group's lock."""
    data = _seal(group.path.name, group.files, facts)
    temporary = Path(tempfile.mkdtemp(dir=root, prefix=f".new-{group.path.name}-"))
    try:
        (temporary / META).write_bytes(data)
        os.replace(temporary / META, group.path / META)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_group(root: Path, name: str) -> None:
    """Remove a group whole; the caller holds its lock. Links inside are removed, not followed."""
    _move_away(root, name)


def group_names(root: Path) -> list[str]:
    """Names of the groups, whole or broken; locks and leftovers are hidden."""
    try:
        return sorted(entry.name for entry in os.scandir(root) if not entry.name.startswith("."))
    except FileNotFoundError:
        return []


@contextmanager
def locked(root: Path, name: str, timeout: float = LOCK_TIMEOUT) -> Iterator[bool]:
    """Hold the lock of a group: against threads, processes and, where the file system can, hosts.

    One of 256 lock files is used, by the name's hash, so that none ever has to be removed. A lock
    ends with its process.

    Yields:
        False if somebody else held it for ``timeout`` seconds. Where the file system has no locks
        nobody can hold one: then two may do the same work.
    """
    stripe = hashlib.sha256(name.encode()).hexdigest()[:2]
    folder = root / LOCKS
    folder.mkdir(mode=0o700, exist_ok=True)
    lock = FileLock(folder / f"{stripe}.lock", timeout=timeout)
    free = True
    try:
        lock.acquire()
    except Timeout:
        free = False
        if timeout > 0:
            _LOGGER.warning("gave up waiting for the lock of %s after %g s", root / name, timeout)
    except (OSError, NotImplementedError) as error:
        _LOGGER.debug("no lock for %s: %s", root / name, error)
    try:
        yield free
    finally:
        if lock.is_locked:
            lock.release()


def collect_leftovers(root: Path, *, min_age: float = _LEFTOVER_AGE) -> list[str]:
    """Remove what killed writers left, if it is old and nobody holds the lock of its group.

    Args:
        min_age: seconds since the last change.
    Returns:
        Names of what was removed.
    """
    removed = []
    entries: list[Any] = list(os.scandir(root)) if root.is_dir() else []
    for entry in entries:
        found = _HIDDEN.match(entry.name)
        if found is None:
            continue
        try:
            age = time.time() - entry.stat(follow_symlinks=False).st_mtime
        except FileNotFoundError:
            continue
        if age < min_age:
            continue
        with locked(root, found["name"], timeout=0) as held:
            if held:
                _discard(Path(entry.path))
                removed.append(entry.name)
    return removed


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
