"""A mask rule: an operator that builds the mask of packed documents, and what its elements are."""

import sympy
import torch
from torch import Tensor, fx

from sparse_compiler.plugins import NotUnderstood, argument, compare, conj, mask_rule


@torch.library.custom_op("mylib::document_mask", mutates_args=())
def document_mask(ids: Tensor, window: int) -> Tensor:
    """Bool [B, 1, L, L] of documents' numbers [B, L]: the same document, not later, less than
    ``window`` tokens back."""
    place = torch.arange(ids.shape[1], device=ids.device)
    back = place[:, None] - place
    same = ids[:, :, None] == ids[:, None]
    return (same & (back >= 0) & (back < window))[:, None]


@document_mask.register_fake
def _(ids: Tensor, window: int) -> Tensor:
    batch, length = ids.shape
    return ids.new_empty(batch, 1, length, length, dtype=torch.bool)


@mask_rule(document_mask)
def read_document_mask(reader, node: fx.Node, index):
    """Element (b, 0, q, k) of the operator's result."""
    ids, window = argument(node, 0, "ids"), argument(node, 1, "window")
    if not isinstance(window, int):
        raise NotUnderstood("a window that is no constant")
    batch, _, query, key = index
    mine, other = (reader.evaluate(ids, (batch, place)) for place in (query, key))
    return conj(
        compare("eq", mine, other),
        compare("le", key, query),
        compare("lt", query - key, sympy.Integer(window)),
    )
