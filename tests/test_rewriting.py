"""``rewrite``: exported programs and graphs of ATen operators run the operators and stay valid."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import sparse_compiler
from sparse_compiler.errors import OptionInvalid
from sparse_compiler.rewriting import rewrite, rewrite_and_report

OPTIONS = {"budget": 1.0, "min_tokens": 0, "fallback": "silent"}
ATTEND = torch.ops.sparse_compiler.attend.default
LENGTH = 43


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Block(nn.Module):
    """A layer as Llama has it: grouped heads, rotary positions, causal and padding masks."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.qkv, self.out, self.window = nn.Linear(32, 64), nn.Linear(32, 32), window
        self.norm = nn.LayerNorm(32)
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.tensor([1.0, 0.1, 0.01, 0.001]))

    def rotated(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2])[:, None] * self.frequencies
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).split([32, 16, 16], -1)
        q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        at = torch.arange(x.shape[1])
        mask = (at[None, :] <= at[:, None]) & (at[:, None] - at[None, :] < self.window)
        mask = mask & seen[:, None, None, :].bool()
        out = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, attn_mask=mask)
        return x + self.out(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, num: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(9 + n) for n in range(num))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, seen)
        return x


def inputs(length: int = LENGTH) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(length)
    seen = torch.ones(2, length, dtype=torch.int64)
    seen[0, -5:] = 0
    return torch.randn(2, length, 32, generator=g), seen


def exported(model: nn.Module, *, dynamic: bool = False, **more: Any) -> ExportedProgram:
    num = Dim("num", min=8, max=4096)
    shapes = {"x": {1: num}, "seen": {1: num}} if dynamic else None
    return export(model, inputs(), dynamic_shapes=shapes, **more)


def count(program: ExportedProgram | fx.GraphModule, target: Any = ATTEND) -> int:
    return sum(n.target is target for n in program.graph.nodes)


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def check(program: ExportedProgram, model: nn.Module, *lengths: int) -> None:
    """Equal to the model, and to itself when it comes back from a file; operators only."""
    for node in program.graph.nodes:
        assert node.op != "call_method", node.format_node()
        assert "example_value" not in node.meta
        assert not node.users or "val" in node.meta, node.format_node()
    back = saved_and_loaded(program)
    for length in lengths or (LENGTH,):
        given = inputs(length)
        for module in (program.module(), back.module()):
            torch.testing.assert_close(module(*given), model(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_program(dynamic: bool, strict: bool) -> None:
    model = Model().eval()
    program = exported(model, dynamic=dynamic, strict=strict)
    before = str(program.graph)
    made, report = rewrite_and_report(program, options=OPTIONS)
    assert [s.decision for s in report.sites] == ["rewritten"] * 2, report.sites
    assert [s.layer for s in report.sites] == ["layers.0", "layers.1"]
    assert [s.mask for s in report.sites] == [f"causal, window {n}, key padding" for n in (9, 10)]
    assert count(made) == 2
    check(made, model, *((LENGTH, 71) if dynamic else ()))
    assert str(program.graph) == before
    assert count(program) == 0


def test_added_tensors_are_constants_of_the_program() -> None:
    program = exported(Model().eval())
    made = rewrite(program, options=OPTIONS)
    kinds = [s.kind for s in made.graph_signature.input_specs]
    # Both layers have the same patterns and share one table.
    assert kinds.count(InputKind.CONSTANT_TENSOR) == 1
    assert kinds.index(InputKind.CONSTANT_TENSOR) < kinds.index(InputKind.USER_INPUT)
    names = [n.name for n in made.graph.nodes if n.op == "placeholder"]
    assert names == [s.arg.name for s in made.graph_signature.input_specs]
    assert dict(made.named_parameters()).keys() == dict(program.named_parameters()).keys()
    assert made.state_dict.keys() == program.state_dict.keys()


@pytest.mark.parametrize("dynamic", [False, True])
def test_decomposed_program(dynamic: bool) -> None:
    model = Model().eval()
    program = exported(model, dynamic=dynamic).run_decompositions()
    made, report = rewrite_and_report(program, options=OPTIONS)
    assert [s.decision for s in report.sites] == ["rewritten"] * 2, report.sites
    check(made, model, *((LENGTH, 71) if dynamic else ()))


def test_a_rewritten_program_can_be_decomposed_and_compiled() -> None:
    model = Model().eval()
    made = rewrite(exported(model, dynamic=True), options=OPTIONS)
    check(made.run_decompositions(), model, LENGTH, 71)
    compiled = torch.compile(made.module(), backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs()), model(*inputs()), rtol=1e-5, atol=1e-5)


def test_what_is_declined_keeps_its_operators() -> None:
    model = Model().eval()
    for program in (exported(model), exported(model).run_decompositions()):
        made, report = rewrite_and_report(program, options={**OPTIONS, "min_tokens": 4096})
        assert [s.code for s in report.sites] == ["SHORT"] * 2
        targets = sorted(str(n.target) for n in made.graph.nodes if n.op == "call_function")
        old = sorted(str(n.target) for n in program.graph.nodes if n.op == "call_function")
        assert targets == old
        check(made, model)


def test_composite_layers() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = inputs()[0]
    num = Dim("num", min=8, max=4096)
    for strict in (False, True):
        program = export(model, (x,), dynamic_shapes={"src": {1: num}}, strict=strict)
        made, report = rewrite_and_report(program, options=OPTIONS)
        assert report.rewritten == 2, report.sites
        for length in (LENGTH, 71):
            x = inputs(length)[0]
            out = saved_and_loaded(made).module()(x)
            torch.testing.assert_close(out, model(x), rtol=1e-5, atol=1e-5)


class Recorder(nn.Module):
    """Counts its calls in a buffer and gives the attention and a size."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.add_(1)
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True), x.sum()


def test_buffers_that_are_written_and_outputs_that_are_replaced() -> None:
    program = export(Recorder(), inputs()[:1])
    for given in (program, program.run_decompositions()):
        made = rewrite(given, options=OPTIONS)
        assert count(made) == 1
        module = saved_and_loaded(made).module()
        x = inputs()[0]
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        expected = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        for calls in (1, 2):
            torch.testing.assert_close(module(x)[0], expected, rtol=1e-5, atol=1e-5)
            assert float(module.state_dict()["calls"]) == calls


def test_graph_modules() -> None:
    model = Model().eval()
    module = exported(model, dynamic=True).module()
    traced = make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs())
    for gm in (module, traced):
        made, report = rewrite_and_report(gm, options=OPTIONS)
        assert isinstance(made, fx.GraphModule)
        assert report.rewritten == count(made) == 2, report.sites
        assert count(gm) == 0
        torch.testing.assert_close(made(*inputs()), model(*inputs()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rewrite(module, options=OPTIONS)(*inputs(71)), model(*inputs(71)))


def test_checks_of_inputs_stay() -> None:
    made = rewrite(exported(Model().eval(), dynamic=True).module(), options=OPTIONS)
    assert any(n.op == "call_module" for n in made.graph.nodes)


def test_dryrun_and_wrong_options() -> None:
    program = exported(Model().eval())
    made, report = rewrite_and_report(program, options={**OPTIONS, "dryrun": True})
    assert made is program
    assert report.rewritten == 2
    with pytest.raises(OptionInvalid):
        rewrite(program, options={"buget": 1})
    assert sparse_compiler.rewrite is rewrite


def test_fused_kernels_of_lowered_graphs() -> None:
    """They are read as what they compute, and stay where nothing else can be done."""
    target = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    gm = make_fx(Model().eval(), tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs())
    assert count(gm, target) == 2
    made = rewrite(gm, options=OPTIONS)
    assert (count(made, target), count(made)) == (0, 2)
    made = rewrite(gm, options={**OPTIONS, "min_tokens": 4096})
    assert (count(made, target), count(made)) == (2, 0)
    torch.testing.assert_close(made(*inputs()), gm(*inputs()))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_transformers_model(dynamic: bool, attn: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, attn_implementation=attn,
    )  # fmt: skip
    inner = transformers.LlamaForCausalLM(config).eval()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = inner

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(input_ids=ids, use_cache=False).logits

    model = Logits().eval()
    shapes = {"ids": {1: Dim("num", min=8, max=4096)}} if dynamic else None
    program = export(model, (torch.randint(64, (2, LENGTH)),), dynamic_shapes=shapes)
    made, report = rewrite_and_report(program, options=OPTIONS)
    assert [s.decision for s in report.sites] == ["rewritten"] * 2, report.sites
    module = saved_and_loaded(made).module()
    for length in (LENGTH, 71) if dynamic else (LENGTH,):
        ids = torch.randint(64, (2, length))
        torch.testing.assert_close(module(ids), model(ids), rtol=1e-4, atol=1e-5)


def test_a_key_whose_last_stride_is_not_one_is_read_as_it_lies() -> None:
    """Decomposed programs keep keys transposed; PyTorch's fused CPU kernel takes them for rows."""

    class Transposed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.unflatten(-1, (4, 8)).transpose(1, 2)
            t = q.transpose(2, 3).contiguous().transpose(2, 3)
            return F.scaled_dot_product_attention(t, t, t, is_causal=True)

    for length in (LENGTH, 300):
        x = inputs(length)[0]
        made = rewrite(export(Transposed(), (x,)), options=OPTIONS)
        assert count(made) == 1
        torch.testing.assert_close(made.module()(x), Transposed()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(sys.platform == "win32", reason="paths")
def test_a_saved_program_loads_in_a_new_process(tmp_path: Any) -> None:
    import subprocess

    model = Model().eval()
    given = inputs()
    torch.export.save(rewrite(exported(model), options=OPTIONS), tmp_path / "program.pt2")
    torch.save((given, model(*given)), tmp_path / "expected.pt")
    code = (
        "import torch, sparse_compiler.backend\n"
        f"given, expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"program = torch.export.load({str(tmp_path / 'program.pt2')!r})\n"
        "torch.testing.assert_close(program.module()(*given), expected, rtol=1e-5, atol=1e-5)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
