"""Mask programs that must be proved, each with the text of what is proved.

A program takes (q, k, padding mask, ids, an offset, weights) and returns its terms.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

LOW = torch.finfo(torch.float32).min


def rows(q):
    return torch.arange(q.shape[2])[None, None, :, None]


def keys(k):
    return torch.arange(k.shape[2])[None, None, None, :]


def causal(q, k):
    return keys(k) <= rows(q)


def place(q, k):
    """Rows counted so that the last one stands at the last key."""
    return rows(q) + (k.shape[2] - q.shape[2])


def padded(pad):
    return pad.bool()[:, None, None, :]


def gathered(q, k, pad):
    """As transformers does it."""
    return pad.to(torch.bool)[torch.arange(q.shape[0])[:, None, None, None], keys(k)]


def same(ids):
    return ids[:, None, :, None] == ids[:, None, None, :]


def packed(positions):
    """As transformers finds packed documents in position ids."""
    return (positions.diff(prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def additive(mask):
    return torch.where(mask, 0.0, LOW)


def chunks(q, k, start, size=4):
    return (rows(q) - start) // size == (keys(k) - start) // size


def left_padding(pad):
    return (pad.cumsum(-1) == torch.zeros_like(pad)).sum(-1)[:, None, None, None]


def chunked_and_left_padded(q, k, pad):
    return causal(q, k) & chunks(q, k, left_padding(pad))


def bucket(distance, bidirectional):
    """T5's, with its in-place sums."""
    buckets, number = 0, 32
    if bidirectional:
        number //= 2
        buckets += (distance > 0).to(torch.long) * number
        distance = torch.abs(distance)
    else:
        distance = -torch.min(distance, torch.zeros_like(distance))
    exact = number // 2
    large = torch.log(distance.float() / exact) / math.log(128 / exact) * (number - exact)
    large = exact + large.to(torch.long)
    large = torch.min(large, torch.full_like(large, number - 1))
    buckets += torch.where(distance < exact, distance, large)
    return buckets


def t5(q, k, table, bidirectional=True):
    buckets = bucket((keys(k) - rows(q))[0, 0], bidirectional)
    return F.embedding(buckets, table).permute([2, 0, 1]).unsqueeze(0)


def bloom(pad, table):
    ahead = ((pad.cumsum(-1) - 1) * pad)[:, None, :]
    return (table[0][:, None] * ahead).view(pad.shape[0], 4, 1, -1)


def falcon(q, k, pad, table):
    return torch.masked_fill(bloom(pad, table) / math.sqrt(8), additive(causal(q, k)) < -1, LOW)


def offset_then_moved(q, k, off):
    """A static cache: its length is read, then written."""
    mask = keys(k) <= rows(q) + off
    off.add_(q.shape[2])
    return mask


def moved_then_used(q, k):
    start = torch.arange(q.shape[2])
    start += 2
    return keys(k) <= start[None, None, :, None]


def view_mutated(q, k):
    start = torch.arange(q.shape[2])
    view = start[None, None, :, None]
    start.add_(1)
    return keys(k) <= view


def both(q, k, pad):
    """(causal and padding) or (prefix and padding)."""
    return (causal(q, k) & padded(pad)) | ((keys(k) < 3) & padded(pad))


PROVED = {
    "causal": (lambda q, k, *_: [("keep", causal(q, k))], "causal"),
    "dropped": (lambda q, k, *_: [("drop", keys(k) > rows(q))], "causal"),
    "strict": (lambda q, k, *_: [("keep", torch.lt(keys(k), rows(q) + 1))], "causal"),
    "tril": (
        lambda q, k, *_: [("keep", torch.ones(q.shape[2], k.shape[2]).tril().bool())],
        "causal",
    ),
    "triu_additive": (
        lambda q, k, *_: [
            (
                "add",
                torch.full((q.shape[2], k.shape[2]), LOW).triu(1)[None, None].expand(2, 1, -1, -1),
            )
        ],
        "causal",
    ),
    "two_terms": (
        lambda q, k, pad, *_: [("keep", causal(q, k)), ("add", additive(padded(pad)))],
        "causal, key padding",
    ),
    "full": (lambda q, k, *_: [("add", torch.zeros(1, 1, q.shape[2], k.shape[2]))], "full"),
    "sliding": (
        lambda q, k, *_: [("keep", causal(q, k) & (keys(k) > rows(q) - 3))],
        "causal, window 3",
    ),
    "two_sided": (lambda q, k, *_: [("keep", (rows(q) - keys(k)).abs() <= 2)], "band(-2, 2)+0"),
    "one_less": (lambda q, k, *_: [("keep", keys(k) < rows(q))], "causal+-1"),
    "gathered": (
        lambda q, k, pad, *_: [("keep", causal(q, k) & gathered(q, k, pad))],
        "causal, key padding",
    ),
    "two_paddings": (
        lambda q, k, pad, *_: [("keep", (padded(pad) & (pad.roll(1, 1) > 0)[:, None, None]))],
        "full, key padding",
    ),
    "reversed_padding": (
        lambda q, k, pad, *_: [("keep", padded(pad).flip(3))],
        "full, key padding",
    ),
    "longer_padding": (
        lambda q, k, pad, *_: [("keep", F.pad(pad, (0, 3))[:, None, None, 3:] > 0)],
        "full, key padding",
    ),
    "shared_padding": (
        lambda q, k, pad, *_: [("keep", both(q, k, pad))],
        "causal+2, rows bounded, key padding",
    ),
    "summed": (
        lambda q, k, pad, *_: [("add", additive(causal(q, k)) + (1.0 - padded(pad).float()) * LOW)],
        "causal, key padding",
    ),
    "raw_padding": (
        lambda q, k, pad, *_: [("add", (1.0 - pad[:, None, None].float()) * LOW)],
        "full, bias",
    ),
    "very_low": (lambda q, k, *_: [("add", torch.where(causal(q, k), 0.0, -1e31))], "causal"),
    "offset_in_a_tensor": (
        lambda q, k, pad, ids, off, _: [("keep", keys(k) <= rows(q) + off)],
        "causal+read_x4()",
    ),
    "static_cache": (
        lambda q, k, pad, ids, off, _: [("keep", offset_then_moved(q, k, off))],
        "causal+read_x4()",
    ),
    "moved_in_place": (lambda q, k, *_: [("keep", moved_then_used(q, k))], "causal+2"),
    "mutated_view": (lambda q, k, *_: [("keep", view_mutated(q, k))], "causal+1"),
    "offset_of_each_entry": (
        lambda q, k, pad, *_: [("keep", keys(k) <= rows(q) + left_padding(pad))],
        "full, rows bounded",
    ),
    "one_entry_hidden": (
        lambda q, k, *_: [
            ("keep", causal(q, k) & (torch.arange(q.shape[0])[:, None, None, None] > 0))
        ],
        "causal, rows bounded",
    ),
    "chunks": (
        lambda q, k, *_: [("keep", causal(q, k) & chunks(q, k, 0))],
        "causal, window 4, rows bounded",
    ),
    "chunks_both_ways": (
        lambda q, k, *_: [("keep", chunks(q, k, 0, 3))],
        "band(-2, 2)+0, rows bounded",
    ),
    "chunks_left_padded": (
        lambda q, k, pad, *_: [("keep", chunked_and_left_padded(q, k, pad))],
        "causal, window 4, rows bounded",
    ),
    "prefix": (
        lambda q, k, *_: [("keep", causal(q, k) | (keys(k) < 3))],
        "causal+2, rows bounded",
    ),
    "prefix_at_run_time": (
        lambda q, k, pad, ids, off, _: [("keep", causal(q, k) | (keys(k) < off))],
        "full, rows bounded",
    ),
    "rows_that_see_nothing": (
        lambda q, k, *_: [("keep", causal(q, k) & (rows(q) > 1))],
        "causal, rows bounded",
    ),
    "t5": (
        lambda q, k, pad, ids, off, w: [("add", t5(q, k, w) + additive(padded(pad)))],
        "full, key padding, bias",
    ),
    "t5_decoder": (
        lambda q, k, pad, ids, off, w: [("add", t5(q, k, w, False) + additive(causal(q, k)))],
        "causal, bias",
    ),
    "alibi_both_ways": (
        lambda q, k, pad, ids, off, w: [
            ("add", -w[0][None, :, None, None] * (rows(q) - keys(k)).abs())
        ],
        "full, bias",
    ),
    "bloom": (
        lambda q, k, pad, ids, off, w: [("add", bloom(pad, w)), ("keep", causal(q, k))],
        "causal, bias",
    ),
    "falcon": (lambda q, k, pad, ids, off, w: [("add", falcon(q, k, pad, w))], "causal, bias"),
    "soft": (lambda q, k, *_: [("add", torch.where(causal(q, k), 0.0, -1.0))], "full, bias"),
    "of_the_rows": (
        lambda q, k, *_: [("add", rows(q).float()), ("keep", causal(q, k))],
        "causal",
    ),
    "of_positions_only": (
        lambda q, k, *_: [("add", (keys(k) * rows(q)).float())],
        "full, bias",
    ),
}
SQUARE = {
    "packed": (
        lambda q, k, pad, ids, *_: [("keep", causal(q, k) & same(packed(ids)))],
        "causal, rows bounded",
    ),
    "packed_both_ways": (
        lambda q, k, pad, ids, *_: [("keep", same((ids == 0).cumsum(-1)))],
        "full, rows bounded",
    ),
    "packed_and_sliding": (
        lambda q, k, pad, ids, *_: [
            ("keep", causal(q, k) & (rows(q) - keys(k) < 3) & same(packed(ids)) & padded(pad))
        ],
        "causal, window 3, rows bounded, key padding",
    ),
    "positions_in_order": (
        lambda q, k, *_: [
            ("keep", causal(q, k) & same(packed(torch.arange(q.shape[2])[None].expand(2, -1))))
        ],
        "causal",
    ),
    "query_padding": (
        lambda q, k, pad, *_: [("keep", pad.bool()[:, None, :, None] & causal(q, k))],
        "causal, rows bounded",
    ),
}
