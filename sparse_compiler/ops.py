"""The custom operators of the rewritten graph: schemas, fakes, and a place for implementations.

Three operators take the place of one attention:

``summarize_keys``  k -> summary. What selection needs of the keys: the mean of each ``group`` of
    neighbours; append-only, per KV head, so that chunked prefill pays for a key once. Empty
    (``group`` 0) when no head's pattern needs it.
``select``          q, k, summary, parameters -> the index (see ``ir/index.py``).
``attend``          q, k, v, index -> (out, lse).

Nothing here waits for the device: capacities come from shapes and from the static arguments.
Parameters of patterns are data ([Hq, 5] int32: pattern id, first, second, band slot, block slot),
so that one graph can serve several layers. ``min_tokens``: with fewer keys than this the index is
not built and ``attend`` computes dense attention; the choice is made from sizes at run time, since
a graph with dynamic shapes serves short and long prompts.

What an index list holds past its count is undefined. CUDA graphs leave the operators out: statistics
outlive a call.

Arguments shared by the operators; ``summarize_keys`` takes of the mask ``rows`` and ``key_mask`` only
    rows: int32 [B, 5] on the device, or None: (q_start, q_len, q_offset, kv_start, kv_len) of each
        batch entry. None means all rows and keys, ``q_offset`` from the argument of that name.
    key_mask: bool [B, Lk] or None; False hides a key from every row (padding).
    bounds: int32 [B or 1, Lq, 2] or None: (low, high), the inclusive key addresses between which a
        query row sees; low > high is a row that sees nothing. Packed documents, chunks, prefixes.
    bias: floating tensor or None, added to the logits after scale and soft cap. Of rank 4,
        [B or 1, Hq or 1, Lq or 1, Lk]; or a table by distance, [Hq or 1, Lq + Lk - 1], whose entry
        ``j - i + Lq - 1`` belongs to query address i and key address j. -inf hides a pair.
    q_offset, left, right: the mask's band (``ir/mask.py``); -1 is unbounded for left and right.
        A pair is visible where the band, rows, key_mask and bounds all allow it.
    sinks: floating [Hq] or None, of ``attend``: one more logit of each head, which takes part in the
        softmax and has no value. A row that sees no key gives 0, and the sink as lse.
    block_q, block_k: row and key block (M, N).
    budget: share of the allowed pairs to aim at; -1 uses the parameters, 1 means every pair.
    executor: name of the executor, or ``auto``.
    site: number under which statistics are kept; -1 keeps none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_compiler.ir.index import capacity_blocks

__all__ = ["capacities", "set_implementation"]

_LIBRARY = torch.library.Library("sparse_compiler", "DEF")
_BAND = (
    "Tensor? rows, Tensor? key_mask, Tensor? bounds, Tensor? bias, "
    "SymInt q_offset, SymInt left, SymInt right"
)
_BLOCKS = "int block_q, int block_k"
_CHOICE = "float budget, SymInt min_tokens, str executor, int site"
_INDEX = (
    "Tensor full, Tensor num_full, Tensor edge, Tensor edge_len, Tensor num_edge, "
    "Tensor columns, Tensor num_columns, Tensor covered, Tensor blocks, Tensor num_blocks, "
    "Tensor slots"
)

_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
_LIBRARY.define(
    f"summarize_keys(Tensor k, Tensor? rows, Tensor? key_mask, int group, {_CHOICE}) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    f"select(Tensor q, Tensor k, Tensor summary, Tensor params, {_BAND}, float scale, {_BLOCKS}, "
    "int[] pattern_ids, int[] num_slots, int[] limits, "
    f"{_CHOICE}) -> ({', '.join(['Tensor'] * 11)})",
    tags=_TAGS,
)
_LIBRARY.define(
    f"attend(Tensor q, Tensor k, Tensor v, {_INDEX}, {_BAND}, float scale, float softcap, "
    f"Tensor? sinks, {_BLOCKS}, {_CHOICE}) -> (Tensor, Tensor)",
    tags=_TAGS,
)

_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def set_implementation(name: str, function: Callable[..., Any]) -> None:
    """Install what ``sparse_compiler::name`` runs; called once by ``runtime.dispatch``."""
    _IMPLEMENTATIONS[name] = function


def _caller(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if name not in _IMPLEMENTATIONS:
            raise RuntimeError(
                f"sparse_compiler::{name} has no implementation yet: "
                "import sparse_compiler.runtime.dispatch first"
            )
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):
            return _IMPLEMENTATIONS[name](*args, **kwargs)
        # Outside of a compiled graph autocast would reach into what estimators compute in float32.
        with torch.autocast(device, enabled=False):
            return _IMPLEMENTATIONS[name](*args, **kwargs)

    return call


for _name in ("summarize_keys", "select", "attend"):
    _LIBRARY.impl(_name, _caller(_name), "CompositeExplicitAutograd")


def capacities(
    num_q: Any, num_k: Any, q_offset: Any, block_q: int, block_k: int, limits: list[int]
) -> tuple[Any, Any, Any, Any, Any]:
    """Sizes (F, E, C, X, K) of the index lists, from sizes known to the host.

    Args:
        num_q, num_k, q_offset: ints or SymInts.
        limits: [columns, distances, blocks]; the most that any head may ask for, -1 for no limit;
            blocks may grow with the length (``ir.index.AUTOMATIC``).
    Returns:
        full tiles, edge tiles, columns, distance space, key blocks per row block.

    A set of s distances covers at most min(s * M, X) of X distances in at most s ranges; a range of
    r distances makes at most r / N whole tiles and one partial tile. Tiles that touch the diagonal
    or the window's far end are tested: at most (2 * M + N) / N of those beside one for each range.
    """
    max_columns, max_distances, max_blocks = limits
    distances = q_offset + -(-num_q // block_q) * block_q + 1
    whole = distances // block_k + 1
    ranges = distances // (block_q + 1) + 1
    if max_distances >= 0:
        whole = torch.sym_min(whole, max_distances * (-(-block_q // block_k) + 1) + 1)
        # One more than asked for: the row's own position is always kept.
        ranges = torch.sym_min(max_distances + 1, ranges)
    edges = ranges + 2 * (-(-(2 * block_q + block_k) // block_k) + 1)
    columns = num_k if max_columns < 0 else torch.sym_min(max_columns, num_k)
    return whole, edges, columns, distances, capacity_blocks(max_blocks, num_k, block_k)


@torch.library.register_fake("sparse_compiler::summarize_keys")
def _summarize_keys_fake(
    k: Tensor,
    rows: Tensor | None,
    key_mask: Tensor | None,
    group: int,
    budget: float,
    min_tokens: int,
    executor: str,
    site: int,
) -> Tensor:
    return k.new_empty(summary_shape(k.shape, group))


def summary_shape(shape: Any, group: int) -> tuple[Any, Any, Any, Any]:
    """[B, Hkv, number of groups, D]; no groups where ``group`` is 0."""
    batch, heads, num_k, dim = shape
    return batch, heads, (-(-num_k // group) if group else 0), dim


@torch.library.register_fake("sparse_compiler::select")
def _select_fake(
    q: Tensor,
    k: Tensor,
    summary: Tensor,
    params: Tensor,
    rows: Tensor | None,
    key_mask: Tensor | None,
    bounds: Tensor | None,
    bias: Tensor | None,
    q_offset: Any,
    left: Any,
    right: Any,
    scale: float,
    block_q: int,
    block_k: int,
    pattern_ids: list[int],
    num_slots: list[int],
    limits: list[int],
    budget: float,
    min_tokens: Any,
    executor: str,
    site: int,
) -> tuple[Tensor, ...]:
    shapes = index_shapes(
        q.shape[0],
        q.shape[1],
        q.shape[2],
        k.shape[2],
        q_offset,
        block_q,
        block_k,
        num_slots,
        limits,
    )
    dtypes = [torch.uint8 if name == "covered" else torch.int32 for name in shapes]
    return tuple(
        q.new_empty(shape, dtype=dtype)
        for shape, dtype in zip(shapes.values(), dtypes, strict=True)
    )


def index_shapes(
    batch: Any,
    heads: Any,
    num_q: Any,
    num_k: Any,
    q_offset: Any,
    block_q: int,
    block_k: int,
    num_slots: list[int],
    limits: list[int],
) -> dict[str, tuple[Any, ...]]:
    """Shape of every index tensor, in the order of ``ir.index.INDEX_FIELDS``."""
    whole, edges, columns, distances, blocks = capacities(
        num_q, num_k, q_offset, block_q, block_k, limits
    )
    band, listed = num_slots
    row_blocks = -(-num_q // block_q)
    return {
        "full": (batch, band, whole),
        "num_full": (batch, band),
        "edge": (batch, band, edges),
        "edge_len": (batch, band, edges),
        "num_edge": (batch, band),
        "columns": (batch, band, columns),
        "num_columns": (batch, band),
        "covered": (batch, band, distances),
        "blocks": (batch, listed, row_blocks, blocks),
        "num_blocks": (batch, listed, row_blocks),
        "slots": (heads, 2),
    }


@torch.library.register_fake("sparse_compiler::attend")
def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    batch, heads, num_q, _dim = q.shape
    out = q.new_empty((batch, heads, num_q, v.shape[-1]))
    return out, q.new_empty((batch, heads, num_q), dtype=torch.float32)
