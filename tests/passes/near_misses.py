"""Programs that look like attention and are not quite: each must be declined, or give what it gave.

``NEAR`` holds functions of q, k, v [2, 4, 24, 8] by name; some return several tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MIN", "NEAR", "SCALE", "Function", "near", "scores", "see"]

Function = Callable[[Tensor, Tensor, Tensor], Any]
NEAR: dict[str, Function] = {}


def near(function: Function) -> Function:
    NEAR[function.__name__.replace("_", " ")] = function
    return function


MIN = torch.finfo(torch.float32).min
SCALE = 8**-0.5


def see(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()


def scores(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).masked_fill(~see(q, k), MIN)


@near
def router(q, k, v):
    return torch.softmax(q @ q.new_ones(8, 24) + q[..., :1], -1) @ v


@near
def router_plain(q, k, v):
    return q.repeat(1, 1, 1, 3).softmax(-1) @ v


@near
def top_keys(q, k, v):
    s = scores(q, k)
    return s.masked_fill(s < s.topk(5, -1).values[..., -1:], MIN).softmax(-1) @ v


@near
def two_values(q, k, v):
    w = scores(q, k).softmax(-1)
    return w @ v, w @ (v * 2 + 1)


@near
def two_sinks(q, k, v):
    s = torch.cat([scores(q, k), torch.zeros(2, 4, 24, 2)], -1)
    return s.softmax(-1)[..., :-2] @ v


@near
def two_sinks_one_cut(q, k, v):
    s = torch.cat([scores(q, k)[..., 1:], torch.zeros(2, 4, 24, 2)], -1)
    return s.softmax(-1)[..., :-1] @ v


@near
def sinks_kept(q, k, v):
    s = torch.cat([scores(q, k), torch.zeros(2, 4, 24, 1)], -1)
    return s.softmax(-1) @ torch.cat([v, v[:, :, :1]], 2)


@near
def sink_cut_elsewhere(q, k, v):
    s = torch.cat([scores(q, k), torch.zeros(2, 4, 24, 1)], -1)
    return s.softmax(-1)[..., 1:] @ v


@near
def sink_of_rows(q, k, v):
    s = torch.cat([scores(q, k), q[..., :1]], -1)
    return s.softmax(-1)[..., :-1] @ v


@near
def bias_in_softcap(q, k, v):
    s = q @ k.mT + torch.arange(24.0) / 9
    return (3 * torch.tanh(s / 3)).masked_fill(~see(q, k), MIN).softmax(-1) @ v


@near
def mask_in_softcap(q, k, v):
    return (3 * torch.tanh(scores(q, k) / 3)).softmax(-1) @ v


@near
def uneven_softcap(q, k, v):
    return (2 * torch.tanh(q @ k.mT / 3)).masked_fill(~see(q, k), MIN).softmax(-1) @ v


@near
def softcap_of_pairs(q, k, v):
    cap = torch.arange(1.0, 25.0)
    return (cap * torch.tanh(q @ k.mT / cap)).softmax(-1) @ v


@near
def same_softmax_as_keys(q, k, v):
    w = scores(q, k).softmax(-1)
    return w @ w @ v


@near
def keys_in_halves(q, k, v):
    w = scores(q, k).softmax(-1)
    return w[..., :12] @ v[:, :, :12]


@near
def mixed_batch(q, k, v):
    return (q @ k.flip(0).mT).softmax(-1) @ v.roll(1, 1)


@near
def tiled_keys_grouped_values(q, k, v):
    k, v = k[:, :2].repeat(1, 2, 1, 1), v[:, :2].repeat_interleave(2, 1)
    return scores(q, k).softmax(-1) @ v


@near
def window_of_rows(q, k, v):
    w = scores(q, k)[:, :, 4:20].softmax(-1)
    return w @ v


@near
def keys_cut_after(q, k, v):
    return scores(q, k)[..., :20].softmax(-1) @ v[:, :, :20]


@near
def relu_of_masked(q, k, v):
    s = scores(q, k).relu()
    return s / (s.sum(-1, keepdim=True) + 1) @ v


@near
def head_mixing(q, k, v):
    s = torch.einsum("bhij,hg->bgij", scores(q, k).clamp(-50), torch.ones(4, 4).tril())
    return s.softmax(-1) @ v


@near
def integers(q, k, v):
    s = (q * 4).long() @ (k * 4).long().mT
    return s.float().mul(0.02).masked_fill(~see(q, k), MIN).softmax(-1) @ v


@near
def wide_scores(q, k, v):
    return ((q.double() @ k.double().mT).softmax(-1) @ v.double()).float()


@near
def no_batch_for_keys(q, k, v):
    return scores(q, k[:1]).softmax(-1) @ v[:1]


@near
def no_batch_for_queries(q, k, v):
    return scores(q[:1], k).softmax(-1) @ v


@near
def weights_of_other_batch(q, k, v):
    return scores(q[:1], k[:1]).softmax(-1) @ v


@near
def means(q, k, v):
    s = scores(q, k)
    return s.softmax(-1) @ v - s.softmax(-1).mean(-1, keepdim=True)


def scores_minus_constant_max(q, k, v):
    s = scores(q, k)
    return (s - s.amax((-1, -2), keepdim=True)).softmax(-1) @ v


@near
def exp_without_sum(q, k, v):
    return torch.exp(scores(q, k)) @ v


@near
def exp_with_other_sum(q, k, v):
    e = torch.exp(scores(q, k))
    return e / e.sum(-2, keepdim=True) @ v


@near
def exp_with_more(q, k, v):
    e = torch.exp(scores(q, k))
    return e / (e.sum(-1, keepdim=True) + 1.0) @ v


@near
def normalised_after(q, k, v):
    e = torch.exp(scores(q, k))
    return (e @ v) / e.sum(-1, keepdim=True)


@near
def shift_in_softcap(q, k, v):
    s = q @ k.mT
    s = s - s.amax(-1, keepdim=True)
    return (3 * torch.tanh(s / 3)).masked_fill(~see(q, k), MIN).softmax(-1) @ v


@near
def number_in_softcap(q, k, v):
    return (3 * torch.tanh((q @ k.mT + 1.5) / 3)).softmax(-1) @ v


@near
def shift_beside_sinks(q, k, v):
    s = scores(q, k)
    s = s - s.amax(-1, keepdim=True)
    s = torch.cat([s, torch.zeros(4)[:, None, None].expand(2, 4, 24, 1)], -1)
    return s.softmax(-1)[..., :-1] @ v


@near
def number_beside_sinks(q, k, v):
    s = torch.cat([scores(q, k) + 2.0, torch.zeros(4)[:, None, None].expand(2, 4, 24, 1)], -1)
    return s.softmax(-1)[..., :-1] @ v


@near
def sinks_under_a_temperature(q, k, v):
    t = torch.tensor([0.5, 1.0, 2.0, 3.0])[:, None, None]
    s = torch.cat([scores(q, k), torch.ones(4)[:, None, None].expand(2, 4, 24, 1)], -1) * t
    return s.softmax(-1)[..., :-1] @ v


@near
def sinks_under_a_number(q, k, v):
    s = torch.cat([scores(q, k), torch.ones(4)[:, None, None].expand(2, 4, 24, 1)], -1) * 2.0
    return s.softmax(-1)[..., :-1] @ v


@near
def log_sum_of_shifted(q, k, v):
    s = scores(q, k)
    s = s - s.amax(-1, keepdim=True)
    return s.softmax(-1) @ v, s.logsumexp(-1)


@near
def log_sum_of_raised(q, k, v):
    s = scores(q, k) + 2.0
    return s.softmax(-1) @ v, torch.logsumexp(s, dim=-1, keepdim=True)


@near
def log_sum(q, k, v):
    s = scores(q, k) * 0.5
    return s.softmax(-1) @ v, torch.logsumexp(s, -1)


@near
def log_sum_before_the_mask(q, k, v):
    s = q @ k.mT
    return s.masked_fill(~see(q, k), MIN).softmax(-1) @ v, s.logsumexp(-1)


@near
def row_maximum_returned(q, k, v):
    s = scores(q, k)
    m = s.amax(-1, keepdim=True)
    return (s - m).softmax(-1) @ v, m


@near
def over_the_row_maximum(q, k, v):
    s = q @ k.mT
    return (s / s.amax(-1, keepdim=True)).softmax(-1) @ v


@near
def over_the_norm(q, k, v):
    s = q @ k.mT
    return (s / s.norm(dim=-1, keepdim=True)).softmax(-1) @ v


@near
def mask_under_a_negative_temperature(q, k, v):
    t = torch.tensor([0.5, -1.0, 2.0, 3.0])[:, None, None]
    s = (q @ k.mT).masked_fill(~see(q, k), -1e32) * t
    return s.softmax(-1) @ v


@near
def mask_under_a_tiny_temperature(q, k, v):
    t = torch.tensor([0.5, 1e-31, 2.0, 3.0])[:, None, None]
    return ((q @ k.mT).masked_fill(~see(q, k), -1e31) * t).softmax(-1) @ v


@near
def filled_with_one(q, k, v):
    return scores(q, k).softmax(-1).masked_fill(~see(q, k), 1.0) @ v


@near
def whole_weights(q, k, v):
    return scores(q, k).mul(9).softmax(-1).to(torch.int64).to(q.dtype) @ v


@near
def whole_scores(q, k, v):
    return (q @ k.mT).to(torch.int64).float().masked_fill(~see(q, k), MIN).softmax(-1) @ v


@near
def floored_scores(q, k, v):
    return torch.div(q @ k.mT, 0.5, rounding_mode="floor").softmax(-1) @ v


@near
def two_products(q, k, v):
    s = q[..., :4] @ k[..., :4].mT + v[..., :4] @ k[..., 4:].mT
    return (s * SCALE).masked_fill(~see(q, k), MIN).softmax(-1) @ v


@near
def values_of_row_and_key(q, k, v):
    table = torch.linspace(-1, 1, 24 * 24 * 8).view(24, 24, 8)
    return torch.einsum("bhij,ijd->bhid", scores(q, k).softmax(-1), table)


@near
def keys_of_row_and_key(q, k, v):
    table = torch.linspace(-1, 1, 24 * 24 * 8).sin().view(24, 24, 8)
    return torch.einsum("bhid,ijd->bhij", q, table).softmax(-1) @ v


@near
def relative_values_too(q, k, v):
    w, table = scores(q, k).softmax(-1), torch.linspace(-1, 1, 24 * 24 * 8).view(24, 24, 8)
    return w @ v + torch.einsum("bhij,ijd->bhid", w, table)


@near
def rows_before_heads(q, k, v):
    s = torch.einsum("bhid,bjd->bihj", q, k[:, 0]) * SCALE
    s = s.masked_fill(~see(q, k)[None, :, None, :], MIN)
    return torch.einsum("bihj,bjd->bihd", s.softmax(-1), v[:, 0])


@near
def keys_before_heads(q, k, v):
    s = torch.einsum("bhid,bhjd->bijh", q, k).masked_fill(~see(q, k)[None, :, :, None], MIN)
    return torch.einsum("bijh,bhjd->bihd", s.softmax(2), v)


@near
def weights_of_one_head(q, k, v):
    w = scores(q, k).softmax(-1)
    return w[:, :1] @ v


@near
def one_head_of_many(q, k, v):
    return scores(q, k).softmax(-1)[:, :1] @ v[:, :1], q


@near
def one_head_picked(q, k, v):
    return scores(q, k).softmax(-1)[:, 2] @ v[:, 2]


@near
def heads_summed_by_the_product(q, k, v):
    return torch.einsum("bhij,bhjd->bid", scores(q, k).softmax(-1), v)


@near
def keys_summed_apart(q, k, v):
    return torch.einsum("bhij,bhjd->bhijd", scores(q, k).softmax(-1), v).sum(3)


@near
def rows_turned(q, k, v):
    return scores(q, k).softmax(-1).flip(2) @ v


@near
def keys_turned_twice(q, k, v):
    return scores(q, k).softmax(-1).flip(-1) @ v.flip(2)


@near
def more_rows_than_keys(q, k, v):
    return (q @ k[:, :, :9].mT).softmax(-1) @ v[:, :, :9]


@near
def no_heads_for_queries(q, k, v):
    return scores(q[:, :1], k).softmax(-1) @ v


@near
def neither_batch_nor_heads(q, k, v):
    return scores(q[0, 0], k[0, 0]).softmax(-1) @ v[0, 0]


@near
def scalar_temperature(q, k, v):
    return (q @ k.mT * q.mean().exp()).masked_fill(~see(q, k), MIN).softmax(-1) @ v


@near
def temperature_of_the_batch(q, k, v):
    return (q @ k.mT * v.mean((1, 2, 3), keepdim=True)).softmax(-1) @ v


@near
def softmax_of_softmax(q, k, v):
    return scores(q, k).softmax(-1).softmax(-1) @ v


@near
def implicit_axis(q, k, v):
    return F.softmax((q @ k.mT).flatten(0, 1), dim=0) @ v.flatten(0, 1)


@near
def alias_of_the_scores_returned(q, k, v):
    s = q @ k.mT
    alias = s.view(8, 24, 24)
    s.masked_fill_(~see(q, k), -9e8)
    w = s.softmax(-1)
    return w @ v, alias.sum(-1)


@near
def sinks_in_softcap(q, k, v):
    sinks = torch.ones(4)[:, None, None].expand(2, 4, 24, 1)
    s = 3 * torch.tanh(torch.cat([q @ k.mT, sinks], -1) / 3)
    return s.softmax(-1)[..., :-1] @ v


@near
def sinks_out_of_softcap(q, k, v):
    sinks = torch.ones(4)[:, None, None].expand(2, 4, 24, 1)
    s = torch.cat([3 * torch.tanh(q @ k.mT / 3), sinks], -1)
    return s.softmax(-1)[..., :-1] @ v
