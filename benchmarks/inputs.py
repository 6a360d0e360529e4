"""Inputs of the attention benchmarks: made-up heads with the usual structure, and a real model's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparse_compiler import ops
from sparse_compiler.demo.checkpoint import load_retriever
from sparse_compiler.demo.records import make_prompt
from sparse_compiler.errors import OptionInvalid
from sparse_compiler.ir.index import INDEX_FIELDS, AttentionIndex

__all__ = [
    "DIM",
    "HEADS",
    "KV_HEADS",
    "Structure",
    "block_mask_index",
    "pack_blocks",
    "retriever_inputs",
    "structured_inputs",
]

HEADS, KV_HEADS, DIM = 32, 8, 128


@dataclass(frozen=True)
class Structure:
    """What `structured_inputs` puts into a head; peaks are logits, widths are distances.

    A bump of peak a and width w around distance o adds a / (1 + ((distance - o) / w)²) to a logit.

    Args:
        speeds: range of the rotary frequencies, radians a token.
        local_peak, local_width: of the bump at distance 0; widths are drawn log-uniformly.
        slashes: bumps of each query head, at distances drawn log-uniformly from ``nearest_slash``
            to N / 2.
        slash_peak, slash_width: ranges of theirs.
        columns: heavy keys of each key head, at random places.
        column_peak: range of what they add to a logit, before ``look``.
        sinks, sink_peak: the first keys, and what they add.
        look: range of the factor by which each query looks for heavy keys and sinks.
        noise: standard deviation of what is added to every element of q and k.
    """

    speeds: tuple[float, float] = (2e-3, 0.1)
    local_peak: float = 10.0
    local_width: tuple[float, float] = (60.0, 200.0)
    slashes: int = 10
    slash_peak: tuple[float, float] = (7.0, 8.0)
    slash_width: tuple[float, float] = (6.0, 16.0)
    nearest_slash: int = 200
    columns: int = 700
    column_peak: tuple[float, float] = (6.0, 8.0)
    sinks: int = 4
    sink_peak: float = 13.0
    look: tuple[float, float] = (0.3, 1.5)
    noise: float = 0.3


class _Draw:
    """Random numbers of one generator."""

    def __init__(self, seed: int, device: str | torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device = device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def between(self, bounds: tuple[float, float], *shape: int) -> Tensor:
        share = torch.rand(*shape, generator=self.generator, device=self.device)
        return bounds[0] + (bounds[1] - bounds[0]) * share

    def log_between(self, bounds: tuple[float, float], *shape: int) -> Tensor:
        return bounds[0] * (bounds[1] / bounds[0]) ** self.between((0.0, 1.0), *shape)


def structured_inputs(
    num_tokens: int,
    *,
    seed: int = 0,
    device: str | torch.device = "cuda",
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    dim: int = DIM,
    structure: Structure | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, heads, N, dim] and k, v [1, kv_heads, N, dim], bf16, whose attention has the usual shapes.

    Three quarters of the dimensions rotate with the position, at frequencies spread evenly over
    the logarithm, and each head's query weighs them so that logits have Lorentzian bumps: one at
    distance 0 that decays over hundreds of keys, and ten at distances from 200 to N / 2 that are some
    tens of distances wide. Of the rest, all but a sixteenth carry a direction that every query
    looks for, one more than another, and that heavy keys and the first four have. Everything
    carries noise.

    Nothing depends on the length but the places. The numbers in `Structure` were calibrated, by
    counting on the CPU (64-row blocks, a few key heads), so that vertical-slash (512, 2048) computes
    about .29, .098 and .029 of the causal pairs at 32K, 128K and 512K tokens. The distances that
    it chooses beyond the bumps come from heavy columns, which show in the sums over diagonals.

    Raises:
        OptionInvalid: heads is no multiple of kv_heads, or dim is no multiple of 16.
    """
    if heads % kv_heads or dim % 16:
        raise OptionInvalid(
            "(heads, kv_heads, dim) of the inputs",
            "heads a multiple of kv_heads and dim a multiple of 16",
            (heads, kv_heads, dim),
            where="structured_inputs",
        )
    structure = structure or Structure()
    draw = _Draw(seed, device)
    q = torch.empty(1, heads, num_tokens, dim, dtype=torch.bfloat16, device=device)
    k = torch.empty(1, kv_heads, num_tokens, dim, dtype=torch.bfloat16, device=device)
    v = torch.empty_like(k)
    groups = heads // kv_heads
    # One head after the other: a million tokens of all heads in float32 would take 17 GB.
    for kv_head in range(kv_heads):
        parts = _key_head(draw, num_tokens, dim, structure)
        k[0, kv_head] = parts.keys
        v[0, kv_head] = draw.normal(num_tokens, dim)
        for head in range(kv_head * groups, (kv_head + 1) * groups):
            q[0, head] = _query_head(draw, num_tokens, dim, parts, structure)
    return q, k, v


@dataclass(frozen=True)
class _KeyHead:
    """keys [N, D] and what the queries of its group share with them."""

    keys: Tensor
    speed: Tensor
    cosine: Tensor
    sine: Tensor
    looked_for: Tensor


def _key_head(draw: _Draw, num_tokens: int, dim: int, structure: Structure) -> _KeyHead:
    half, content = dim * 3 // 8, dim * 3 // 16
    step = (torch.arange(half, device=draw.device) + draw.between((0.0, 1.0), half)) / half
    low, high = structure.speeds
    speed = low * (high / low) ** step
    # Angles reach 1e5, where a float32 has lost the phase.
    angle = torch.arange(num_tokens, device=draw.device).double()[:, None] * speed.double()
    cosine, sine = angle.cos().float(), angle.sin().float()
    keys = draw.normal(num_tokens, dim).mul_(structure.noise)
    keys[:, :half] += cosine
    keys[:, half : 2 * half] += sine
    direction = draw.normal(content)
    looked_for = 8.0 * direction / direction.norm()
    weight = torch.zeros(num_tokens, device=draw.device)
    heavy = torch.randint(
        0, num_tokens, (structure.columns,), generator=draw.generator, device=draw.device
    )
    # One value a place, not one a draw: two draws of one place must not race on the device.
    weight[heavy] = 1.0
    weight *= draw.between(structure.column_peak, num_tokens)
    weight[: structure.sinks] = structure.sink_peak
    # The product with looked_for, times dim ** -0.5, is the weight.
    spread = looked_for * (dim**0.5 / 64.0)
    keys[:, 2 * half : 2 * half + content] += weight[:, None] * spread
    return _KeyHead(keys, speed, cosine, sine, looked_for)


def _query_head(
    draw: _Draw, num_tokens: int, dim: int, parts: _KeyHead, structure: Structure
) -> Tensor:
    half, content = dim * 3 // 8, dim * 3 // 16
    count = structure.slashes
    farthest = max(structure.nearest_slash, num_tokens // 2)
    far = draw.log_between((structure.nearest_slash, farthest), count).floor()
    place = torch.cat([torch.zeros(1, device=draw.device), far]).double()[:, None]
    peak = torch.cat(
        [
            torch.full((1,), structure.local_peak, device=draw.device),
            draw.between(structure.slash_peak, count),
        ]
    )
    width = torch.cat(
        [
            draw.log_between(structure.local_width, 1),
            draw.log_between(structure.slash_width, count),
        ]
    )
    # Over the logarithm of the frequency s, the integral of s w exp(-s w) cos(s d) is the
    # Lorentzian 1 / (1 + (d / w)²).
    product = parts.speed * width[:, None]
    share = product * torch.exp(-product)
    share *= peak[:, None] * dim**0.5 / share.sum(1, keepdim=True)
    shift = place * parts.speed.double()
    cosine = (share * shift.cos().float()).sum(0)
    sine = (share * shift.sin().float()).sum(0)
    queries = draw.normal(num_tokens, dim).mul_(structure.noise)
    queries[:, :half] += parts.cosine * cosine + parts.sine * sine
    queries[:, half : 2 * half] += parts.sine * cosine - parts.cosine * sine
    look = draw.between(structure.look, num_tokens)
    queries[:, 2 * half : 2 * half + content] += look[:, None] * parts.looked_for
    return queries


class _Capture(TorchFunctionMode):
    """Keeps q, k and v of every scaled-dot-product attention that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, k, v = (tensor.contiguous() for tensor in args[:3])
            self.found.append((q, k, v))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def retriever_inputs(
    num_tokens: int, *, seed: int = 0, device: str | torch.device = "cuda"
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v of every layer of the shipped retriever on a prompt of that length, after RoPE.

    A quarter of the prompt is records, four questions stand at its end. The model was trained on
    positions up to 131072; beyond, its heads are what its weights make of unknown angles.

    Returns:
        A list of q [1, 6, N, 64], k and v [1, 2, N, 64], bf16, contiguous.
    """
    model = load_retriever(torch.bfloat16, device, "builtin")
    tokens = make_prompt(num_tokens, seed=seed).tokens[None].to(device)
    with _Capture() as capture:
        model.get_submodule("model")(tokens, None)
    return capture.found


def pack_blocks(masks: Callable[[int], Tensor], heads: int) -> tuple[Tensor, Tensor]:
    """Lists of the true entries of a mask for each head, made one head at a time.

    Args:
        masks: head -> bool [row blocks, key blocks]; called twice for each head, same answer.
        heads: how many.
    Returns:
        int32 [1, heads, row blocks, K], ascending, K the longest list (at least 1), padded with 0;
        int32 counts [1, heads, row blocks].
    """
    counts = torch.stack([masks(head).sum(-1, dtype=torch.int32) for head in range(heads)])
    longest = max(1, int(counts.max()))
    lists = []
    for head in range(heads):
        order = torch.sort(masks(head).to(torch.uint8), dim=-1, descending=True, stable=True)
        listed = torch.arange(order.indices.shape[-1], device=counts.device) < counts[head, :, None]
        lists.append(torch.where(listed, order.indices, 0)[:, :longest].to(torch.int32))
    return torch.stack(lists)[None], counts[None]


def block_mask_index(
    num_tokens: int,
    heads: int,
    blocks: tuple[int, int],
    density: float,
    *,
    seed: int = 0,
    device: str | torch.device = "cuda",
) -> AttentionIndex:
    """A causal block mask as an index: diagonal and first blocks always, the rest at random.

    Every other block is kept with one probability, the one that makes the expected share of
    computed pairs ``density``; heads and row blocks are independent.

    Args:
        num_tokens: N, rows and keys.
        blocks: rows and keys of a block (M, N).
        density: computed over allowed pairs, 0 < density <= 1; what diagonal and sink take is the
            least there can be.
    Raises:
        OptionInvalid: density is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise OptionInvalid("density", "a number with 0 < density <= 1", density)
    size_q, size_k = blocks
    row = torch.arange(-(-num_tokens // size_q), device=device)[:, None] * size_q
    key = torch.arange(-(-num_tokens // size_k), device=device) * size_k
    visible = key < (row + size_q).clamp(max=num_tokens)
    always = visible & ((key + size_k > row) | (key == 0))
    # Blocks that are neither are whole; the forced ones cost at most what they are.
    rest = visible & ~always
    allowed = num_tokens * (num_tokens + 1) / 2
    height = (num_tokens - row).clamp(max=size_q)
    free = float((rest * height).sum()) * size_k
    share = min(1.0, max(0.0, (density * allowed - (allowed - free)) / max(1.0, free)))

    def mask(head: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed * heads + head)
        drawn = torch.rand(rest.shape, generator=generator, device=device)
        return always | (rest & (drawn < share))

    lists, counts = pack_blocks(mask, heads)
    shapes = ops.index_shapes(
        1, heads, num_tokens, num_tokens, 0, *blocks, [0, heads], [0, 0, lists.shape[-1]]
    )
    tensors = {
        name: torch.zeros(
            shapes[name], dtype=torch.uint8 if name == "covered" else torch.int32, device=device
        )
        for name in INDEX_FIELDS
    }
    slot = torch.arange(heads, dtype=torch.int32, device=device)
    tensors |= {
        "blocks": lists,
        "num_blocks": counts,
        "slots": torch.stack([torch.full_like(slot, -1), slot], dim=1),
    }
    return AttentionIndex(**tensors)
