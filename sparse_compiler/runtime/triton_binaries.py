"""What Triton compiles from our sources lies in our cache; the user's own kernels stay where they are.

Triton writes the files of a compiled kernel one by one into a directory of its own, which it does
not check for its owner and which other packages move about during a process. Two processes that
compile at once can leave the metadata of one beside the code of the other. So while one of *our*
functions compiles, and for that thread alone, another cache manager is in force: files appear as
one group (``cache_group``), under a lock, and are checked by sha256 before they are used.

A cache manager that the user chose (``TRITON_CACHE_MANAGER``) is respected: then nothing is done.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.cache import CacheManager, FileCacheManager
from triton.runtime.jit import JITFunction

from sparse_compiler.runtime.cache_directory import why_unsafe
from sparse_compiler.runtime.cache_group import (
    BinaryFacts,
    Group,
    GroupBroken,
    locked,
    publish,
    read_group,
)

__all__ = ["Place", "place_binaries", "place_of", "placing"]

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where the binaries of one source go.

    Args:
        kernel: name of the source's group.
        root: directory of the groups.
        shared: root of a team's cache, read only; None for none.
    """

    kernel: str
    root: Path
    shared: Path | None = None


@dataclass
class _Compilation:
    place: Place
    stack: ExitStack = field(default_factory=ExitStack)

    def hold(self, key: str) -> None:
        """Hold the lock of this group, and of no other: two could wait for each other."""
        self.stack.close()
        self.stack.enter_context(locked(self.place.root, key))

    def scratch(self, key: str) -> Path:
        found = Path(tempfile.mkdtemp(dir=self.place.root, prefix=f".new-{key}-"))
        self.stack.callback(shutil.rmtree, found, ignore_errors=True)
        return found


_active: ContextVar[_Compilation | None] = ContextVar("sparse_compiler_binaries", default=None)
_lock = threading.Lock()
_depth = 0


def _manager(key: str, override: bool = False, dump: bool = False) -> CacheManager:
    compilation = _active.get()
    if compilation is None or override or dump:
        return FileCacheManager(key, override=override, dump=dump)
    return _GroupManager(key, compilation)


@contextmanager
def placing(place: Place) -> Iterator[None]:
    """What this thread compiles in the block goes to ``place``; other threads see no difference."""
    global _depth
    with _lock:
        chosen = knobs.cache.manager_class
        theirs = chosen is not None and chosen is not _manager
        if not theirs:
            knobs.cache.manager_class = _manager  # type: ignore[assignment]
            _depth += 1
    if theirs:
        yield
        return
    compilation = _Compilation(place)
    token = _active.set(compilation)
    try:
        yield
    finally:
        _active.reset(token)
        compilation.stack.close()
        with _lock:
            _depth -= 1
            if _depth == 0 and knobs.cache.__dict__.get("manager_class") is _manager:
                del knobs.cache.manager_class


class _GroupManager(CacheManager):
    """Triton's view of one group; ``key`` is its hash of source, options and environment."""

    def __init__(self, key: str, compilation: _Compilation) -> None:
        self._key = key
        self._compilation = compilation
        self._place = compilation.place
        self._scratch: Path | None = None
        self._grouped = False

    def get_group(self, filename: str) -> dict[str, str] | None:
        self._grouped = True
        group = self._find(filename, shared=True)
        if group is None:
            return None
        return {name: str(group.path / name) for name in group.files}

    def get_file(self, filename: str) -> str | None:
        if self._scratch is not None and (self._scratch / filename).exists():
            return str(self._scratch / filename)
        # A launcher is code of the host: not from a team's cache.
        group = self._find(filename, shared=False)
        return None if group is None else str(group.path / filename)

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        content = data if isinstance(data, bytes) else str(data).encode()
        if not self._grouped:
            facts = BinaryFacts(self._place.kernel)
            return str(publish(self._place.root, self._key, {filename: content}, facts) / filename)
        if self._scratch is None:
            self._scratch = self._compilation.scratch(self._key)
        path = self._scratch / filename
        path.write_bytes(content)
        return str(path)

    def put_group(self, filename: str, group: dict[str, str]) -> None:
        files = {name: Path(path).read_bytes() for name, path in group.items()}
        facts = _binary_facts(self._place.kernel, json.loads(files[filename]), files)
        path = publish(self._place.root, self._key, files, facts)
        # Triton reads the files of this very dictionary next; the scratch directory goes away.
        group.update({name: str(path / name) for name in files})
        self._compilation.stack.close()

    def _find(self, filename: str, *, shared: bool) -> Group | None:
        """The group, from here or copied from the team's cache; else its lock is held."""
        root = self._place.root
        found = _whole(root, self._key, filename)
        if found is not None:
            return found
        self._compilation.hold(self._key)
        found = _whole(root, self._key, filename, complain=True)
        if found is None and shared:
            found = self._from_team(filename)
        if found is not None:
            self._compilation.stack.close()
        return found

    def _from_team(self, filename: str) -> Group | None:
        team = self._place.shared
        if team is None or not _team_trusted(team):
            return None
        theirs = _whole(team, self._key, filename, complain=True)
        if theirs is None or any(Path(name).suffix in (".so", ".pyd") for name in theirs.files):
            return None
        # Copied, then used: what was checked is what runs, whatever happens over there.
        publish(self._place.root, self._key, theirs.files, theirs.facts)
        return _whole(self._place.root, self._key, filename)


def _whole(root: Path, key: str, filename: str, *, complain: bool = False) -> Group | None:
    try:
        group = read_group(root, key)
    except GroupBroken as error:
        if complain:
            _LOGGER.warning("compiled kernel %s is not used: %s", root / key, error)
        return None
    return group if group is not None and filename in group.files else None


@cache
def _team_trusted(team: Path) -> bool:
    """Whether only the directory's owner, root and the user can change it; said once if not."""
    try:
        problem = why_unsafe(team, trust_owner=True)
    except OSError as error:
        problem = str(error)
    if problem:
        _LOGGER.warning("shared kernel cache %s is not used: %s", team, problem)
    return not problem


def _binary_facts(kernel: str, metadata: Mapping[str, Any], files: dict[str, bytes]) -> BinaryFacts:
    target = metadata.get("target") or {}
    registers, stack = _resources(files)
    return BinaryFacts(
        kernel=kernel,
        function=str(metadata.get("name", "")),
        target=f"{target.get('backend', '?')}:{target.get('arch', '?')}",
        shared=int(metadata.get("shared", -1)),
        registers=registers,
        stack=stack,
    )


def _resources(files: Mapping[str, bytes]) -> tuple[int, int]:
    """(registers, stack bytes) of a thread, from the machine code; -1 where nothing tells."""
    for name, content in files.items():
        if name.endswith(".cubin"):
            return _cubin_resources(content)
        if name.endswith(".amdgcn"):
            registers = re.search(rb"\.vgpr_count:\s+(\d+)", content)
            stack = re.search(rb"\.private_segment_fixed_size:\s+(\d+)", content)
            return (
                int(registers[1]) if registers else -1,
                int(stack[1]) if stack else -1,
            )
    return -1, -1


def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    try:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as stream:
            stream.write(cubin)
            stream.flush()
            command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", stream.name]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _LOGGER.debug("no resource report: %s", error)
        return -1, -1
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else (-1, -1)


def place_binaries(module: ModuleType, kernel: str, root: Path, shared: Path | None = None) -> None:
    """From now on the functions of ``module`` keep what they compile in ``root``.

    Args:
        module: a generated module; functions that Triton interprets are left alone.
        kernel: name of the source's group.
        shared: directory of a team's cache; its binaries are copied where they fit.
    """
    team = None if shared is None else shared / root.name
    place = Place(kernel, root, team)
    for value in list(vars(module).values()):
        if isinstance(value, JITFunction):
            _place(value, place)


def _place(function: Any, place: Place) -> None:
    """Wrap the step that runs only when a launch finds nothing in memory: no launch pays for it."""
    compile_now = getattr(function, "_do_compile", None)
    if compile_now is None:
        _LOGGER.warning("this Triton compiles in another way: its binaries stay in its own cache")
        return

    def compile_in_place(*args: Any, **kwargs: Any) -> Any:
        warmup = kwargs.get("warmup", args[6] if len(args) > 6 else True)
        with placing(place):
            compiled = compile_now(*args, **kwargs)
            if isinstance(compiled, CompiledKernel) and not warmup:
                # Builds the launcher too, host code that belongs here for the same reasons.
                compiled._init_handles()
        return compiled

    function._do_compile = compile_in_place
    function._sparse_compiler_place = place


def place_of(function: Any) -> Place:
    """Where ``place_binaries`` put this function's binaries.

    Raises:
        AttributeError: the function is not of a module that a kernel cache loaded.
    """
    return function._sparse_compiler_place
