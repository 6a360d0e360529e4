"""The pass around the prover: gives every site the proof of what its mask means."""

from __future__ import annotations

from torch import fx

from sparse_compiler.ir.mask import Band, MaskFact, MaskProof, Proved, Refuted
from sparse_compiler.ir.report import Code, PassReport
from sparse_compiler.ir.site import AttentionSite
from sparse_compiler.passes.context import PassContext
from sparse_compiler.passes.prove_mask import MaskProver

__all__ = ["prove_masks"]


def prove_masks(gm: fx.GraphModule, ctx: PassContext) -> PassReport:
    """Fill ``state.proof``; layers that share a mask share one proof."""
    prover = MaskProver(gm.graph)
    touched = 0
    for _, state in ctx.states(gm):
        if state.site is None:
            continue
        state.proof = _prove(state.site, prover)
        touched += 1
        proof = state.proof
        if state.report is None:
            continue
        if isinstance(proof, Proved):
            state.report.mask = proof.fact.describe()
        else:
            state.report.mask = f"not proved: {proof.reason}"
            refuted = isinstance(proof, Refuted)
            witness = f"; e.g. {proof.witness}" if refuted and proof.witness else ""
            code = Code.MASK_REFUTED if refuted else Code.MASK_UNKNOWN
            state.fail(code, proof.reason + witness)
    return PassReport("prove_masks", touched=touched)


def _prove(site: AttentionSite, prover: MaskProver) -> MaskProof:
    if site.mask is not None and site.is_causal:
        return Refuted("a mask and is_causal=True are given together, which PyTorch refuses")
    if site.mask is not None:
        return prover.prove(site.mask, site.query_shape, site.key_shape)
    if site.is_causal:
        return Proved(MaskFact(Band(0, None, 0)))
    return Proved(MaskFact(Band(0, None, None)))
