"""What ``low_rank`` misses with other numbers of directions: ``python -m benchmarks.directions``.

The shipped retriever reads a prompt half full of records with 64 questions anywhere, densely. For every
row, key blocks before its own row block's (but the first) that hold at least ``--share`` of its weight
are strong. Each way to score lists blocks by the pattern's own rule; what is counted is strong blocks
that the row's block does not list. Runs on the CPU in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_compiler.backend import minference
from sparse_compiler.demo.checkpoint import answer_logits, load_retriever
from sparse_compiler.demo.records import make_prompt
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import low_rank, registry
from sparse_compiler.patterns.base import BlockRule, Scored, SelectRequest
from sparse_compiler.patterns.relation import request_relation
from sparse_compiler.patterns.row_scores import keep_blocks, score_blocks
from sparse_compiler.runtime.observe import AttentionCall, observing

_SIZE = 64  # rows and keys of a block
_ROWS = 1024  # that are looked at together
#: Directions, and whether both sides are rounded to 8 bits, as they are on GPUs that multiply such.
_WAYS = ((16, False), (24, False), (32, False), (32, True), (64, False))


def main() -> None:
    """Print one table for each layer."""
    args = _parser().parse_args()
    model = load_retriever(torch.float32, source="builtin")
    prompt = make_prompt(args.tokens, placement="anywhere", records=0.5, seed=args.seed)
    options = {"budget": 1.0, "min_tokens": 0, "executor": "cpu", "inner": "eager"}
    compiled: Any = torch.compile(model, backend=minference, options=options)
    calls: list[AttentionCall] = []
    with observing(calls.append):
        answer_logits(compiled, prompt)
    head = HeadPattern("low_rank", args.threshold, args.blocks)
    for layer, call in enumerate(calls):
        print(f"\nlayer {layer}\n\n| directions | missed | of | density |\n|---|---|---|---|")
        found = [_look(call, number, head, args.share) for number in range(call.q.shape[1])]
        for way, (rank, eight) in enumerate(_WAYS):
            missed, strong, density = (
                sum(part) for part in zip(*(f[way] for f in found), strict=True)
            )
            name = f"{rank}{', 8 bits' if eight else ''}"
            print(
                f"| {name} | {missed:.0f} | {strong:.0f} | {density / len(found):.3f} |", flush=True
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.directions", description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threshold", type=int, default=7000, help="of low_rank, millionths")
    parser.add_argument("--blocks", type=int, default=16, help="that a list holds at the most")
    parser.add_argument(
        "--share", type=float, default=0.3, help="of a row's weight, of a strong block"
    )
    parser.add_argument("--seed", type=int, default=3)
    return parser


def _look(
    call: AttentionCall, number: int, head: HeadPattern, share: float
) -> list[tuple[float, float, float]]:
    """(missed, strong, density) of one query head, for each of ``_WAYS``."""
    at = number // (call.q.shape[1] // call.k.shape[1])
    alone = _request(call, call.q[:, number : number + 1], call.k[:, at : at + 1], head)
    strong = _masses(alone) >= share
    place = torch.arange(strong.shape[1])
    row_block = torch.arange(strong.shape[0])[:, None] // _SIZE
    strong &= (place < row_block) & (place > 0)
    rule, found = registry.get(head.name).rule, []
    assert isinstance(rule, BlockRule)
    visible, mine = request_relation(alone)
    for rank, eight in _WAYS:
        with _directions(rank):
            scored = low_rank.sketches(alone)
        scores = score_blocks(alone, 0, _rounded(scored) if eight else scored, rule.every)
        kept = keep_blocks(alone, 0, scores, visible, mine)[0]
        missed = strong & ~kept.repeat_interleave(_SIZE, 0)[: strong.shape[0]]
        found.append(
            (float(missed.sum()), float(strong.sum()), float(kept.sum() / visible[0].sum()))
        )
    return found


def _request(call: AttentionCall, q: Tensor, k: Tensor, head: HeadPattern) -> SelectRequest:
    none, at = torch.zeros(0, dtype=torch.int64), torch.tensor([0])
    geometry = replace(call.geometry, block_q=_SIZE, block_k=_SIZE)
    return SelectRequest(
        *(q, k, k[:, :, :0], at, torch.full_like(at, head.first), torch.full_like(at, head.second)),
        *(geometry, call.rows, None),
        scale=call.scale,
        limits=registry.get(head.name).limits(head, _SIZE, _SIZE),
        probe=lambda *_: (none, none),
        group=0,
    )


@contextmanager
def _directions(rank: int) -> Iterator[None]:
    before, low_rank.RANK = low_rank.RANK, rank
    try:
        yield
    finally:
        low_rank.RANK = before


def _rounded(scored: Scored) -> Scored:
    """Both sides in e4m3, after each direction's size has been shared out between them."""
    size = scored.keys.square().mean(2, keepdim=True).sqrt().clamp(min=1e-20).sqrt()
    queries, keys = scored.queries * size, scored.keys / size
    kind = torch.float8_e4m3fn
    return replace(scored, queries=queries.to(kind).float(), keys=keys.to(kind).float())


def _masses(request: SelectRequest) -> Tensor:
    """Dense weight of each key block in each row, float32 [Lq, key blocks]."""
    q, keys = request.q[0, 0], request.k[0, 0].T
    key = torch.arange(keys.shape[1])
    found = []
    for row in torch.arange(q.shape[0]).split(_ROWS):
        logits = (q[row] @ keys * request.scale).masked_fill(key > row[:, None], -torch.inf)
        pad = torch.nn.functional.pad(logits.softmax(-1), (0, -keys.shape[1] % _SIZE))
        found.append(pad.unflatten(1, (-1, _SIZE)).sum(-1))
    return torch.cat(found)


if __name__ == "__main__":
    main()
