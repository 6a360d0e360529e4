"""The pass around the prover: gives every site the proof of what its mask means."""

from __future__ import annotations

from torch import fx

from sparse_compiler.ir.mask import Proved, Refuted
from sparse_compiler.ir.report import Code, PassReport
from sparse_compiler.passes.context import PassContext
from sparse_compiler.passes.form import AttentionForm
from sparse_compiler.passes.given_masks import is_mask_input, rests_on_given
from sparse_compiler.passes.prove_mask import MaskProver

__all__ = ["prove_masks"]

_INPUT = "; pass a 2-D padding mask, or remove the graph break before it (TORCH_LOGS=graph_breaks shows it)"


def prove_masks(gm: fx.GraphModule, ctx: PassContext) -> PassReport:
    """Fill ``state.proof``; layers that share a mask share one proof."""
    prover = MaskProver(ctx.tensors(gm))
    touched = 0
    for _, state in ctx.states(gm):
        if state.site is None:
            continue
        form: AttentionForm = state.form
        state.proof = proof = prover.prove_form(form.axes, form.terms, form.is_causal)
        touched += 1
        if isinstance(proof, Proved) and proof.fact.row_shift and (form.sinks or form.log_sums):
            state.fail(
                Code.MASK_UNKNOWN,
                "a bias that is the same for a whole row does not cancel beside sinks or in a log-sum-exp",
            )
        if state.report is None:
            continue
        if isinstance(proof, Proved):
            state.report.mask = proof.fact.describe()
            if rests_on_given(t.where.node for t in form.terms):
                state.report.mask_given = True
                state.report.mask += " (proved before a graph break)"
        else:
            state.report.mask = f"not proved: {proof.reason}"
            refuted = isinstance(proof, Refuted)
            witness = f"; e.g. {proof.witness}" if refuted and proof.witness else ""
            if not refuted and is_mask_input(form, prover.tensors):
                code, witness = Code.MASK_INPUT, _INPUT
            else:
                code = Code.MASK_REFUTED if refuted else Code.MASK_UNKNOWN
            state.fail(code, proof.reason + witness)
    return PassReport("prove_masks", touched=touched)
