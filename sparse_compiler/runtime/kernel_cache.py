"""Generated sources on disk: written once, checked at every load, imported by path.

``@triton.jit`` functions must live in a file, and a person should be able to read that file. The
name of a file is a hash of its text and of the environment that compiles it, so nobody chooses a
key, and a file whose text is not the expected one is simply written again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import stat
import sys
import tempfile
from functools import lru_cache
from importlib.machinery import SourceFileLoader
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import CodeType, ModuleType

import platformdirs
from filelock import FileLock

from sparse_compiler.codegen.emit import emit
from sparse_compiler.codegen.spec import KernelSpec

__all__ = ["KernelCache", "environment", "is_private", "load_kernels"]

_LOGGER = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def environment() -> str:
    """Versions that a compiled kernel depends on, e.g. ``torch 2.13.0, triton 3.6.0``."""
    parts = []
    for name in ("torch", "triton"):
        try:
            parts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            parts.append(f"{name} none")
    return ", ".join(parts)


def is_private(directory: Path) -> bool:
    """Whether only this user can put files there: code is imported from it."""
    try:
        status = directory.stat()
    except OSError:
        return False
    if not stat.S_ISDIR(status.st_mode):
        return False
    if not hasattr(os, "getuid"):  # Windows: the user's profile is private by its access list
        return True
    others = stat.S_IWGRP | stat.S_IWOTH
    return status.st_uid == os.getuid() and not status.st_mode & others


class KernelCache:
    """A directory of generated modules.

    Args:
        directory: where files go; None is the user's cache directory. A directory that belongs to
            another user, can be written by others or cannot be created is not used: a private
            temporary one takes its place, with a warning.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        default = Path(platformdirs.user_cache_dir("sparse_compiler")) / "kernels"
        self._wanted = Path(directory) if directory is not None else default
        self._directory: Path | None = None
        self._modules: dict[str, ModuleType] = {}
        self.by_spec: dict[KernelSpec, ModuleType] = {}

    @property
    def directory(self) -> Path:
        """The directory in use; created and checked on first use."""
        if self._directory is None:
            self._directory = _usable(self._wanted)
        return self._directory

    def key(self, text: str) -> str:
        """sha256 over text and environment, hexadecimal."""
        return hashlib.sha256(f"{environment()}\n{text}".encode()).hexdigest()

    def path(self, name: str, text: str) -> Path:
        """Where ``text`` lives; ``name`` only helps a person who lists the directory."""
        return self.directory / f"{name}_{self.key(text)[:32]}.py"

    def load(self, name: str, text: str) -> ModuleType:
        """The module with this source; written if absent or changed on disk.

        Args:
            name: prefix of the file, a Python identifier.
            text: complete source.
        """
        key = self.key(text)
        module = self._modules.get(key)
        if module is None:
            path = self.path(name, text)
            _ensure(path, text)
            module = _import(path)
            self._modules[key] = module
        return module


def load_kernels(cache: KernelCache, spec: KernelSpec) -> ModuleType:
    """The kernels of ``spec``; rendered, written and imported once per cache and process."""
    module = cache.by_spec.get(spec)
    if module is None:
        module = cache.load(spec.template.partition(".")[0], emit(spec))
        cache.by_spec[spec] = module
    return module


def _usable(wanted: Path) -> Path:
    try:
        wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = "" if is_private(wanted) else "it is not owned by this user or others can write"
        if not problem and not os.access(wanted, os.W_OK | os.X_OK):
            problem = "it cannot be written"
    except OSError as error:
        problem = str(error)
    if not problem:
        return wanted
    private = Path(tempfile.mkdtemp(prefix="sparse_compiler_"))
    _LOGGER.warning("kernel cache %s is not used (%s); using %s", wanted, problem, private)
    return private


def _ensure(path: Path, text: str) -> None:
    """Make ``path`` hold exactly ``text``, without a moment in which it holds part of it."""
    if _read(path) == text:
        return
    with FileLock(f"{path}.lock"):
        found = _read(path)
        if found == text:
            return
        if found is not None:
            _LOGGER.warning("generated kernel %s was changed on disk; written again", path)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
                stream.write(text)
            os.replace(temporary, path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return None


class _Loader(SourceFileLoader):
    """Never uses bytecode files: theirs are matched by whole seconds, too coarse for a rewrite."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _import(path: Path) -> ModuleType:
    name = f"sparse_compiler_generated.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_Loader(name, str(path)))
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import generated kernel {path}")
    module = importlib.util.module_from_spec(spec)
    # Triton and inspect look a function's module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
