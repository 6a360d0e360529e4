"""Captures graphs with Dynamo, proves their masks and compares with the real values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from sparse_compiler.ir.mask import MaskProof, Proved
from sparse_compiler.passes.prove_mask import MaskProver

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SDPA = F.scaled_dot_product_attention


@dataclass
class Proofs:
    """The proofs of every compiled graph's masks; each run checks the proved ones."""

    proofs: list[MaskProof] = field(default_factory=list)
    graphs: list[list[MaskProof]] = field(default_factory=list)
    checked: int = 0

    @property
    def last(self) -> Any:
        return self.proofs[-1]


def inputs(
    batch: int, num_q: int, num_k: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [B, 4, Lq, 8], k [B, 2, Lk, 8] and an int64 padding mask [B, Lk] of zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    pad = torch.randint(0, 2, (batch, num_k), generator=generator)
    return torch.zeros(batch, 4, num_q, 8), torch.zeros(batch, 2, num_k, 8), pad


def prove_all(masks: Callable[..., tuple[torch.Tensor, ...]], shapes: Any, dynamic: bool) -> Proofs:
    """Compiles `masks(q, k, pad)`, proves each mask, and runs the graph at each (B, Lq, Lk)."""
    torch._dynamo.reset()
    result = Proofs()

    def program(q: torch.Tensor, k: torch.Tensor, pad: torch.Tensor) -> Any:
        return tuple(SDPA(q, k, k, attn_mask=m, enable_gqa=True) for m in masks(q, k, pad))

    compiled = torch.compile(
        program, backend=lambda gm, ex: _checking(gm, result), fullgraph=True, dynamic=dynamic
    )
    for number, shape in enumerate(shapes):
        compiled(*inputs(*shape, seed=number))
    return result


def prove(mask: MaskFunction, shapes: Any = ((2, 6, 6),), dynamic: bool = False) -> Any:
    """The proof of one mask in the last graph that was compiled."""
    return prove_all(lambda q, k, pad: (mask(q, k, pad),), shapes, dynamic).last


def _checking(gm: fx.GraphModule, result: Proofs) -> Callable[..., Any]:
    nodes = list(gm.graph.nodes)
    sites = [n for n in nodes if "scaled_dot" in str(n.target)]
    q, k = sites[0].args[:2]
    prover = MaskProver(gm.graph)
    masks = [site.kwargs["attn_mask"] for site in sites]
    shapes = [n.meta["example_value"].shape for n in (q, k)]
    proofs = [prover.prove(m, *shapes) for m in masks]
    result.proofs += proofs
    result.graphs.append(proofs)
    symbols = [n.meta.get("example_value") for n in nodes if n.op == "placeholder"]

    def run(*args: Any) -> Any:
        interpreter = fx.Interpreter(gm, garbage_collect_values=False)
        outputs = interpreter.run(*args)
        known = {
            s.node.expr: a
            for s, a in zip(symbols, args, strict=True)
            if isinstance(s, torch.SymInt)
        }
        for node, proof in zip(masks, proofs, strict=True):
            if isinstance(proof, Proved):
                result.checked += 1
                _check(proof, interpreter.env[node], interpreter.env, (q, k), known)
        return outputs

    return run


def _check(proof: Proved, mask: Any, env: Any, site: Any, known: Any) -> None:
    q, k = (env[n] for n in site)
    shape = (q.shape[0], q.shape[2], k.shape[2])
    named = {node.name: value for node, value in env.items()}
    padding = named.get(proof.fact.key_padding)
    if padding is not None:
        assert padding.dim() == 2
        assert proof.fact.key_padding_is_bool == (padding.dtype == torch.bool)
    expected = proof.fact.dense(
        shape,
        lambda s: int(sympy.Integer(s).subs(known)) if isinstance(s, int) else int(s.subs(known)),
        padding,
    )
    visible = mask if mask.dtype == torch.bool else mask == 0
    visible = visible.expand(shape[0], q.shape[1], *shape[1:])
    assert torch.equal(visible, expected[:, None].expand_as(visible)), proof
