"""A grammar of written-out attention: choices in, the source text of a program out.

``CHOICES`` names what a program may choose; the first of each is the plainest. ``build`` makes the
function, ``inputs`` what to call it with. A program is ``program(q, k, v, pad, t, bias)``: pad [B, Lk]
booleans, t [H] positive floats (temperatures and sinks), bias [H, Lq, Lk].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CHOICES", "Program", "build", "inputs", "possible", "source"]

Program = Mapping[str, str]
BATCH, HEADS, KV, DIM = 2, 4, 2, 8
GROUPS = HEADS // KV
MIN = "torch.finfo(torch.float32).min"

LAYOUTS = {
    "bhld": "bhld",
    "blhd": "blhd",
    "lbhd": "lbhd",
    "merged": "nld",
    "grouped": "bkgld",
    "headless": "bld",
}
PRODUCTS = [
    "matmul",
    "at",
    "bmm",
    "baddbmm",
    "baddbmm_beta",
    "einsum",
    "einsum_dots",
    "swapped",
    "keys_turned_early",
]
CHOICES: dict[str, list[str]] = {
    "layout": list(LAYOUTS),
    "gqa": ["none", "interleave", "expand", "tiled", "broadcast"],
    "product": PRODUCTS,
    "scale": [
        "mul",
        "div",
        "q",
        "k",
        "both",
        "alpha",
        "root",
        "temperature",
        "temperature_q",
        "reciprocal",
        "none",
    ],
    "view": ["no", "yes"],
    "softcap": ["no", "yes", "div_mul"],
    "bias": ["none", "full", "row_key", "alibi", "table"],
    "mask": [
        "min",
        "inf",
        "inf_zeros",
        "masked_fill",
        "where",
        "where_not",
        "one_minus",
        "fill_",
        "fill_used",
        "add_",
        "add_used",
        "plus_assign",
        "into",
    ],
    "see": ["causal", "all", "tril", "window", "padding", "causal_padding", "bidirectional"],
    "sinks": ["none", "last", "first"],
    "minus_max": ["no", "amax", "max", "detach"],
    "softmax": ["method", "functional", "float32", "float32_back", "upcast", "exp", "logsumexp"],
    "dropout": ["none", "zero", "eval", "module"],
    "value": ["same", "wide"],
    "out": ["keep", "back", "flat", "contiguous"],
    "whole": ["single", "chunks", "chain", "pair"],
    "rows": ["square", "fewer"],
}


def possible(p: Program) -> bool:
    """Whether the choices make a program at all."""
    headed = p["layout"] in ("bhld", "blhd", "lbhd")
    flat = p["product"] in ("bmm", "baddbmm", "baddbmm_beta")
    return not (
        (p["gqa"] != "none" and not headed)
        or (p["gqa"] == "broadcast" and (flat or p["product"].startswith("einsum")))
        or (p["scale"] == "alpha" and not p["product"].startswith("baddbmm"))
        or (p["scale"] in ("q", "both", "temperature_q") and p["rows"] == "fewer" and flat)
        or (p["view"] == "yes" and not (flat and p["layout"] != "headless"))
        or (p["product"] == "einsum_dots" and p["layout"] in ("blhd", "lbhd", "grouped"))
        or (p["whole"] == "chunks" and (not headed or p["gqa"] != "none"))
        or (p["whole"] in ("chain", "pair") and (p["value"] == "wide" or p["out"] == "flat"))
        or (p["whole"] == "chain" and p["layout"] in ("blhd", "lbhd") and p["out"] != "back")
        or (p["whole"] == "chain" and (p["rows"] == "fewer" or p["gqa"] == "broadcast"))
        or (p["whole"] == "pair" and p["bias"] != "none")
        or (p["whole"] == "chain" and p["layout"] == "grouped" and flat)
        or (p["out"] == "flat" and p["layout"] in ("merged", "headless"))
        or (p["product"] == "baddbmm_beta" and p["softcap"] != "no")
        or (p["softmax"] in ("exp", "logsumexp") and p["sinks"] != "none")
    )


class _Text:
    """The lines of one attention; ``rank`` says how its scores lie: bhij, nij, bkgij or bij."""

    def __init__(self, p: Program) -> None:
        self.p, self.axes = p, LAYOUTS[p["layout"]]
        self.lines: list[str] = []
        self.flat = p["product"] in ("bmm", "baddbmm", "baddbmm_beta")
        self.einsum = p["product"].startswith("einsum")
        self.rank = {"merged": "nij", "headless": "bij", "grouped": "bkgij"}.get(
            p["layout"], "bhij"
        )

    def add(self, *lines: str) -> None:
        self.lines += lines

    def per_head(self, name: str) -> str:
        """A tensor [H], so that it broadcasts with the scores."""
        return {
            "bhij": f"{name}[:, None, None]",
            "nij": f"{name}.repeat(b)[:, None, None]",
            "bkgij": f"{name}.view({KV}, {GROUPS}, 1, 1)",
            "bij": f"{name}[0]",
        }[self.rank]

    def wide(self, name: str, batched: bool) -> str:
        """[B, Lk] (batched) or [H, Lq, Lk], so that it broadcasts with the scores."""
        if batched:
            nones = ", ".join(["None"] * (len(self.rank) - 2))
            whole = f"{name}.repeat_interleave(h, 0)" if self.rank == "nij" else name
            return f"{whole}[:, {nones}, :]"
        return {
            "bhij": name,
            "nij": f"{name}.repeat(b, 1, 1)",
            "bkgij": f"{name}.unflatten(0, ({KV}, {GROUPS}))",
            "bij": f"{name}[0]",
        }[self.rank]

    def arrange(self) -> None:
        """Sizes, heads in front (except for einsum) and repeated key heads."""
        p, axes = self.p, self.axes
        heads = f"q.shape[{axes.index('h')}]" if "h" in axes else "t.shape[0]"
        length = axes.index("l")
        self.add(
            f"h, i, j = {heads}, q.shape[{length}], k.shape[{length if 'g' not in axes else 2}]"
        )
        self.add(f"b = q.shape[{axes.index('b')}]" if "b" in axes else "b = q.shape[0] // h")
        moves = {"blhd": "transpose(1, 2)", "lbhd": "permute(1, 2, 0, 3)"}
        if p["layout"] in moves and not self.einsum:
            self.add(*(f"{n} = {n}.{moves[p['layout']]}" for n in "qkv"))
            axes = "bhld"
        self.now = axes
        if p["gqa"] != "none":
            self.repeat(axes.index("h"))
        if p["layout"] == "grouped" and not self.einsum:
            self.add("k, v = k[:, :, None], v[:, :, None]")
            if self.flat:
                wide = f".expand(-1, -1, {GROUPS}, -1, -1).flatten(0, 2)"
                self.add("q = q.flatten(0, 2)", f"k, v = k{wide}, v{wide}")
        elif self.flat and p["layout"] in ("bhld", "blhd", "lbhd"):
            self.add(*(f"{n} = {n}.reshape(b * h, -1, {n}.shape[-1])" for n in "qkv"))
        if self.flat and p["layout"] != "headless":
            self.rank = "nij"

    def repeat(self, axis: int) -> None:
        for n in "kv":
            tiles = ", ".join(str(GROUPS) if a == axis else "1" for a in range(4))
            minus = ["-1"] * 5
            minus[axis + 1] = str(GROUPS)
            text = {
                "interleave": f"{n}.repeat_interleave({GROUPS}, dim={axis})",
                "expand": f"{n}.unsqueeze({axis + 1}).expand({', '.join(minus)})"
                f".reshape(*{n}.shape[:{axis}], h, *{n}.shape[{axis + 1}:])",
                "tiled": f"{n}.repeat({tiles})",
                "broadcast": f"{n}.unsqueeze({axis + 1})",
            }[self.p["gqa"]]
            self.add(f"{n} = {text}")
        if self.p["gqa"] == "broadcast":
            self.add(f"q = q.unflatten(1, ({KV}, {GROUPS}))")
            self.rank = "bkgij"

    def scores(self) -> None:
        p, scale = self.p, self.p["scale"]
        if scale in ("q", "both"):
            self.add("q = q * 0.4" if scale == "q" else "q = q / 1.5")
        if scale in ("k", "both"):
            self.add("k = k * 0.4")
        if scale == "temperature_q":
            text = "t[:, None]" if self.einsum and self.now in ("blhd",) else self.per_head("t")
            if self.einsum and self.now == "lbhd":
                text = "t[:, None]"
            self.add(f"q = q * {text}")
        letters = self.now.replace("l", "i")
        keys = letters.replace("i", "j").replace("g", "")
        alpha = 0.35 if scale == "alpha" else 1
        base = "torch.empty(q.shape[0], i, j)"
        beta = 0
        if p["product"] == "baddbmm_beta":
            base, beta = self.wide("bias", False) if self.rank == "nij" else "bias[:1]", 0.5
        self.add(
            {
                "matmul": "s = torch.matmul(q, k.transpose(-1, -2))",
                "at": "s = q @ k.mT",
                "swapped": "s = (k @ q.transpose(-2, -1)).transpose(-2, -1)",
                "keys_turned_early": "turned = k.transpose(-2, -1).contiguous()\n    s = q @ turned",
                "bmm": "s = torch.bmm(q, k.transpose(1, 2))",
                "einsum": f"s = torch.einsum('{letters},{keys}->{self.rank}', q, k)",
                "einsum_dots": "s = torch.einsum('... x d, ... y d -> ... x y', q, k)",
            }.get(
                p["product"],
                f"s = torch.baddbmm({base}, q, k.transpose(1, 2), beta={beta}, alpha={alpha})",
            )
        )
        if p["view"] == "yes":
            self.add("s = s.view(b, h, i, j)")
            self.rank = "bhij"
        self.add(
            {
                "mul": "s = s * 0.35",
                "div": "s = s / math.sqrt(q.size(-1))",
                "root": "s = s / torch.sqrt(torch.tensor(q.size(-1), dtype=torch.float32))",
                "temperature": f"s = s * {self.per_head('t')}",
                "reciprocal": "s = 0.35 * s",
            }.get(scale, "s = s")
        )

    def logits(self) -> None:
        p = self.p
        if p["softcap"] == "yes":
            self.add("s = 3.0 * torch.tanh(s / 3.0)")
        elif p["softcap"] == "div_mul":
            self.add("s = s / 3.0", "s = torch.tanh(s)", "s = s * 3.0")
        if p["bias"] == "full":
            self.add(f"s = s + {self.wide('bias', False)}")
        elif p["bias"] == "row_key":
            self.add("s = s + bias[0]")
        elif p["bias"] == "table":
            self.add("away = torch.arange(j)[None, :] - torch.arange(i)[:, None]")
            self.add("table = t[:, None] * torch.linspace(-1, 1, i + j)")
            self.add("near = table[:, away + i]", f"s = s + {self.wide('near', False)}")
        elif p["bias"] == "alibi":
            self.add("away = torch.arange(j)[None, :] - torch.arange(i)[:, None] - (j - i)")
            self.add(f"s = s - {self.per_head('t')} * away.abs()")
        if p["see"] != "all":
            self.mask()
        if p["sinks"] != "none":
            self.add(f"column = {self.per_head('t')}.expand(*s.shape[:-1], 1)")
            parts = "[s, column]" if p["sinks"] == "last" else "[column, s]"
            self.add(f"s = torch.cat({parts}, dim=-1)")
        self.add(
            {
                "amax": "s = s - s.amax(-1, keepdim=True)",
                "max": "s = s - s.max(dim=-1, keepdim=True).values",
                "detach": "s = s - s.amax(dim=-1, keepdim=True).detach()",
            }.get(p["minus_max"], "s = s")
        )

    def mask(self) -> None:
        p = self.p
        self.add("row, key = torch.arange(i)[:, None] + (j - i), torch.arange(j)[None, :]")
        pad = self.wide("pad", True)
        see = {
            "causal": "key <= row",
            "tril": "torch.ones(i, j, dtype=torch.bool).tril(j - i)",
            "window": "(key <= row) & (row - key < 9)",
            "padding": pad,
            "causal_padding": f"(key <= row) & {pad}",
            "bidirectional": "(row - key).abs() < 7",
        }[p["see"]]
        self.add(f"see = {see}")
        added = f"torch.where(see, 0.0, {MIN})"
        self.add(
            {
                "min": f"s = s + {added}",
                "inf": "s = s + torch.where(see, 0.0, float('-inf'))",
                "inf_zeros": "s = s + torch.zeros(see.shape).masked_fill(~see, float('-inf'))",
                "masked_fill": "s = s.masked_fill(~see, float('-inf'))",
                "where": f"s = torch.where(see, s, {MIN})",
                "where_not": "s = torch.where(see.logical_not(), torch.tensor(float('-inf')), s)",
                "one_minus": f"s = s + (1.0 - see.to(s.dtype)) * {MIN}",
                "fill_": "s.masked_fill_(~see, float('-inf'))",
                "fill_used": f"s = s.masked_fill_(see == 0, {MIN})",
                "add_": f"s.add_({added})",
                "add_used": f"s = s.add_({added})",
                "plus_assign": f"s += {added}",
                "into": "s = s.clone()\n    s.masked_fill_(~see, float('-inf'))",
            }[p["mask"]]
        )

    def weights(self) -> None:
        p = self.p
        self.add(
            {
                "method": "w = s.softmax(-1)",
                "functional": f"w = F.softmax(s, dim={len(self.rank) - 1})",
                "float32": "w = torch.softmax(s, -1, dtype=torch.float32)",
                "float32_back": "w = F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype)",
                "upcast": "w = torch.softmax(s.float(), dim=-1).type_as(s)",
                "exp": "e = torch.exp(s - s.amax(-1, keepdim=True))\n    w = e / e.sum(-1, keepdim=True)",
                "logsumexp": "w = torch.exp(s - torch.logsumexp(s, -1, keepdim=True))",
            }[p["softmax"]]
        )
        cut = {"last": "w = w[..., :-1]", "first": "w = w[..., 1:]"}.get(p["sinks"])
        if cut:
            self.add(cut)
        self.add(
            {
                "zero": "w = F.dropout(w, p=0.0)",
                "eval": "w = F.dropout(w, 0.1, training=False)",
                "module": "w = torch.nn.functional.dropout(w, 0.2, False, False)",
            }.get(p["dropout"], "w = w")
        )
        if p["view"] == "yes":
            self.add("w = w.view(b * h, i, j)")

    def output(self) -> None:
        p, letters = self.p, self.now
        value = letters.replace("l", "j").replace("g", "")
        out = letters.replace("l", "i")
        if p["product"] == "einsum" and p["out"] == "back":
            self.add(f"o = torch.einsum('{self.rank},{value}->{out}', w, v)", "return o")
            return
        heads_first = self.rank if self.rank != "nij" or self.flat else "nij"
        self.add(
            {
                "einsum": f"o = torch.einsum('{self.rank},{value}->{heads_first[:-1]}d', w, v)",
                "einsum_dots": "o = torch.einsum('... x y, ... y d -> ... x d', w, v)",
                "swapped": "o = (v.mT @ w.mT).mT",
                "at": "o = w @ v",
                "matmul": "o = torch.matmul(w, v)",
                "keys_turned_early": "o = w.matmul(v)",
            }.get(p["product"], "o = torch.bmm(w, v)")
        )
        if self.flat and p["layout"] not in ("merged", "headless"):
            self.add("o = o.view(b, h, i, -1)")
        elif self.rank == "bkgij" and p["layout"] != "grouped":
            self.add("o = o.flatten(1, 2)")
        grouped = p["layout"] == "grouped" and not self.flat
        if p["out"] == "back" and p["layout"] in ("blhd", "lbhd"):
            turn = "transpose(1, 2)" if p["layout"] == "blhd" else "permute(2, 0, 1, 3)"
            self.add(f"o = o.{turn}")
        elif p["out"] == "flat":
            self.add("o = o.flatten(1, 2)" if grouped else "o = o")
            self.add("o = o.transpose(1, 2).reshape(b, i, -1)")
        elif p["out"] == "contiguous":
            self.add("o = o.contiguous()")
        self.add("return o")


def source(p: Program) -> str:
    """Text of the program: ``attention``, and ``program`` that calls it."""
    text = _Text(p)
    text.arrange()
    text.scores()
    text.logits()
    text.weights()
    text.output()
    names = "q, k, v, pad, t, bias"
    lines = [f"def attention({names}):", *(f"    {x}" for x in text.lines if x not in _NOTHING)]
    axis = LAYOUTS[p["layout"]].find("h")
    if p["whole"] == "chunks":
        parts = ", ".join(f"x.chunk(2, {axis})" for x in "qkv").replace("x.", "{}.").format(*"qkv")
        joined = {"back": axis, "flat": 2}.get(p["out"], 1)
        calls = f"attention(*a, pad, *c) for *a, c in zip({parts}, zip(t.chunk(2), bias.chunk(2)))"
        body = f"    return torch.cat([{calls}], {joined})"
    elif p["whole"] == "chain":
        body = (
            f"    first = attention({names})\n    return attention(first + q, k, v, pad, t, bias)"
        )
    elif p["whole"] == "pair":
        body = f"    first = attention({names})\n    return first - attention(q * 0.5, {names[3:]})"
    else:
        body = f"    return attention({names})"
    return "\n".join([*lines, "", f"def program({names}):", body, ""])


_NOTHING = {"s = s", "w = w", "o = o"}


def build(p: Program) -> Callable[..., Tensor]:
    """The program as a function."""
    scope: dict[str, object] = {"torch": torch, "F": F, "math": math}
    exec(compile(source(p), "<spelling>", "exec"), scope)
    return scope["program"]  # type: ignore[return-value]


def inputs(p: Program, length: int = 24, seed: int = 0) -> tuple[Tensor, ...]:
    """What to call the program with; no row is without a visible key."""
    draw = torch.Generator().manual_seed(seed)
    axes = LAYOUTS[p["layout"]]
    rows = length - 7 if p["rows"] == "fewer" else length

    def tensor(heads: int, tokens: int, dim: int, axes: str) -> Tensor:
        size = {"b": BATCH, "h": heads, "l": tokens, "d": dim, "n": BATCH * HEADS} | {
            "k": KV,
            "g": GROUPS,
        }
        return torch.randn([size[a] for a in axes], generator=draw)

    kv = KV if p["gqa"] != "none" else HEADS
    q = tensor(HEADS, rows, DIM, axes)
    k = tensor(kv, length, DIM, axes.replace("g", ""))
    v = tensor(kv, length, DIM + 4 if p["value"] == "wide" else DIM, axes.replace("g", ""))
    pad = torch.ones(BATCH, length, dtype=torch.bool)
    pad[0, 5:8] = pad[1, -2:] = False
    t = torch.rand(HEADS, generator=draw) + 0.3
    bias = torch.randn(HEADS, rows, length, generator=draw)
    return q, k, v, pad, t, bias
