"""Generated sources on disk: written once, checked at every load, imported by path.

``@triton.jit`` functions must live in a file, and a person should be able to read that file. The
name of a file is a hash of its text and of the environment that compiles it, so nobody chooses a
key, and a file whose text is not the expected one is simply written again. What Triton compiles
from a source lies beside it (``triton_binaries``).
"""

from __future__ import annotations

import hashlib
import importlib.util
import linecache
import logging
import os
import sys
import threading
from dataclasses import fields
from functools import cached_property, lru_cache
from importlib.machinery import SourceFileLoader
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import CodeType, ModuleType

from sparse_compiler.codegen.emit import emit
from sparse_compiler.codegen.spec import KernelSpec
from sparse_compiler.config import cache_directory, shared_cache_directory
from sparse_compiler.runtime.cache_directory import is_private, trusted_directory
from sparse_compiler.runtime.cache_group import (
    Group,
    GroupBroken,
    SourceFacts,
    collect_leftovers,
    locked,
    publish,
    read_group,
    update_facts,
)
from sparse_compiler.runtime.requester import current_site

__all__ = ["BINARIES", "SOURCES", "KernelCache", "environment", "is_private", "load_kernels"]

_LOGGER = logging.getLogger(__name__)

#: Directories of a cache: generated modules, and what Triton compiled from them.
SOURCES = "kernels"
BINARIES = "binaries"
_MAX_SITES = 32


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


class KernelCache:
    """A directory of generated modules and compiled kernels.

    Args:
        directory: where files go; None is ``config.cache_directory()``. A directory that others
            could change (see ``cache_directory``) or that cannot be written is not used: a private
            temporary one takes its place, with a warning.
        shared: a team's cache, read and never written, from which compiled kernels are copied;
            None is ``config.shared_cache_directory()``.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        shared: str | os.PathLike[str] | None = None,
    ) -> None:
        self._wanted = Path(directory) if directory is not None else None
        self._shared = Path(shared) if shared is not None else None
        self._modules: dict[str, ModuleType] = {}
        self._asked: set[tuple[str, str]] = set()
        self.by_spec: dict[KernelSpec, ModuleType] = {}
        self.lock = threading.RLock()

    @cached_property
    def directory(self) -> Path:
        """The directory in use, without symbolic links; created and checked on first use."""
        return trusted_directory(self._wanted or cache_directory()).path

    @cached_property
    def sources(self) -> Path:
        """Where generated modules go."""
        found = trusted_directory(self.directory / SOURCES).path
        collect_leftovers(found)
        return found

    @cached_property
    def binaries(self) -> Path:
        """Where compiled kernels go."""
        found = trusted_directory(self.directory / BINARIES).path
        collect_leftovers(found)
        return found

    def key(self, text: str) -> str:
        """sha256 over text and environment, hexadecimal."""
        return hashlib.sha256(f"{environment()}\n{text}".encode()).hexdigest()

    def path(self, name: str, text: str) -> Path:
        """Where ``text`` lives; ``name`` only helps a person who lists the directory."""
        group = f"{name}_{self.key(text)[:32]}"
        return self.sources / group / f"{group}.py"

    def load(self, name: str, text: str, spec: KernelSpec | None = None) -> ModuleType:
        """The module with this source; written if absent or changed on disk.

        Args:
            name: prefix of the file, a Python identifier.
            text: complete source.
            spec: what it was emitted from; written beside it.
        """
        key = self.key(text)
        module = self._modules.get(key)
        if module is None:
            path = self.path(name, text)
            _ensure(path, text, spec)
            module = _import(path, text)
            self._place_binaries(module, path.stem)
            self._modules[key] = module
        return module

    def note_site(self, module: ModuleType) -> None:
        """Write down that the asking site (``requester``) uses this module; once per process."""
        site = current_site()
        if not site:
            return
        path = Path(module.__file__ or "")
        if (path.stem, site) in self._asked:
            return
        self._asked.add((path.stem, site))
        _add_site(path, site)

    def _place_binaries(self, module: ModuleType, kernel: str) -> None:
        if "triton" not in sys.modules:  # the source does not use it
            return
        from sparse_compiler.runtime.triton_binaries import place_binaries

        place_binaries(module, kernel, self.binaries, self._shared or shared_cache_directory())


def load_kernels(cache: KernelCache, spec: KernelSpec) -> ModuleType:
    """The kernels of ``spec``; rendered, written and imported once per cache and process."""
    module = cache.by_spec.get(spec)
    if module is None:
        with cache.lock:
            module = cache.by_spec.get(spec)
            if module is None:
                module = cache.load(spec.template.partition(".")[0], emit(spec), spec)
                cache.by_spec[spec] = module
    cache.note_site(module)
    return module


def _ensure(path: Path, text: str, spec: KernelSpec | None) -> None:
    """Make the group of ``path`` hold exactly ``text``, whoever else is at it."""
    root, name = path.parent.parent, path.parent.name
    files = {path.name: text.encode()}
    if _holds(root, name, files) == "":
        return
    with locked(root, name):
        problem = _holds(root, name, files)
        if problem == "":
            return
        if problem is not None:
            _LOGGER.warning(
                "generated kernel %s was changed on disk (%s); written again", path, problem
            )
        publish(root, name, files, _facts(spec))


def _holds(root: Path, name: str, files: dict[str, bytes]) -> str | None:
    """Empty if the group has these files, None if there is none, else what is wrong with it."""
    try:
        group = read_group(root, name)
    except GroupBroken as error:
        return str(error)
    if group is None:
        return None
    return "" if group.files == files else "it holds another text"


def _facts(spec: KernelSpec | None) -> SourceFacts:
    if spec is None:
        return SourceFacts(environment())
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    plain = {
        name: value if isinstance(value, bool | int | float | str) else repr(value)
        for name, value in values.items()
    }
    return SourceFacts(environment(), spec.template, plain)


def _add_site(path: Path, site: str) -> None:
    """Add to what is known about a source; a group that is gone or broken is left alone."""
    root, name = path.parent.parent, path.parent.name
    try:
        with locked(root, name):
            group: Group | None = read_group(root, name)
            if group is None or not isinstance(group.facts, SourceFacts):
                return
            sites = group.facts.sites
            if site not in sites and len(sites) < _MAX_SITES:
                known = tuple(sorted((*sites, site)))
                facts = SourceFacts(
                    group.facts.environment, group.facts.template, group.facts.spec, known
                )
                update_facts(root, group, facts)
    except (GroupBroken, OSError) as error:
        _LOGGER.debug("the site %s was not written down: %s", site, error)


class _Loader(SourceFileLoader):
    """Runs a text that was checked, not what the file holds by now, and no bytecode file."""

    def __init__(self, name: str, path: str, text: str) -> None:
        super().__init__(name, path)
        self._text = text

    def get_data(self, path: str) -> bytes:
        return self._text.encode()

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._text.encode(), self.path)


def _import(path: Path, text: str) -> ModuleType:
    name = f"sparse_compiler_generated.{path.stem}"
    loader = _Loader(name, str(path), text)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import generated kernel {path}")
    module = importlib.util.module_from_spec(spec)
    # Triton reads a function's source through inspect and linecache: it gets the same text. An
    # entry without a time is never compared with the disk.
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    # Triton and inspect look a function's module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
