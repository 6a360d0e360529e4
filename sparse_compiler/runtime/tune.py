"""``minference tune``: measure this device, fit the cost model's constants, keep them per user."""

from __future__ import annotations

import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock

from sparse_compiler.codegen.constants import DENSE, Constants, shipped
from sparse_compiler.codegen.resources import Resources
from sparse_compiler.config import cache_directory
from sparse_compiler.runtime.tune_fit import Fit, Sample, fit_constants

__all__ = ["FORMAT", "Loaded", "Tuning", "load_constants", "store", "tune", "tuning_path"]

_LOGGER = logging.getLogger(__name__)
FORMAT = 2
"""Of the file; counts up with every change of a constant's meaning."""
_PACKAGES = ("torch", "triton")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """One tuned device, as it is stored.

    Args:
        format: ``FORMAT`` when it was written.
        device: name of the device.
        versions: of the packages that generated code depends on.
        constants: fitted.
        reports: compilers' reports by ``key:size:dtype``, see ``choose_tile``.
        errors, worst: by tile, median and largest relative error of the fit.
        samples: what was measured, name -> [measured ms, predicted ms].
    """

    format: int
    device: str
    versions: dict[str, str]
    constants: Constants
    reports: dict[str, Resources] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)
    samples: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """Constants in use and where they come from.

    Args:
        code: ``TUNED`` (this user, this device, these versions), ``SHIPPED`` (measured by us on
            such a device) or ``ESTIMATE``.
        note: for people; "" where there is nothing to say.
        target: compilation target of such a device.
    """

    constants: Constants
    code: str
    note: str
    target: str
    reports: Mapping[str, Resources] = field(default_factory=dict)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def tuning_path(device: str, directory: Path | None = None) -> Path:
    """The file of a device, below the user's cache directory unless another is given."""
    name = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") or "device"
    return (directory or cache_directory() / "tuning") / f"{name}.json"


def store(tuning: Tuning, directory: Path | None = None) -> Path:
    """Write atomically; the last writer wins, a reader never sees a part.

    Raises:
        OSError: the directory cannot be written.
    """
    path = tuning_path(tuning.device, directory)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(msgspec.json.format(msgspec.json.encode(tuning), indent=1))
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
    return path


def load_constants(device: str, directory: Path | None = None) -> Loaded:
    """The constants for a device: tuned ones if they fit, else shipped ones; never fails.

    Args:
        device: its name, as ``torch.cuda.get_device_name`` gives it.
        directory: of tuning files; None is the user's.
    """
    entry = shipped(device)
    tuning = _read(tuning_path(device, directory), device)
    if tuning is not None:
        return Loaded(tuning.constants, "TUNED", "", entry.target, tuning.reports)
    constants = entry.constants
    reports = msgspec.convert(entry.reports, dict[str, Resources])
    if entry.measured:
        note = f"constants as shipped, measured on {constants.device} ({constants.origin})"
        return Loaded(constants, "SHIPPED", note, entry.target, reports)
    note = f"constants of {constants.device} are estimates ({constants.origin})"
    note += f"; {entry.note}" if entry.note else ""
    return Loaded(constants, "ESTIMATE", note, entry.target, reports)


def _read(path: Path, device: str) -> Tuning | None:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _LOGGER.warning("tuning file %s cannot be read (%s); shipped constants", path, error)
        return None
    try:
        head = msgspec.json.decode(text, type=dict[str, Any], strict=True)
        if head.get("format") != FORMAT or head.get("versions") != _versions():
            _LOGGER.info("tuning file %s is of other versions; run `minference tune` again", path)
            return None
        tuning = msgspec.json.decode(text, type=Tuning, strict=True)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        _LOGGER.warning("tuning file %s is broken (%s); shipped constants are used", path, error)
        return None
    wrong = _implausible(tuning, device)
    if wrong:
        _LOGGER.warning("tuning file %s is broken (%s); shipped constants are used", path, wrong)
        return None
    return tuning


def _implausible(tuning: Tuning, device: str) -> str:
    """What no fit can have written, or ""."""
    constants = asdict(tuning.constants)
    tiles = constants.pop("tiles")
    numbers = [v for v in constants.values() if isinstance(v, float | int)]
    numbers += [v for tile in tiles.values() for v in tile.values()]
    if tuning.device != device:
        return f"it is of device {tuning.device!r}, not {device!r}"
    if not all(math.isfinite(v) and v >= 0 for v in numbers):
        return "a constant is negative or not finite"
    if not any(constants[name] > 0 for name in ("score", "score_row", "score_start")):
        return "scoring rows costs nothing"
    if DENSE not in tiles or any(not sum(tile.values()) > 0 for tile in tiles.values()):
        return "a tile that costs nothing, or no dense tile"
    return ""


def tune(
    *,
    device: int = 0,
    quick: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Tuning:
    """Measure and fit one CUDA device.

    Args:
        device: its number.
        quick: the shortest lengths only; constants of cache misses then stay estimates.
        progress: called with (what is next, steps done, steps in all).
    Raises:
        ExecutorUnavailable: there is no such device, or it cannot run the generated kernels.
    """
    from sparse_compiler.runtime.tune_measure import Bench

    bench = Bench(device)
    samples: list[Sample] = []
    steps = bench.steps(quick=quick)
    with bench.current():
        start = bench.bandwidths(shipped(bench.name).constants)
        for done, (what, measure) in enumerate(steps):
            if progress is not None:
                progress(what, done, len(steps))
            samples += measure()
    if progress is not None:
        progress("fitting", len(steps), len(steps))
    fit = fit_constants(samples, start)
    constants = replace(
        fit.constants, device=bench.name, origin=f"minference tune, {len(samples)} measurements"
    )
    return _tuning(bench.name, Fit(constants, fit.errors, fit.worst), samples, bench.reports)


def _tuning(name: str, fit: Fit, samples: list[Sample], reports: Mapping[str, Resources]) -> Tuning:
    from sparse_compiler.codegen.cost import predict

    tiles = fit.constants.tiles
    compared = {
        f"{s.tile} {s.name}": (
            s.ms,
            sum(predict(fit.constants, tiles.get(s.tile, tiles[DENSE]), s.amounts).values()),
        )
        for s in samples
    }
    return Tuning(
        format=FORMAT,
        device=name,
        versions=_versions(),
        constants=fit.constants,
        reports=dict(reports),
        errors=dict(fit.errors),
        worst=dict(fit.worst),
        samples=compared,
    )
