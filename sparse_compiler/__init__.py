"""Long prompts made cheap: ``torch.compile(model, backend="minference")``.

The public surface, loaded on first use: importing this package touches neither CUDA nor Triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_compiler.backend import minference
    from sparse_compiler.explanation import explain
    from sparse_compiler.integrations.transformers import compile, restore
    from sparse_compiler.rewriting import rewrite
    from sparse_compiler.site_stats import stats

__all__ = ["__version__", "compile", "explain", "minference", "restore", "rewrite", "stats"]

__version__ = "0.1.0"

_HOMES = {
    "compile": "sparse_compiler.integrations.transformers",
    "explain": "sparse_compiler.explanation",
    "minference": "sparse_compiler.backend",
    "restore": "sparse_compiler.integrations.transformers",
    "rewrite": "sparse_compiler.rewriting",
    "stats": "sparse_compiler.site_stats",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
