"""What the option ``target_recall`` keeps of dense attention's weight: ``python -m benchmarks.recall``.

The shipped retriever reads a prompt half full of records with 64 questions anywhere. For each target
and pattern the compiled model runs once, and each layer's kept keys are compared with dense attention of
the very q and k that the layer got, in every row and head. Short prompts: whole rows are looked at.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.fidelity.layers import kept_keys
from sparse_compiler import ops
from sparse_compiler.backend import minference, parse_options
from sparse_compiler.demo.checkpoint import answer_logits, load_retriever
from sparse_compiler.demo.records import make_prompt
from sparse_compiler.ir.index import INDEX_FIELDS, AttentionIndex, Geometry
from sparse_compiler.patterns import ranking
from sparse_compiler.runtime import dispatch

_ROWS = 512  # that are looked at together


def main() -> None:
    """Print one table for each length."""
    args = _parser().parse_args()
    model = load_retriever(torch.float32, source="builtin")
    ranking.PEAKS = args.peaks
    for tokens in args.tokens:
        prompt = make_prompt(tokens, placement="anywhere", records=0.5, seed=args.seed)
        print(f"\n{tokens} tokens, executor {args.executor}\n")
        print(
            "| pattern | target | recall, mean | worst head | worst row | rows that hold it |",
            end="",
        )
        print(
            " of the worst head | density | with true masses |\n|---|---|---|---|---|---|---|---|---|"
        )
        for pattern in args.patterns:
            for target in args.targets:
                options = {
                    "pattern": pattern,
                    "target_recall": target,
                    "min_tokens": 0,
                    "executor": args.executor,
                    "inner": "eager",
                }
                parse_options(options)
                torch.compiler.reset()
                compiled: Any = torch.compile(model, backend=minference, options=options)
                with _watched(target) as found:
                    answer_logits(compiled, prompt)
                print(f"| `{pattern}` | {target} | {_row(found, target)} |", flush=True)


def _parser() -> argparse.ArgumentParser:
    def numbers(kind: type) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(prog="python -m benchmarks.recall", description=__doc__)
    parser.add_argument("--tokens", type=numbers(int), default=[2048, 4096])
    parser.add_argument("--targets", type=numbers(float), default=[0.8, 0.9, 0.95, 0.99])
    parser.add_argument("--patterns", type=numbers(str), default=["auto", "low_rank_recall"])
    parser.add_argument("--executor", default="cpu", help="one that runs on the CPU")
    parser.add_argument("--peaks", type=float, default=ranking.PEAKS, help="of low_rank_recall")
    parser.add_argument("--seed", type=int, default=3)
    return parser


@contextmanager
def _watched(target: float) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What ``_shares`` says of every call of ``attend``."""
    found: list[tuple[Tensor, Tensor]] = []
    signature = inspect.signature(dispatch.attend)

    def attend(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found.append(_shares(signature.bind(*args, **kwargs).arguments, target))
        return dispatch.attend(*args, **kwargs)

    ops.set_implementation("attend", attend)
    try:
        yield found
    finally:
        ops.set_implementation("attend", dispatch.attend)


def _shares(call: dict[str, Any], target: float) -> tuple[Tensor, Tensor]:
    """Dense weight on kept keys, [H, Lq], and two shares of the causal pairs, [H, 2]: what was kept,
    and what would be if the least blocks went by their true masses in their best rows."""
    q, k = call["q"][0], call["k"][0]
    index = AttentionIndex(*(call[name] for name in INDEX_FIELDS))
    names = ("q_offset", "left", "right", "block_q", "block_k")
    geometry = Geometry(*(call[name] for name in names))
    num_k, recall, density = k.shape[1], [], []
    key = torch.arange(num_k)
    for head in range(q.shape[0]):
        keys, shares, pairs = k[head * k.shape[0] // q.shape[0]].float(), [], [0, 0]
        for row in torch.arange(q.shape[1]).split(_ROWS):
            seen = key <= row[:, None] + geometry.q_offset
            logits = (q[head, row].float() @ keys.T * call["scale"]).masked_fill(~seen, -torch.inf)
            kept = kept_keys(index, geometry, geometry.q_offset, head, row, num_k) & seen
            weights = logits.softmax(-1)
            shares.append((weights * kept).sum(-1))
            pairs[0] += int(kept.sum())
            pairs[1] += int((_by_true_mass(weights, geometry, target) & seen).sum())
        recall.append(torch.cat(shares))
        density.append([count / (q.shape[1] * (q.shape[1] + 1) / 2) for count in pairs])
    return torch.stack(recall), torch.tensor(density)


def _by_true_mass(weights: Tensor, geometry: Geometry, target: float) -> Tensor:
    """Pairs kept of [R, Lk], bool, when blocks go while their largest masses add up to 1 - target."""
    size_q, size_k = geometry.block_q, geometry.block_k
    pad = (0, -weights.shape[1] % size_k, 0, -weights.shape[0] % size_q)
    blocks = torch.nn.functional.pad(weights, pad).unflatten(1, (-1, size_k)).sum(-1)
    mass = blocks.unflatten(0, (-1, size_q)).amax(1)
    order = mass.sort(-1)
    kept = torch.zeros_like(mass, dtype=torch.bool)
    kept.scatter_(-1, order.indices, order.values.cumsum(-1) > 1 - target)
    kept = kept.repeat_interleave(size_q, 0).repeat_interleave(size_k, 1)
    return kept[: weights.shape[0], : weights.shape[1]]


def _row(found: list[tuple[Tensor, Tensor]], target: float) -> str:
    recall = torch.cat([share for share, _ in found])
    # Float32 sums of what is all of the mass.
    held = (recall >= target - 1e-5).float().mean(-1)
    density = torch.cat([share for _, share in found]).mean(0)
    numbers = (
        recall.mean(),
        recall.mean(-1).min(),
        recall.min(),
        held.mean(),
        held.min(),
        *density,
    )
    return " | ".join(f"{float(number):.3f}" for number in numbers)


if __name__ == "__main__":
    main()
