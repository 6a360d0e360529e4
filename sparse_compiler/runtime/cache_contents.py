"""What a kernel cache holds: listing, verifying, clearing; imports and creates nothing."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from sparse_compiler.runtime.cache_directory import why_unsafe
from sparse_compiler.runtime.cache_group import (
    BinaryFacts,
    Group,
    GroupBroken,
    SourceFacts,
    collect_leftovers,
    group_names,
    locked,
    read_group,
    remove_group,
)
from sparse_compiler.runtime.kernel_cache import BINARIES, SOURCES

__all__ = ["Cleared", "Entry", "binaries_of", "clear", "contents", "obstacle"]


@dataclass(frozen=True)
class Entry:
    """One group of a cache.

    Args:
        kind: ``kernels`` for a generated module, ``binaries`` for what was compiled from one.
        name: of the group.
        path: of its directory.
        size: bytes of its files, whole or not.
        modified: seconds since the epoch.
        group: its content, checked; None if it is broken.
        problem: what is wrong with it; empty if nothing is.
    """

    kind: str
    name: str
    path: Path
    size: int
    modified: float
    group: Group | None
    problem: str

    @property
    def text(self) -> str:
        """The generated source; empty for binaries and broken groups."""
        if self.kind != SOURCES or self.group is None:
            return ""
        return self.group.files.get(f"{self.name}.py", b"").decode("utf-8", errors="replace")


@dataclass(frozen=True)
class Cleared:
    """What ``clear`` did: names removed, and names kept because somebody holds their lock."""

    removed: tuple[str, ...]
    kept: tuple[str, ...]


def obstacle(directory: Path) -> str:
    """Why kernels would not be kept in ``directory``; empty if they would or if it is absent."""
    for path in (directory, directory / SOURCES, directory / BINARIES):
        try:
            problem = why_unsafe(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            return str(error)
        if problem:
            return problem
    return ""


def contents(directory: Path, *, lock_timeout: float = 10.0) -> list[Entry]:
    """Every group of a cache, sources first; all sums are checked.

    Args:
        lock_timeout: seconds to wait for a writer before a group that looks broken counts so.
    """
    return [
        _entry(directory / kind, kind, name, lock_timeout)
        for kind in (SOURCES, BINARIES)
        for name in group_names(directory / kind)
    ]


def binaries_of(entries: list[Entry]) -> dict[str, list[BinaryFacts]]:
    """Name of a source -> what is known about the kernels compiled from it, launchers left out."""
    found: defaultdict[str, list[BinaryFacts]] = defaultdict(list)
    for entry in entries:
        facts = None if entry.group is None else entry.group.facts
        if isinstance(facts, BinaryFacts) and facts.function and facts not in found[facts.kernel]:
            found[facts.kernel].append(facts)
    return dict(found)


def clear(directory: Path, *, lock_timeout: float = 5.0) -> Cleared:
    """Remove every group and leftover, each under its lock; links are removed, never followed."""
    removed, kept = [], []
    for kind in (SOURCES, BINARIES):
        root = directory / kind
        if root.is_symlink():
            continue
        for name in group_names(root):
            with locked(root, name, timeout=lock_timeout) as free:
                if free:
                    remove_group(root, name)
                (removed if free else kept).append(name)
        collect_leftovers(root, min_age=0.0)
    return Cleared(tuple(removed), tuple(kept))


def _entry(root: Path, kind: str, name: str, lock_timeout: float) -> Entry:
    group, problem = _look(root, kind, name)
    if problem:  # perhaps a writer is at it
        with locked(root, name, timeout=lock_timeout):
            group, problem = _look(root, kind, name)
    path = root / name
    size, modified = _measure(path)
    return Entry(kind, name, path, size, modified, group, problem)


def _look(root: Path, kind: str, name: str) -> tuple[Group | None, str]:
    try:
        group = read_group(root, name)
    except GroupBroken as error:
        return None, str(error)
    if group is None:
        return None, "it is gone"
    expected = SourceFacts if kind == SOURCES else BinaryFacts
    if not isinstance(group.facts, expected):
        return None, "it is of another kind"
    if isinstance(group.facts, SourceFacts):
        text = group.files.get(f"{name}.py", b"")
        key = hashlib.sha256(f"{group.facts.environment}\n".encode() + text).hexdigest()
        if name.rpartition("_")[2] != key[:32]:
            return None, "its name is not the hash of its text"
    return group, ""


def _measure(path: Path) -> tuple[int, float]:
    """(bytes, last change) of a group's own files; links count as themselves."""
    try:
        status = path.lstat()
        files = [] if path.is_symlink() or not path.is_dir() else list(os.scandir(path))
        size = sum(entry.stat(follow_symlinks=False).st_size for entry in files)
    except FileNotFoundError:
        return 0, 0.0
    return size, status.st_mtime
