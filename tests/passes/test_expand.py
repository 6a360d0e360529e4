"""Calls of whole attention layers are opened and say the same as before."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from sparse_compiler.backend import build_context, parse_options
from sparse_compiler.ir.report import Report
from sparse_compiler.passes.manager import run_pipeline

EMBED, HEADS, LENGTH = 32, 4, 43
OPTIONS = {"budget": 1.0, "min_tokens": 0, "inner": "eager", "fallback": "silent"}
COMPOSITES = (
    F.multi_head_attention_forward,
    torch._transformer_encoder_layer_fwd,  # type: ignore[attr-defined]
    torch._native_multi_head_attention,  # type: ignore[attr-defined]
)


class Compiled:
    """One run of a model through the passes.

    Attributes:
        out: what the model returned.
        report: of the last graph.
        graphs: after the passes.
    """

    def __init__(
        self, model: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any
    ) -> None:
        options = {**OPTIONS, **kwargs.pop("options", {})}
        config = parse_options(options)
        self.report = Report()
        self.graphs: list[fx.GraphModule] = []

        def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
            ctx = build_context(gm, config)
            run_pipeline(gm, ctx)
            self.report.sites += ctx.report.sites
            self.graphs.append(gm)
            return gm.forward

        torch._dynamo.reset()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.out = torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)

    @property
    def targets(self) -> list[Any]:
        return [n.target for gm in self.graphs for n in gm.graph.nodes]

    @property
    def composites(self) -> int:
        return sum(t in COMPOSITES for t in self.targets)

    @property
    def masks(self) -> list[str]:
        return [site.mask for site in self.report.sites]

    def rewritten(self, count: int = 1) -> Compiled:
        assert [s.decision for s in self.report.sites] == ["rewritten"] * count, [
            (s.code, s.reason) for s in self.report.sites
        ]
        assert self.composites == 0
        return self

    def like(self, expected: torch.Tensor) -> Compiled:
        out = self.out[0] if isinstance(self.out, tuple) else self.out
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        return self


def eager(model: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(*args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def attention(**kwargs: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, **kwargs).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def tokens(*shape: int, seed: int = 1, size: int = EMBED) -> torch.Tensor:
    return torch.randn(*shape, size, generator=torch.Generator().manual_seed(seed))


def causal(num: int = LENGTH) -> torch.Tensor:
    return torch.ones(num, num, dtype=torch.bool).triu(1)


class Masked(nn.Module):
    """Self-attention whose causal mask is made in the graph, as models make theirs."""

    def __init__(
        self, *, as_float: bool = False, need_weights: bool = False, **kwargs: Any
    ) -> None:
        super().__init__()
        self.attention, self.need_weights = attention(**kwargs), need_weights
        self.as_float = as_float

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        num = x.shape[1]
        mask = torch.ones(num, num, dtype=torch.bool, device=x.device).triu(1)
        if self.as_float:
            mask = nn.Transformer.generate_square_subsequent_mask(num)
        out, _ = self.attention(
            x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=self.need_weights
        )
        return out


def padding_of(batch: int, num: int = LENGTH) -> torch.Tensor:
    hidden = torch.zeros(batch, num, dtype=torch.bool)
    hidden[0, -7:] = True
    return hidden


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention(dynamic: bool | None, batch_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(EMBED, HEADS, batch_first=batch_first).eval()
    x = tokens(2, LENGTH) if batch_first else tokens(LENGTH, 2)
    run = Compiled(model, x, x, x, need_weights=False, dynamic=dynamic)
    run.rewritten().like(eager(model, x, x, x, need_weights=False))
    assert run.masks == ["full"]


def test_cross_attention_of_equal_keys_and_values_and_of_different_ones() -> None:
    model = attention()
    x, y, z = tokens(2, LENGTH), tokens(2, LENGTH, seed=2), tokens(2, LENGTH, seed=3)
    for key, value in ((y, y), (y, z), (x, z)):
        run = Compiled(model, x, key, value, need_weights=False)
        run.rewritten().like(eager(model, x, key, value, need_weights=False))


def test_separate_projections_and_no_bias() -> None:
    model = attention(kdim=24, vdim=40)
    key, value = tokens(2, LENGTH, size=24), tokens(2, LENGTH, size=40)
    x = tokens(2, LENGTH)
    run = Compiled(model, x, key, value, need_weights=False)
    run.rewritten().like(eager(model, x, key, value, need_weights=False))
    bare = attention(bias=False)
    run = Compiled(bare, x, x, x, need_weights=False)
    run.rewritten().like(eager(bare, x, x, x, need_weights=False))


def test_unbatched() -> None:
    model, x = attention(), tokens(LENGTH)
    run = Compiled(model, x, x, x, need_weights=False)
    run.rewritten().like(eager(model, x, x, x, need_weights=False))
    hidden = padding_of(1)[0]
    run = Compiled(model, x, x, x, key_padding_mask=hidden, need_weights=False)
    run.rewritten().like(eager(model, x, x, x, key_padding_mask=hidden, need_weights=False))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_masks_made_in_the_graph_are_proved(
    dynamic: bool | None, as_float: bool, padded: bool
) -> None:
    model, x = Masked(as_float=as_float), tokens(2, LENGTH)
    hidden = padding_of(2)
    if as_float:  # two kinds at once make Dynamo run the layer uncompiled, for it warns
        hidden = torch.zeros(2, LENGTH).masked_fill(hidden, float("-inf"))
    args = (x, hidden) if padded else (x,)
    run = Compiled(model, *args, dynamic=dynamic)
    run.rewritten().like(eager(model, *args))
    assert run.masks[0].startswith("causal"), run.masks


def test_weights_that_nobody_reads_are_not_computed() -> None:
    model, x = Masked(need_weights=True), tokens(2, LENGTH)
    run = Compiled(model, x)
    run.rewritten().like(eager(model, x))


def test_causal_hint_is_acted_on_as_pytorch_does() -> None:
    model, x = attention(), tokens(2, LENGTH)
    given = {"attn_mask": causal(), "is_causal": True, "need_weights": False}
    run = Compiled(model, x, x, x, **given)
    run.rewritten().like(eager(model, x, x, x, **given))
    assert run.masks == ["causal"]


def test_a_mask_input_of_unknown_contents_keeps_sdpa_with_the_same_result() -> None:
    model, x = attention(), tokens(2, LENGTH)
    one_each = causal().expand(2 * HEADS, LENGTH, LENGTH).clone()
    one_each[0, :, 0] = False
    for mask in (causal(), causal().float() * -3.0, one_each):
        same = padding_of(2) if mask.dtype == torch.bool else padding_of(2).float() * -2.0
        for padding in (None, same):
            given = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": False}
            run = Compiled(model, x, x, x, **given)
            run.like(eager(model, x, x, x, **given))
            assert run.composites == 0
            (site,) = run.report.sites
            assert site.code in ("MASK_INPUT", "MASK_UNKNOWN"), site


def test_masks_of_two_kinds_in_one_call() -> None:
    model, x = attention(), tokens(LENGTH, 2)
    weights = (model.in_proj_weight, model.in_proj_bias)

    def layer(x: torch.Tensor, padding: torch.Tensor, attn_mask: torch.Tensor) -> torch.Tensor:
        return F.multi_head_attention_forward(
            *(x, x, x, EMBED, HEADS, *weights, None, None, False, 0.0),
            *(model.out_proj.weight, model.out_proj.bias, False, padding, False, attn_mask),
        )[0]

    for mask in (causal(), causal().float() * -3.0):
        for padding in (padding_of(2), padding_of(2).float() * -2.0):
            run = Compiled(layer, x, padding, mask).like(eager(layer, x, padding, mask))
            assert run.composites == 0


@pytest.mark.parametrize(
    ("kwargs", "call", "reason"),
    [
        ({}, {"need_weights": True}, "need_weights=False"),
        ({"add_bias_kv": True}, {"need_weights": False}, "bias_k"),
        ({"add_zero_attn": True}, {"need_weights": False}, "add_zero_attn"),
    ],
)
def test_what_no_form_says_stays_closed_with_a_reason(
    kwargs: dict[str, Any], call: dict[str, Any], reason: str
) -> None:
    model, x = attention(**kwargs), tokens(2, LENGTH)
    run = Compiled(model, x, x, x, **call)
    run.like(eager(model, x, x, x, **call))
    (site,) = run.report.sites
    assert (site.decision, site.code) == ("declined", "OPAQUE")
    assert reason in site.reason
    assert run.composites == 1


def test_dropout_in_training_is_seen() -> None:
    model, x = attention(dropout=0.5).train(), tokens(2, LENGTH)
    run = Compiled(model, x, x, x, need_weights=False)
    assert [s.code for s in run.report.sites] == ["DROPOUT"]


def layer(**kwargs: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    made = nn.TransformerEncoderLayer(EMBED, HEADS, 48, batch_first=True, **kwargs).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


class Encoder(nn.Module):
    """An encoder layer under a causal mask that is made in the graph."""

    def __init__(self, masked: bool, **kwargs: Any) -> None:
        super().__init__()
        self.layer, self.masked = layer(**kwargs), masked

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        num = x.shape[1]
        mask = torch.ones(num, num, dtype=torch.bool).triu(1) if self.masked else None
        return self.layer(x, src_mask=mask, src_key_padding_mask=padding)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_fast_path(
    dynamic: bool | None, masked: bool, padded: bool, norm_first: bool
) -> None:
    activation = "gelu" if norm_first else "relu"
    model, x = Encoder(masked, norm_first=norm_first, activation=activation), tokens(2, LENGTH)
    args = (x, padding_of(2)) if padded else (x,)
    run = Compiled(model, *args, dynamic=dynamic)
    run.rewritten().like(eager(model, *args))
    assert ("causal" in run.masks[0]) is masked


def test_a_float_mask_hides_wherever_it_is_not_zero_in_the_fast_path() -> None:
    model, x = layer(), tokens(2, LENGTH)
    mask = causal().float() * -1.0
    run = Compiled(model, x, src_mask=mask)
    run.like(eager(model, x, src_mask=mask))
    assert run.composites == 0


def test_layers_keep_their_numbers() -> None:
    stack = nn.TransformerEncoder(layer(), 3, enable_nested_tensor=False).eval()
    x = tokens(2, LENGTH)
    run = Compiled(stack, x)
    run.rewritten(3).like(eager(stack, x))
    assert [".0." in s.layer or s.layer.endswith(".0") for s in run.report.sites] == [
        True,
        False,
        False,
    ]


def test_decoder_layer_in_eval() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(EMBED, HEADS, 48, batch_first=True).eval()
    x, memory = tokens(2, LENGTH), tokens(2, 51, seed=4)
    run = Compiled(model, x, memory)
    run.like(eager(model, x, memory))
    assert run.composites == 0
    assert [s.code for s in run.report.sites] == ["", "CROSS"]


def test_dryrun_leaves_the_graph_alone() -> None:
    model, x = Masked(), tokens(2, LENGTH)
    run = Compiled(model, x, options={"dryrun": True})
    assert run.composites == 1
    assert [s.decision for s in run.report.sites] == ["rewritten"]
    run.like(eager(model, x))
