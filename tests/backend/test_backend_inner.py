"""The backend by its name, the compiler behind it, and what importing the package touches."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from backend_calls import ATTEND, block_and_input
from torch import fx

from sparse_compiler.explanation import report_of
from sparse_compiler.testing import assert_close

BY_NAME = """
import sys, warnings
import torch
import torch.nn.functional as F
warnings.simplefilter("error", UserWarning)
q, k, v = torch.randn(3, 1, 2, 70, 16).unbind(0)
f = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
assert "sparse_compiler" not in sys.modules
assert "minference" in torch._dynamo.list_backends()
options = {"min_tokens": 0, "inner": "eager", "budget": 1.0}
with torch.inference_mode():
    out = torch.compile(f, backend="minference", options=options)(q, k, v)
torch.testing.assert_close(out, f(q, k, v), rtol=1e-4, atol=1e-4)
from sparse_compiler.runtime import recorder
assert recorder.read(0) is not None
try:
    torch.compile(f, backend="minference", options={"budget": 3})(q, k, v)
except Exception as error:
    assert "budget" in str(error), error
else:
    raise AssertionError("budget 3 was taken")
"""

IMPORT = """
import sys
import sparse_compiler
assert "torch" not in sys.modules
import sparse_compiler.ops, sparse_compiler.runtime.dispatch, sparse_compiler.patterns.registry
import torch
assert "triton" not in sys.modules, "triton was imported"
assert not torch.cuda.is_initialized()
# From here on torch's own compiler is loaded, which looks for Triton itself.
for name in sparse_compiler.__all__:
    getattr(sparse_compiler, name)
assert not torch.cuda.is_initialized()
try:
    sparse_compiler.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError("unknown attribute was found")
"""


@pytest.mark.parametrize("program", [BY_NAME, IMPORT], ids=["by name", "import"])
def test_programs_of_their_own(program: str) -> None:
    """By its name without an import; and importing the package touches neither CUDA nor Triton."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def compiled_by(monkeypatch: pytest.MonkeyPatch, **keywords: Any) -> dict[str, Any]:
    """What reaches Inductor; compiling with it in every test would take minutes."""
    seen: dict[str, Any] = {}

    def compile_fx(gm: fx.GraphModule, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs, args=args, ops=[n.target for n in gm.graph.nodes])
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    model, x = block_and_input(64)
    out = torch.compile(model, backend="minference", **keywords)(x)
    assert_close(out, model(x), length=64)
    return seen


@pytest.mark.parametrize("keywords", [{}, {"options": {}}, {"options": None}])
def test_no_options_mean_the_defaults(
    monkeypatch: pytest.MonkeyPatch, keywords: dict[str, Any]
) -> None:
    # Short prompts stay dense by default.
    assert ATTEND not in compiled_by(monkeypatch, **keywords)["ops"]


def test_a_mode_reaches_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = compiled_by(monkeypatch, mode="max-autotune-no-cudagraphs")
    assert "max_autotune" in str(seen.get("config_patches")) + str(seen["args"])


def test_inner_options_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"min_tokens": 0, "budget": 1.0, "inner_options": {"max_autotune": True}}
    seen = compiled_by(monkeypatch, options=options)
    assert ATTEND in seen["ops"]
    assert "max_autotune" in str(seen.get("config_patches")) + str(seen["args"])


def test_inductor_compiles_the_rewritten_graph_once_for_all_lengths() -> None:
    model, x = block_and_input(96)
    options = {"min_tokens": 0, "budget": 1.0}
    compiled = torch.compile(model, backend="minference", options=options, dynamic=True)
    for length in (96, 64):
        part = x[:, :length].contiguous()
        assert_close(compiled(part), model(part), length=length)
    # Dynamo may call a backend again for one graph; the abandoned attempt leaves no report.
    assert len(report_of(model).reports) == 1
    assert report_of(model).rewritten == 1
