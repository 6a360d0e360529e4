"""Plug-ins of every kind: installed packages found by their entry points, decorators, wrong ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module, metadata
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sparse_compiler
from sparse_compiler import plugin_loading, plugins
from sparse_compiler.errors import PatternInvalid, PluginFailed
from sparse_compiler.explanation import report_of
from sparse_compiler.ir.report import SiteReport
from sparse_compiler.passes import architectures, mask_rules, matchers
from sparse_compiler.patterns import registry as patterns
from sparse_compiler.runtime import registry as executors
from sparse_compiler.runtime.cpu_executor import CpuExecutor

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "plugins"
OPTIONS: dict[str, Any] = {"min_tokens": 0, "inner": "eager", "executor": "cpu"}


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


# ---- decorators, in this process -----------------------------------------------------------------


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it; no package of this machine takes part."""
    tables = (
        (matchers, "_added"),
        (mask_rules, "_rules"),
        (architectures, "_hints"),
        (patterns, "_PATTERNS"),
        (patterns, "_SOURCES"),
        (executors, "_added"),
    )
    for module, name in tables:
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    for module in (matchers, mask_rules, architectures, executors):
        monkeypatch.setattr(module, "_loaded", True)
    monkeypatch.setattr(patterns, "_loaded_plugins", True)
    with torch.inference_mode():
        yield


class Attention(nn.Module):
    """Attention over a mask that ``make(length)`` builds."""

    def __init__(self, make: Callable[[int], Tensor] | None = None) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        if self.make is None:
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=self.make(x.shape[2]))


class Layers(nn.Module):
    """Attentions in a list."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


X = torch.randn(1, 2, 80, 16)


def sites(model: nn.Module, **options: Any) -> list[SiteReport]:
    return sparse_compiler.explain(model, (X,), options=OPTIONS | options).sites


def compiled(model: nn.Module, **options: Any) -> Tensor:
    return torch.compile(model, backend="minference", options=OPTIONS | options)(X)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def failure(model: nn.Module, **options: Any) -> PluginFailed:
    """The error of a compilation, found behind what Dynamo wraps it into."""
    with pytest.raises(Exception, match="must be") as caught:
        sites(model, **options)
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, PluginFailed):
        error = error.__cause__ or getattr(error, "inner_exception", None)
    assert isinstance(error, PluginFailed), caught.value
    return error


def test_every_public_name_exists_and_importing_them_loads_no_torch() -> None:
    for name in plugins.__all__:
        assert getattr(plugins, name) is not None
    assert set(plugins._HOMES) == set(plugins.__all__)
    program = "import sys, sparse_compiler.plugins; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=EXAMPLES.parents[1], timeout=60)
    with pytest.raises(AttributeError):
        plugins.no_such_name  # noqa: B018


@plugins.matcher
def _never(node: fx.Node, tensors: Any) -> None:
    """Registered when this file is imported, and gone from the tables that tests use."""


matchers._added.pop(_never)


def example(kind: str, module: str) -> Any:
    """The module of an example that is not installed."""
    sys.path.insert(0, str(EXAMPLES / kind))
    try:
        return import_module(module)
    finally:
        sys.path.remove(str(EXAMPLES / kind))


def is_sdpa(node: fx.Node) -> bool:
    return node.target is F.scaled_dot_product_attention


def test_a_decorated_matcher_is_asked_before_the_built_in_ones() -> None:
    @plugins.matcher
    def capped(node: fx.Node, tensors: Any) -> plugins.AttentionForm | None:
        if not is_sdpa(node):
            return None
        form = matchers.match_sdpa(node, tensors)
        assert form is not None
        return replace(form, spelling="mine")

    assert plugins.matcher(capped) is capped
    (site,) = sites(Attention())
    assert (site.spelling, site.decision) == ("mine", "rewritten")


def test_the_example_matcher_serves_every_length_of_a_dynamic_graph() -> None:
    library = example("matcher", "mylib_attention")
    plugins.matcher(library.read_attention)

    class Library(nn.Module):
        """A layer of the library."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, q: Tensor, kv: Tensor) -> Tensor:
            return library.attention(self.linear(q), kv, kv, causal=True)

    model = Library()
    run = torch.compile(
        model, backend="minference", dynamic=True, options=OPTIONS | {"budget": 1.0}
    )
    for length in (50, 70):
        inputs = torch.randn(2, length, 4, 16), torch.randn(2, length, 2, 16)
        assert_close(run(*inputs), model(*inputs))
    (site,) = report_of(model).sites
    assert (site.spelling, site.decision) == ("mylib::attention", "rewritten")


def test_a_matcher_that_does_not_understand_leaves_the_node_to_others() -> None:
    @plugins.matcher
    def puzzled(node: fx.Node, tensors: Any) -> plugins.AttentionForm | None:
        raise plugins.NotUnderstood("no idea")

    (site,) = sites(Attention())
    assert (site.spelling, site.decision) == ("sdpa", "rewritten")


def test_a_matcher_may_say_why_an_attention_cannot_be_read() -> None:
    @plugins.matcher
    def declines(node: fx.Node, tensors: Any) -> plugins.AttentionForm | None:
        if not is_sdpa(node):
            return None
        return plugins.unread_form(node, node, tensors, (plugins.Code.OPAQUE, "my own reason"))

    (site,) = sites(Attention())
    assert (site.code, site.reason) == ("OPAQUE", "my own reason")


def wrong_forms() -> dict[str, tuple[Callable[[Any, fx.Node], Any], str]]:
    def more(form: Any, node: fx.Node) -> Any:
        return replace(form, query=replace(form.query, index=(*form.query.index, 0)))

    def keys_in_query(form: Any, node: fx.Node) -> Any:
        index = (*form.query.index[:2], form.axes.key, form.query.index[3])
        return replace(form, query=replace(form.query, index=index))

    def float_mask(form: Any, node: fx.Node) -> Any:
        return replace(form, terms=(plugins.MaskTerm("keep", form.query),))

    return {
        "text": (lambda form, node: "an attention", "AttentionForm or None"),
        "rank": (more, "one expression for each dimension"),
        "axes": (keys_in_query, "over the axes bhqd only"),
        "dtype": (float_mask, "a bool tensor"),
        "code": (lambda form, node: replace(form, obstacle=("NO_SUCH", "x")), "one of Code"),
        "term": (lambda form, node: replace(form, terms=("mask",)), "free of errors"),
        "raises": (lambda form, node: 1 / 0, "ZeroDivisionError"),
    }


@pytest.mark.parametrize("name", wrong_forms())
def test_a_wrong_form_is_an_error_that_names_the_matcher(name: str) -> None:
    change, text = wrong_forms()[name]

    @plugins.matcher
    def clumsy(node: fx.Node, tensors: Any) -> Any:
        return change(matchers.match_sdpa(node, tensors), node) if is_sdpa(node) else None

    error = failure(Attention())
    assert text in str(error)
    assert "clumsy" in str(error) and f"module {__name__}" in str(error)


# ---- mask rules ----------------------------------------------------------------------------------


@torch.library.custom_op("sparse_compiler_tests::band_mask", mutates_args=())
def band_mask(length: int, left: int) -> Tensor:
    place = torch.arange(length)
    back = place[:, None] - place
    return (back >= 0) & (back <= left)


@band_mask.register_fake
def _(length: int, left: int) -> Tensor:
    return torch.empty(length, length, dtype=torch.bool)


@torch.library.custom_op("sparse_compiler_tests::fill", mutates_args=("x",))
def fill(x: Tensor) -> None:
    x.fill_(True)


@torch.compiler.allow_in_graph
def wide_band(x: Tensor) -> Tensor:
    """Not an operator: a function that stands in graphs as it is; its tensor is only read."""
    place = torch.arange(x.shape[2], device=x.device)
    return place[:, None] - place <= 20


def windowed(reader: Any, node: fx.Node, index: Any) -> Any:
    left = plugins.argument(node, 1, "left")
    query, key = index
    return plugins.conj(
        plugins.compare("le", key, query), plugins.compare("le", query - key, sympy.Integer(left))
    )


class WithBand(nn.Module):
    """A mask made by the custom operator."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ops.sparse_compiler_tests.band_mask(x.shape[2], 9)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


class WithFunction(nn.Module):
    """A mask made by the function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=wide_band(x))


@pytest.mark.parametrize(
    "target",
    [
        band_mask,
        torch.ops.sparse_compiler_tests.band_mask,
        torch.ops.sparse_compiler_tests.band_mask.default,
    ],
    ids=["custom_op", "packet", "overload"],
)
def test_a_decorated_rule_reads_an_operator_however_it_is_named(target: Any) -> None:
    (site,) = sites(WithBand())
    assert site.code == "MASK_UNKNOWN"
    plugins.mask_rule(target)(windowed)
    (site,) = sites(WithBand())
    assert (site.decision, site.mask) == ("rewritten", "causal, window 10")
    assert_close(compiled(WithBand(), budget=1.0), WithBand()(X))


def test_a_rule_for_a_function_says_that_it_writes_nothing() -> None:
    (site,) = sites(WithFunction())
    assert site.code == "MASK_UNKNOWN"
    torch.compiler.reset()

    @plugins.mask_rule(wide_band)
    def read(reader: Any, node: fx.Node, index: Any) -> Any:
        return plugins.compare("le", index[0] - index[1], sympy.Integer(20))

    (site,) = sites(WithFunction())
    assert site.decision == "rewritten"
    assert_close(compiled(WithFunction(), budget=1.0), WithFunction()(X))


def test_a_rule_that_does_not_understand_leaves_the_mask_unread() -> None:
    @plugins.mask_rule(band_mask)
    def puzzled(reader: Any, node: fx.Node, index: Any) -> Any:
        raise plugins.NotUnderstood("a reason of its own")

    (site,) = sites(WithBand())
    assert site.code == "MASK_UNKNOWN"
    assert "a reason of its own" in site.reason


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (lambda index: "seen", "a sympy expression or predicate"),
        (lambda index: index[5], "IndexError"),
        (lambda index: sympy.Symbol("n") <= index[0], "made of the index"),
        (lambda index: sympy.Function("f")(index[0]) > 0, "made of the index"),
    ],
    ids=["text", "raises", "symbol", "function"],
)
def test_a_wrong_value_is_an_error_that_names_the_rule(
    value: Callable[[Any], Any], text: str
) -> None:
    @plugins.mask_rule(band_mask)
    def clumsy(reader: Any, node: fx.Node, index: Any) -> Any:
        return value(index)

    error = failure(WithBand())
    assert text in str(error) and "clumsy" in str(error) and "band_mask" in str(error)


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        ((torch.tril,), "that the reader does not know"),
        ((torch.ops.aten.tril.default,), "that the reader does not know"),
        ((fill,), "write to no argument"),
        (("tril",), "operators or functions"),
        ((), "at least one"),
    ],
    ids=["built-in", "aten", "writes", "text", "none"],
)
def test_a_rule_for_the_wrong_thing_is_refused(targets: Sequence[Any], text: str) -> None:
    with pytest.raises(PluginFailed, match=text):
        plugins.mask_rule(*targets)(windowed)
    assert windowed not in [rule.function for rule in mask_rules._rules.values()]


def test_an_operation_has_one_rule() -> None:
    plugins.mask_rule(band_mask)(windowed)
    plugins.mask_rule(band_mask)(windowed)  # the same again, as when a module is loaded anew

    def another(reader: Any, node: fx.Node, index: Any) -> Any:
        return sympy.true

    with pytest.raises(PluginFailed, match="without a rule"):
        plugins.mask_rule(band_mask)(another)


# ---- architecture hints --------------------------------------------------------------------------


def hint(**methods: Any) -> type[plugins.ArchitectureHint]:
    """A registered hint about every module, with these methods."""
    body = {"applies": lambda self, path, classes: True} | methods
    return plugins.architecture(type("Hint", (plugins.ArchitectureHint,), body))


def test_a_hint_keeps_a_layer_dense_whatever_the_options_say() -> None:
    hint(dense=lambda self, path: path.endswith("1"))
    first, second = sites(Layers(), pattern="a_shape")
    assert (first.decision, second.code) == ("rewritten", "HINT_DENSE")
    # Expected: nobody is warned, and fallback="error" does not raise.
    assert_close(compiled(Layers(), fallback="error", budget=1.0), Layers()(X))


def test_a_hint_sees_the_classes_around_an_attention() -> None:
    seen = []

    def applies(self: Any, path: str, classes: tuple[str, ...]) -> bool:
        seen.append((path, classes))
        return False

    hint(applies=applies, dense=lambda self, path: True)
    assert [s.decision for s in sites(Layers(1))] == ["rewritten"]
    ((path, classes),) = seen
    assert path == "layers.0" and classes[-1] == f"{__name__}.Attention"


def test_a_hint_numbers_the_layers_of_per_layer_patterns() -> None:
    table = {0: "vertical_slash", 5: ("a_shape", 3, 4)}
    hint(layer=lambda self, path: {"layers.0": 5, "layers.1": 0}[path])
    first, second = sites(Layers(), pattern=table)
    assert first.pattern == "2 x a_shape(3, 4)"
    assert second.pattern.startswith("2 x vertical_slash")


def test_layers_with_one_number_are_unknown() -> None:
    hint(layer=lambda self, path: 0)
    for site in sites(Layers(), pattern={0: ("a_shape", 3, 4)}):
        assert [note.code for note in site.notes] == ["LAYER_UNKNOWN"]


def test_hints_that_disagree_name_no_layer_and_no_pattern() -> None:
    hint(layer=lambda self, path: 0, pattern=lambda self, path: "a_shape")
    other = {"layer": lambda self, path: 1, "pattern": lambda self, path: "block_sparse"}
    hint(**other)
    (site,) = sites(Layers(1))
    assert site.pattern.startswith("2 x vertical_slash")
    (site,) = sites(Layers(1), pattern={0: ("a_shape", 3, 4)})
    assert [note.code for note in site.notes] == ["LAYER_UNKNOWN"]


def test_a_hint_names_a_pattern_only_where_the_user_named_none() -> None:
    hint(pattern=lambda self, path: plugins.HeadPattern("a_shape", 7, 8))
    assert sites(Layers(1))[0].pattern == "2 x a_shape(7, 8)"
    assert sites(Layers(1), pattern="block_sparse")[0].pattern.startswith("2 x block_sparse")


@pytest.mark.parametrize(
    ("methods", "text"),
    [
        ({"dense": lambda self, path: "yes"}, "True or False"),
        ({"layer": lambda self, path: -1}, "an int >= 0"),
        ({"layer": lambda self, path: True}, "an int >= 0"),
        ({"pattern": lambda self, path: 3}, "HeadPattern"),
        ({"pattern": lambda self, path: "zigzag"}, "vertical_slash"),
        ({"dense": lambda self, path: {}[path]}, "KeyError"),
    ],
    ids=["dense", "negative", "bool", "pattern", "no such", "raises"],
)
def test_a_wrong_hint_is_an_error_that_names_it(methods: dict[str, Any], text: str) -> None:
    hint(**methods)
    error = failure(Layers(1))
    assert text in str(error) and "'Hint'" in str(error)


# ---- patterns and executors ----------------------------------------------------------------------


def strided() -> type[plugins.Pattern]:
    """The example's pattern."""
    return plugins.pattern(example("pattern", "mylib_strided").Strided)


def test_a_decorated_pattern_is_an_option() -> None:
    strided()
    (site,) = sites(Attention(), pattern="strided")
    assert site.pattern == "2 x strided(64, 1024)"
    assert_close(compiled(Attention(), pattern={"*": ("strided", 1, 1)}), Attention()(X))


def test_a_pattern_that_chooses_wrongly_is_an_error_that_names_it() -> None:
    kind = strided()

    class Short(kind):
        name, number = "short", 1002

        def choose(self, request: plugins.SelectRequest) -> plugins.BandChoice:
            choice = super().choose(request)
            return plugins.BandChoice(choice.columns[..., :-1], choice.distances)

    class Raising(kind):
        name, number = "raising", 1003

        def choose(self, request: plugins.SelectRequest) -> plugins.BandChoice:
            raise KeyError("lost")

    for wrong, text in ((Short, "the columns of pattern"), (Raising, "KeyError: 'lost'")):
        plugins.pattern(wrong)
        with pytest.raises(PluginFailed, match=text):
            compiled(Attention(), pattern={"*": (wrong.name, 8, 8)})
        torch.compiler.reset()


def test_a_pattern_with_a_taken_number_or_no_name_is_refused() -> None:
    kind = strided()
    taken = type("Taken", (kind,), {"name": "new_name"})
    nameless = type("Nameless", (kind,), {"name": None, "number": 1004})
    for wrong in (taken, nameless, 3, kind()):
        with pytest.raises(PluginFailed):
            plugins.pattern(wrong)  # type: ignore[type-var]
    with pytest.raises(PatternInvalid):
        patterns.get("new_name")


def test_a_decorated_executor_runs_by_its_name() -> None:
    calls = []

    @plugins.executor
    class Counting(CpuExecutor):
        name = "counting"

        def attend(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            calls.append(1)
            return super().attend(*args, **kwargs)

    assert "counting" in executors.executor_names()
    out = compiled(Attention(), executor="counting", pattern={"*": ("a_shape", 80, 80)})
    assert_close(out, Attention()(X))
    assert calls


def test_a_wrong_executor_is_refused() -> None:
    taken = type("Taken", (CpuExecutor,), {"name": "cpu"})
    auto = type("Auto", (CpuExecutor,), {"name": "auto"})
    for wrong in (taken, auto, int, "cpu"):
        with pytest.raises(PluginFailed):
            plugins.executor(wrong)  # type: ignore[type-var]

    @plugins.executor
    class Unborn(CpuExecutor):
        name = "unborn"

        def __init__(self) -> None:
            raise OSError("no such device")

    with pytest.raises(PluginFailed, match=r"Unborn' .*no such device"):
        executors.executor_for("unborn", "cpu")


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
