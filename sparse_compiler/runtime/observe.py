"""A place for one watcher of every sparse attention call: offline search looks at q, k and v here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from sparse_compiler.ir.index import Geometry

__all__ = ["AttentionCall", "attended", "observing", "selected"]


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of ``attend`` with all operands and its result.

    Args:
        params: int32 [Hq, 5], of the ``select`` before it; None if there was none.
        q, k, v: [B, Hq, Lq, D], [B, Hkv, Lk, D], [B, Hkv, Lk, Dv].
        geometry: band of the mask and blocking.
        scale, softcap: of the logits.
        rows: int32 [B, 5].
        key_mask, bounds, bias, sinks: as in ``ops``, or None.
        banded: heads of band patterns hold band slots: the mask is causal, with nothing by row.
        executor: name of the one that ran.
        out, lse: what the call returns.
    """

    params: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    geometry: Geometry
    scale: float
    softcap: float
    rows: Tensor
    key_mask: Tensor | None
    bounds: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    banded: bool
    executor: str
    out: Tensor
    lse: Tensor


Watcher = Callable[[AttentionCall], Tensor | None]

_watcher: ContextVar[tuple[Watcher, dict[int, Tensor]] | None] = ContextVar(
    "sparse_compiler_watcher", default=None
)


@contextmanager
def observing(watcher: Watcher) -> Iterator[None]:
    """Show every sparse call of the block to ``watcher``, but not the calls that it makes itself.

    ``watcher``: may return another output, which the model then goes on with.
    """
    token = _watcher.set((watcher, {}))
    try:
        yield
    finally:
        _watcher.reset(token)


def selected(site: int, params: Tensor) -> None:
    """Note the parameters with which a site selects; does nothing where nobody watches."""
    watching = _watcher.get()
    if watching is not None:
        watching[1][site] = params


def attended(site: int, make: Callable[[Tensor | None], AttentionCall], out: Tensor) -> Tensor:
    """Show a call, made only where somebody watches; the output to go on with."""
    watching = _watcher.get()
    if watching is None:
        return out
    watcher, params = watching
    token = _watcher.set(None)
    try:
        other = watcher(make(params.pop(site, None)))
    finally:
        _watcher.reset(token)
    return out if other is None else other
