"""Plug-ins of every kind: installed packages found by their entry points, and the documentation's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plugin_models import EXAMPLES, OPTIONS, Layers, assert_close, example, sites
from torch import Tensor, fx, nn

import sparse_compiler
from sparse_compiler import plugin_loading, plugins
from sparse_compiler.passes import architectures, mask_rules, matchers
from sparse_compiler.patterns import registry as patterns
from sparse_compiler.runtime import registry as executors

# ---- installed packages --------------------------------------------------------------------------


def install(source: Path, target: Path) -> None:
    """As `pip install --target` leaves a package, by hand where pip or setuptools is too old."""
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))
    try:
        usable = (
            bool(metadata.version("pip"))
            and int(metadata.version("setuptools").split(".")[0]) >= 77
        )
    except (metadata.PackageNotFoundError, ValueError):
        usable = False
    if usable:
        copy = target.parent / f"source_{source.name}"
        shutil.copytree(source, copy)
        flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--no-compile"]
        command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(target), copy]
        subprocess.run(command, check=True, timeout=120)
        return
    for module in project["tool"]["setuptools"]["py-modules"]:
        target.mkdir(exist_ok=True)
        shutil.copy(source / f"{module}.py", target)
    about = project["project"]
    write_metadata(target, about["name"], about["version"], about["entry-points"])


def write_metadata(target: Path, name: str, version: str, points: dict[str, Any]) -> None:
    folder = target / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (folder / "METADATA").write_text(head, encoding="utf-8")
    lines = []
    for group, entries in points.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")


PROGRAMS = {
    "matcher": """
        class Model(nn.Module):
            def forward(self, x, y):
                return torch.ops.mylib.attention(x, y, y, True)
        import mylib_attention
        model, inputs = Model(), (torch.randn(2, 90, 4, 16), torch.randn(2, 90, 2, 16))
    """,
    "mask_rule": """
        class Model(nn.Module):
            def forward(self, x, starts):
                mask = torch.ops.mylib.document_mask(starts.cumsum(-1), 40)
                return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        import mylib_masks
        model, inputs = Model(), (torch.randn(2, 4, 90, 16), torch.rand(2, 90) < .1)
    """,
    "architecture": """
        from mylib_stages import StageModel
        model, inputs = StageModel(), (torch.randn(2, 90, 32),)
    """,
    "pattern": """
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(16, 16)
            def forward(self, x):
                x = self.linear(x)
                return F.scaled_dot_product_attention(x, x, x, is_causal=True)
        model, inputs = Model(), (torch.randn(2, 4, 700, 16),)
        options["pattern"] = {"*": ("strided", 8, 16)}
    """,
}
PROGRAM = """
import json, sys, warnings
import torch, torch.nn.functional as F
from torch import nn
import sparse_compiler
torch.manual_seed(0)
options = json.loads(sys.argv[1])
{setup}
caught = warnings.catch_warnings(record=True)
with torch.inference_mode(), caught as seen:
    warnings.simplefilter("always")
    report = sparse_compiler.explain(model, inputs, options=options)
    compiled = torch.compile(model, backend="minference", options=options)
    compiled(*inputs)
    density = [layer.mean_density for layer in sparse_compiler.stats(compiled)]
    torch.compiler.reset()
    exact = torch.compile(model, backend="minference", options=options | {{"budget": 1.0}})
    error = (exact(*inputs) - model(*inputs)).abs().max().item()
texts = [str(w.message) for w in seen if "plug-in" in str(w.message)]
sites = [vars(site) | {{"conditions": None, "notes": None}} for site in report.sites]
print(json.dumps({{"sites": sites, "error": error, "density": density, "warnings": texts}}))
"""


def run_installed(kind: str, target: Path, **options: Any) -> dict[str, Any]:
    """The report on the example's model in a process where only that package is installed."""
    setup = textwrap.dedent(PROGRAMS[kind])
    path = os.pathsep.join((str(target), str(EXAMPLES.parents[1])))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(setup=setup), json.dumps(OPTIONS | options)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_an_installed_matcher_reads_its_operator(tmp_path: Path) -> None:
    target = tmp_path / "installed"
    install(EXAMPLES / "matcher", target)
    broken = {"sparse_compiler.matchers": {"gone": "a_module_that_does_not_exist:read"}}
    write_metadata(target, "broken-attention", "2.5", broken)
    found = run_installed("matcher", target)
    (site,) = found["sites"]
    assert (site["decision"], site["spelling"]) == ("rewritten", "mylib::attention")
    assert site["mask"] == "causal"
    assert site["shapes"] == {
        "query": "[2, 4, 90, 16]",
        "key": "[2, 2, 90, 16]",
        "value": "[2, 2, 90, 16]",
    }
    assert found["error"] < 1e-5
    # The package that cannot be imported is named, and nothing else suffers.
    (text,) = found["warnings"]
    assert "matcher 'gone' of broken-attention 2.5" in text
    assert "a_module_that_does_not_exist" in text


def test_an_installed_mask_rule_reads_its_operator(tmp_path: Path) -> None:
    install(EXAMPLES / "mask_rule", tmp_path / "installed")
    found = run_installed("mask_rule", tmp_path / "installed")
    (site,) = found["sites"]
    assert (site["decision"], site["mask"]) == ("rewritten", "causal, window 40, rows bounded")
    assert found["error"] < 1e-5 and not found["warnings"]


def test_an_installed_architecture_hint_names_layers_and_keeps_one_dense(tmp_path: Path) -> None:
    install(EXAMPLES / "architecture", tmp_path / "installed")
    found = run_installed("architecture", tmp_path / "installed")
    first, *others = found["sites"]
    assert (first["layer"], first["code"]) == ("stages.0.blocks.0", "HINT_DENSE")
    assert "'mylib_stages' of mylib-stages 0.1" in first["reason"]
    assert [site["decision"] for site in others] == ["rewritten"] * 3
    assert [site["pattern"] for site in others[1:]] == ["2 x a_shape(16, 128)"] * 2
    assert found["error"] < 1e-5 and not found["warnings"]


def test_an_installed_pattern_is_an_option_and_computes_fewer_pairs(tmp_path: Path) -> None:
    install(EXAMPLES / "pattern", tmp_path / "installed")
    found = run_installed("pattern", tmp_path / "installed")
    (site,) = found["sites"]
    assert (site["decision"], site["pattern"]) == ("rewritten", "4 x strided(8, 16)")
    assert 0.1 < found["density"][0] < 0.9
    assert found["error"] < 1e-5 and not found["warnings"]


# ---- public names -------------------------------------------------------------------------------


def test_every_public_name_exists_and_importing_them_loads_no_torch() -> None:
    for name in plugins.__all__:
        assert getattr(plugins, name) is not None
    assert set(plugins._HOMES) == set(plugins.__all__)
    program = "import sys, sparse_compiler.plugins; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=EXAMPLES.parents[1], timeout=60)
    with pytest.raises(AttributeError):
        plugins.no_such_name  # noqa: B018


# ---- the documentation ---------------------------------------------------------------------------


@torch.library.custom_op("mylib::window_mask", mutates_args=())
def window_mask(length: int, window: int) -> Tensor:
    place = torch.arange(length)
    back = place[:, None] - place
    return (back >= 0) & (back < window)


@window_mask.register_fake
def _(length: int, window: int) -> Tensor:
    return torch.empty(length, length, dtype=torch.bool)


class StageBlock(nn.Module):
    """The attentions that the documentation's plug-ins are about."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.ops.mylib.attention(x, x, x, True).transpose(1, 2)
        mask = torch.ops.mylib.window_mask(x.shape[2], 20)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask).transpose(1, 2)


def test_the_code_of_the_documentation_does_what_it_says() -> None:
    example("matcher", "mylib_attention")  # defines the operator
    text = (EXAMPLES.parents[1] / "docs" / "plugins.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "documentation"}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)

    class Stages(nn.Module):
        """Two stages of one block."""

        def __init__(self) -> None:
            super().__init__()
            stages = (nn.ModuleDict({"blocks": nn.ModuleList([StageBlock()])}) for _ in range(2))
            self.stages = nn.ModuleList(stages)

        def forward(self, x: Tensor) -> Tensor:
            for stage in self.stages:
                for block in stage["blocks"]:
                    x = block(x)
            return x

    x = torch.randn(1, 90, 2, 16)
    found = sparse_compiler.explain(Stages(), (x,), options=OPTIONS).sites
    assert [site.code for site in found] == ["HINT_DENSE"] * 2 + [""] * 2
    assert [site.spelling for site in found] == ["mylib::attention", "sdpa"] * 2
    assert [site.mask for site in found] == ["causal", "causal, window 20"] * 2
    assert {site.pattern for site in found[2:]} == {"2 x a_shape(128, 4096)"}
    torch.compiler.reset()
    exact = torch.compile(Stages(), backend="minference", options=OPTIONS | {"budget": 1.0})
    assert_close(exact(x), Stages()(x))


# ---- entry points that do not load ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "group", "ask"),
    [
        (matchers, "matchers", matchers.matchers),
        (mask_rules, "mask_rules", lambda: mask_rules.rule_for(fx.Graph().placeholder("x"))),
        (architectures, "architectures", lambda: sites(Layers(1))),
        (patterns, "patterns", patterns.names),
        (executors, "executors", executors.executor_names),
    ],
    ids=["matchers", "mask_rules", "architectures", "patterns", "executors"],
)
@pytest.mark.parametrize("value", ["no_such_module:x", "math:no_such", "math:pi", "antigravity_:x"])
def test_a_broken_entry_point_is_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, module: Any, group: str, ask: Callable[[], Any], value: str
) -> None:
    monkeypatch.setattr(module, "_loaded_plugins" if module is patterns else "_loaded", False)

    def points(*, group: str) -> list[EntryPoint]:
        return [EntryPoint("lost", value, group)] if group == module.ENTRY_POINT_GROUP else []

    monkeypatch.setattr(plugin_loading, "entry_points", points)
    assert f"sparse_compiler.{group}" == module.ENTRY_POINT_GROUP
    with pytest.warns(UserWarning, match=r"leaves a plug-in out: .*'lost' of module"):
        ask()
    ask()  # and once only
