"""Near misses that write in place, or rely on how the result lies in memory; see ``near_misses``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from near_misses import MIN, SCALE, near, scores, see

__all__: list[str] = []


@near
def keys_written_between(q, k, v):
    k = k.clone()
    s = q @ k.mT * SCALE
    k.mul_(3)
    return (s + see(q, k) * 0).softmax(-1) @ v + k


@near
def queries_written_between(q, k, v):
    q = q.clone()
    s = q @ k.mT * SCALE
    q[:, :, 3] = 7
    return s.softmax(-1) @ v + q


@near
def values_written_between(q, k, v):
    v = v * 1
    w = scores(q, k).softmax(-1)
    v[:, :, 0].zero_()
    return w @ v


@near
def argument_written_between(q, k, v):
    w = scores(q, k).softmax(-1)
    v.add_(1)
    k.zero_()
    return w @ v


@near
def values_written_after(q, k, v):
    v = v.clone()
    o = scores(q, k).softmax(-1) @ v
    v.zero_()
    return o + v


@near
def mask_written_between(q, k, v):
    mask = see(q, k).clone()
    s = (q @ k.mT).masked_fill(~mask, MIN)
    mask.fill_(True)
    return s.softmax(-1) @ v, mask


@near
def mask_written_before(q, k, v):
    mask = see(q, k)
    mask[:, 3:6] = False
    return (q @ k.mT).masked_fill(~mask, MIN).softmax(-1) @ v


@near
def added_mask_written_between(q, k, v):
    mask = torch.zeros(24, 24)
    s = q @ k.mT + mask
    mask.masked_fill_(~see(q, k), MIN)
    return s.softmax(-1) @ v


@near
def one_row_written(q, k, v):
    s = scores(q, k)
    s[:, :, 5] = 0.0
    return s.softmax(-1) @ v


@near
def view_written(q, k, v):
    s = q @ k.mT
    s.view(-1, 24, 24).masked_fill_(~see(q, k), MIN)
    return s.softmax(-1) @ v


@near
def weights_written(q, k, v):
    w = scores(q, k).softmax(-1)
    w[..., 0] = 0
    return w @ v


@near
def weights_scaled_in_place(q, k, v):
    w = scores(q, k).softmax(-1)
    w.mul_(0.5)
    return w @ v


@near
def output_written(q, k, v):
    o = scores(q, k).softmax(-1) @ v
    o.mul_(2)
    return o


@near
def out_argument(q, k, v):
    o = torch.empty_like(v)
    torch.matmul(scores(q, k).softmax(-1), v, out=o)
    return o


@near
def sinks_written_between(q, k, v):
    sinks = torch.ones(4)
    column = sinks[:, None, None].expand(2, 4, 24, 1)
    w = torch.cat([scores(q, k), column], -1).softmax(-1)
    sinks.fill_(9.0)
    return w[..., :-1] @ v, sinks


@near
def temperature_written_between(q, k, v):
    t = torch.ones(4, 1, 1)
    s = (q @ k.mT) * t
    t.fill_(7.0)
    return s.softmax(-1) @ v, t


@near
def bias_written_between(q, k, v):
    bias = torch.arange(24.0)[None, :] / 9
    s = q @ k.mT + bias
    bias.zero_()
    return s.softmax(-1) @ v


@near
def cleared_by_a_mask_written_between(q, k, v):
    mask = see(q, k).clone()
    w = (q @ k.mT).masked_fill(~mask, MIN).softmax(-1)
    mask[:, 0] = False
    return w.masked_fill(~mask, 0.0) @ v


@near
def cleared_by_another_mask(q, k, v):
    return scores(q, k).softmax(-1).masked_fill(~see(q, k).tril(-1), 0.0) @ v


@near
def cleared_by_the_same_mask(q, k, v):
    return scores(q, k).softmax(-1).masked_fill(~see(q, k), 0.0) @ v


@near
def all_in_place(q, k, v):
    s = q @ k.mT
    s.mul_(SCALE)
    s.div_(3.0).tanh_().mul_(3.0)
    s += torch.where(see(q, k), 0.0, MIN)
    return F.dropout(s.softmax(-1), 0.2, training=False, inplace=True) @ v


@near
def softmax_into(q, k, v):
    s = scores(q, k)
    buffer = torch.empty_like(s)
    torch.softmax(s, -1, out=buffer)
    return buffer @ v


@near
def sum_into(q, k, v):
    buffer = torch.empty(2, 4, 24, 24)
    s = torch.add(q @ k.mT, torch.where(see(q, k), 0.0, MIN), out=buffer)
    return s.softmax(-1) @ v, buffer.amax()


@near
def output_viewed(q, k, v):
    return (scores(q, k).softmax(-1) @ v).view(8, -1)


@near
def transposed_output_viewed(q, k, v):
    return (v.mT @ scores(q, k).softmax(-1).mT).view(2, 32, 24)


@near
def transposed_operands_viewed(q, k, v):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    return (scores(q, k).softmax(-1) @ v).view(8, 24, 8)


@near
def output_written_through_a_view(q, k, v):
    o = scores(q, k).softmax(-1) @ v
    o.view(8, 24, 8)[:, 0].zero_()
    return o


@near
def scores_written_after(q, k, v):
    s = scores(q, k)
    w = s.softmax(-1)
    s.zero_()
    return w @ v, s.sum()


@near
def cleared_by_a_mask_that_was_written(q, k, v):
    hidden = ~see(q, k)
    w = (q @ k.mT).masked_fill(hidden, MIN).softmax(-1)
    hidden[:, 0] = True
    return w.masked_fill(hidden, 0.0) @ v


@near
def einsum_output_viewed(q, k, v):
    return torch.einsum("bhij,bhjd->bhdi", scores(q, k).softmax(-1), v).mT.view(2, 4, 4, 6, 8)


@near
def built_in_output_viewed(q, k, v):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).view(2, 24, -1)


@near
def einsum_output_turned_and_viewed(q, k, v):
    o = torch.einsum("bhij,bhjd->bihd", scores(q, k).softmax(-1), v)
    return o.permute(0, 2, 1, 3).contiguous().view(8, 24, 8)
