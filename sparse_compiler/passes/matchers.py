"""The spellings of attention that are read, and how plug-ins add theirs.

A matcher looks at one node and answers with the ``AttentionForm`` of an attention whose last, or only,
characteristic operation it is, or None. The first matcher that answers wins; plug-ins are asked before
the built-in ones, so that they may read better what a general matcher declines.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import entry_points

from torch import fx

from sparse_compiler.passes.flex import match_flex
from sparse_compiler.passes.form import AttentionForm
from sparse_compiler.passes.opaque import match_opaque
from sparse_compiler.passes.sdpa import match_sdpa
from sparse_compiler.passes.softmax_chain import match_softmax_chain
from sparse_compiler.passes.symbolic_tensor import SymbolicTensors

__all__ = ["ENTRY_POINT_GROUP", "Matcher", "matcher", "matchers"]

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "sparse_compiler.matchers"

Matcher = Callable[[fx.Node, SymbolicTensors], AttentionForm | None]

_BUILT_IN: tuple[Matcher, ...] = (match_opaque, match_flex, match_sdpa, match_softmax_chain)
_added: list[Matcher] = []
_loaded = False


def matcher(function: Matcher) -> Matcher:
    """Register a matcher; usable as a decorator."""
    if function not in _added:
        _added.append(function)
    return function


def matchers() -> tuple[Matcher, ...]:
    """All matchers in the order in which they are asked."""
    global _loaded
    if not _loaded:
        _loaded = True
        for entry in entry_points(group=ENTRY_POINT_GROUP):
            matcher(entry.load())
            logger.debug("matcher %s of %s", entry.name, entry.value)
    return (*_added, *_BUILT_IN)
