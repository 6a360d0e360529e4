"""One class per mistake; every message says subject, requirement, both values, where, what to do."""

from __future__ import annotations

__all__ = [
    "CacheUnsafe",
    "CheckpointCorrupt",
    "ConfigCorrupt",
    "ExecutorUnavailable",
    "ExpressionInvalid",
    "GraphInvariantBroken",
    "OptionInvalid",
    "PatternInvalid",
    "PluginFailed",
    "PromptInvalid",
    "ShapeMismatch",
    "SiteDeclined",
    "SparseCompilerError",
    "TensorInvalid",
]


class SparseCompilerError(Exception):
    """Base of every error that this package raises on purpose.

    Args:
        subject: what is wrong, e.g. ``option 'budget'``.
        requirement: what is allowed, e.g. ``a number with 0 < budget <= 1``.
        got: what was given; shown with ``repr``.
        where: file, layer, node or argument; empty if obvious.
        fix: what the reader should do about it.
    """

    def __init__(
        self, subject: str, requirement: str, got: object, *, where: str = "", fix: str = ""
    ) -> None:
        self.subject = subject
        self.requirement = requirement
        self.got = got
        self.where = where
        self.fix = fix
        text = f"{subject} must be {requirement}, but got {got!r}"
        if where:
            text += f" ({where})"
        if fix:
            text += f". {fix}"
        super().__init__(text)


class OptionInvalid(SparseCompilerError, ValueError):
    """An option of the backend has an unknown key, a wrong type or an impossible value."""


class ConfigCorrupt(SparseCompilerError, ValueError):
    """A per-head configuration file cannot be read as the published format."""


class PatternInvalid(SparseCompilerError, ValueError):
    """A pattern name or its parameters are not usable."""


class PluginFailed(SparseCompilerError, RuntimeError):
    """A plug-in raised, or returned what its kind must not; names it and its package."""


class ShapeMismatch(SparseCompilerError, ValueError):
    """Two shapes that must agree do not."""


class TensorInvalid(SparseCompilerError, TypeError):
    """A tensor has a dtype, device or layout that the called operator does not take."""


class ExecutorUnavailable(SparseCompilerError, RuntimeError):
    """An executor was asked for by name and cannot run here."""


class SiteDeclined(SparseCompilerError, RuntimeError):
    """A site was declined with an unexpected code while ``fallback='error'``."""


class GraphInvariantBroken(SparseCompilerError, AssertionError):
    """A pass broke a promise that the manager checks; always a bug of a pass."""


class CacheUnsafe(SparseCompilerError, RuntimeError):
    """A cache directory cannot be trusted or written."""


class CheckpointCorrupt(SparseCompilerError, RuntimeError):
    """A checkpoint is missing, truncated or not the one that its record names."""


class PromptInvalid(SparseCompilerError, ValueError):
    """A prompt cannot be built as asked, e.g. more records than it has room for."""


class ExpressionInvalid(SparseCompilerError, ValueError):
    """A tensor expression contradicts itself: its statements, its reductions or its axes."""
