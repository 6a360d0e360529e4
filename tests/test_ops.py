"""The operators keep torch's rules: schemas, and fakes that promise what really comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import sparse_compiler.runtime.dispatch  # noqa: F401 - installs the implementations
from sparse_compiler.ir.index import INDEX_FIELDS
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import Limits
from sparse_compiler.testing import parameters, random_qkv

OPS = torch.ops.sparse_compiler
# No autograd formula on purpose, so the tests of autograd registration make no sense; neither does
# AOT dispatch with gradients. What is left: schema and fakes.
CHECKS = ("test_schema", "test_faketensor")
HEADS = {
    "band": (HeadPattern("a_shape", 5, 20), HeadPattern("vertical_slash", 40, 110)),
    "blocks": (HeadPattern("block_sparse", 2), HeadPattern("block_sparse", 1)),
    "mixed": (HeadPattern("vertical_slash", 40, 110), HeadPattern("block_sparse", 2)),
    "dense": (HeadPattern("dense"), HeadPattern("dense")),
}
# Made here, outside any fake mode.
PARAMETERS = {
    (name, causal): parameters(heads, causal=causal)
    for name, heads in HEADS.items()
    for causal in (True, False)
}


@dataclass(frozen=True)
class Call:
    """Arguments of the three operators for one attention."""

    heads: str = "mixed"
    batch: int = 1
    kv_heads: int = 1
    num_q: int = 70
    offset: int = 0
    dim: int = 16
    value_dim: int = 24
    dtype: torch.dtype = torch.float32
    left: int = -1
    block_q: int = 32
    block_k: int = 16
    budget: float = -1.0
    min_tokens: int = 0
    padded: bool = False
    right: int = 0
    operands: bool = False
    executor: str = "cpu"
    seed: int = 0

    @property
    def patterns(self) -> tuple[HeadPattern, ...]:
        return HEADS[self.heads]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return random_qkv(
            self.seed,
            batch=self.batch,
            heads=2,
            kv_heads=self.kv_heads,
            num_q=self.num_q,
            num_k=self.num_q + self.offset,
            dim=self.dim,
            value_dim=self.value_dim,
            dtype=self.dtype,
        )

    def key_mask(self) -> torch.Tensor | None:
        if not self.padded:
            return None
        mask = torch.ones(self.batch, self.num_q + self.offset, dtype=torch.bool)
        mask[0, :9] = False
        return mask

    @property
    def choice(self) -> tuple[Any, ...]:
        return self.budget, self.min_tokens, self.executor, -1

    @property
    def causal(self) -> bool:
        return self.right == 0

    def band(self, rows: torch.Tensor | None = None) -> tuple[Any, ...]:
        bounds = bias = None
        if self.operands:
            bounds = torch.zeros(1, self.num_q, 2, dtype=torch.int32)
            bounds[..., 1] = self.num_q // 2
            bias = torch.ones(1, 2, 1, self.num_q + self.offset, dtype=torch.bfloat16)
        return rows, self.key_mask(), bounds, bias, self.offset, self.left, self.right

    @property
    def sinks(self) -> torch.Tensor | None:
        return torch.tensor([0.5, -1.0]) if self.operands else None

    def summarize(self, k: torch.Tensor) -> tuple[Any, ...]:
        group = registry.summary_group(self.used, self.block_k)
        return k, None, self.key_mask(), group, *self.choice

    @property
    def used(self) -> list[Any]:
        return [registry.get(name) for name in dict.fromkeys(h.name for h in self.patterns)]

    def select(self, q: torch.Tensor, k: torch.Tensor, summary: torch.Tensor) -> tuple[Any, ...]:
        params = PARAMETERS[self.heads, self.causal]
        limits = Limits()
        for head in self.patterns:
            pattern = registry.get(head.name)
            limits = limits.join(pattern.limits(head, self.block_q, self.block_k, self.causal))
        bounds = [limits.columns, limits.distances, limits.blocks]
        if self.budget >= 0:
            bounds = [-1, -1, -1]
        components = [registry.get(h.name).component_for(self.causal) for h in self.patterns]
        counts = [components.count("band"), components.count("blocks")]
        numbers = [pattern.number for pattern in self.used]
        blocking = (self.block_q, self.block_k)
        front = (q, k, summary, params, *self.band(), self.dim**-0.5, *blocking)
        return *front, numbers, counts, bounds, *self.choice

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: Any
    ) -> tuple[Any, ...]:
        blocking = (self.block_q, self.block_k)
        return (
            q,
            k,
            v,
            *index,
            *self.band(),
            self.dim**-0.5,
            0.0,
            self.sinks,
            *blocking,
            *self.choice,
        )


calls = st.builds(
    Call,
    heads=st.sampled_from(sorted(HEADS)),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    num_q=st.sampled_from([1, 2, 31, 32, 65, 100]),
    offset=st.sampled_from([0, 1, 40]),
    dim=st.sampled_from([16, 32]),
    value_dim=st.sampled_from([16, 24]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    left=st.sampled_from([-1, 20]),
    block_q=st.sampled_from([32, 64]),
    block_k=st.sampled_from([16, 64]),
    budget=st.sampled_from([-1.0, 0.3, 1.0]),
    min_tokens=st.sampled_from([0, 10**6]),
    padded=st.booleans(),
    right=st.sampled_from([0, 0, -1, 3]),
    operands=st.booleans(),
    executor=st.sampled_from(["cpu", "reference"]),
    seed=st.integers(0, 1000),
)


def facts(tensors: Any) -> list[tuple[Any, ...]]:
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    found = []
    for t in tensors:
        # The stride of a dimension of size 1, or of an empty tensor, says nothing.
        steps = [s for s, size in zip(t.stride(), t.shape, strict=True) if size > 1 and t.numel()]
        found.append((tuple(t.shape), t.dtype, t.device.type, steps))
    return found


@given(call=calls)
def test_fakes_promise_the_shapes_dtypes_and_strides_that_come(call: Call) -> None:
    """Strides too: Inductor lays its buffers out as the fake says."""
    q, k, v = call.tensors()
    summary = OPS.summarize_keys(*call.summarize(k))
    index = OPS.select(*call.select(q, k, summary))
    result = OPS.attend(*call.attend(q, k, v, index))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fq, fk, fv = (mode.from_tensor(t) for t in (q, k, v))
        fake_summary = OPS.summarize_keys(*call.summarize(fk))
        fake_index = OPS.select(*call.select(fq, fk, fake_summary))
        fake_result = OPS.attend(*call.attend(fq, fk, fv, fake_index))
    assert facts(fake_summary) == facts(summary)
    for name, fake, real in zip(INDEX_FIELDS, facts(fake_index), facts(index), strict=True):
        assert fake == real, name
    assert all(t.is_contiguous() for t in index)
    assert facts(fake_result) == facts(result)


@pytest.mark.parametrize("heads", sorted(HEADS))
@pytest.mark.parametrize("budget", [-1.0, 1.0])
@pytest.mark.parametrize(("right", "operands"), [(0, False), (0, True), (-1, True)])
def test_opcheck(heads: str, budget: float, right: int, operands: bool) -> None:
    call = Call(heads=heads, budget=budget, padded=True, offset=10, right=right, operands=operands)
    q, k, v = call.tensors()
    arguments = call.summarize(k)
    torch.library.opcheck(OPS.summarize_keys.default, arguments, test_utils=CHECKS)
    arguments = call.select(q, k, OPS.summarize_keys(*arguments))
    torch.library.opcheck(OPS.select.default, arguments, test_utils=CHECKS)
    arguments = call.attend(q, k, v, OPS.select(*arguments))
    torch.library.opcheck(OPS.attend.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("operands", [False, True])
def test_opcheck_of_aot_dispatch_without_gradients(operands: bool) -> None:
    call = Call(operands=operands)
    q, k, v = call.tensors()
    arguments = call.select(q, k, OPS.summarize_keys(*call.summarize(k)))
    checks = ("test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OPS.select.default, arguments, test_utils=checks)
    arguments = call.attend(q, k, v, OPS.select(*arguments))
    torch.library.opcheck(OPS.attend.default, arguments, test_utils=checks)


@pytest.mark.parametrize("heads", sorted(HEADS))
def test_fakes_take_symbolic_sizes_without_fixing_one(heads: str) -> None:
    """An equation among the guards would compile the graph again for other lengths."""
    call = Call(heads=heads, num_q=70, offset=30)
    q, k, v = call.tensors()
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env, allow_non_fake_inputs=True) as mode:
        fakes = []
        for place, tensor in enumerate((q, k, v)):
            torch._dynamo.mark_dynamic(tensor, 2)
            source = torch._dynamo.source.ConstantSource(f"t{place}")
            fakes.append(mode.from_tensor(tensor, source=source))
        fq, fk, fv = fakes
        before = len(env.guards)
        summary = OPS.summarize_keys(*call.summarize(fk))
        index = OPS.select(*call.select(fq, fk, summary))
        out, lse = OPS.attend(*call.attend(fq, fk, fv, index))
    guards = [str(guard.expr) for guard in env.guards[before:]]
    assert not [guard for guard in guards if "Eq" in guard or "==" in guard]
    assert out.shape[2] is fq.shape[2] or out.shape[2] == fq.shape[2]
    assert lse.dtype == torch.float32


def test_no_operator_changes_or_returns_its_inputs() -> None:
    for min_tokens, operands in ((0, False), (10**6, False), (0, True), (10**6, True)):
        call = Call(min_tokens=min_tokens, padded=True, operands=operands)
        tensors = call.tensors()
        copies = [t.clone() for t in tensors]
        q, k, v = tensors
        summary = OPS.summarize_keys(*call.summarize(k))
        index = OPS.select(*call.select(q, k, summary))
        index_copies = [t.clone() for t in index]
        out, lse = OPS.attend(*call.attend(q, k, v, index))
        for now, then in zip((*tensors, *index), (*copies, *index_copies), strict=True):
            assert torch.equal(now, then)
        inputs = {t.untyped_storage().data_ptr() for t in (*tensors, *index) if t.numel()}
        assert not {t.untyped_storage().data_ptr() for t in (out, lse)} & inputs


def test_the_schemas_say_that_nothing_is_mutated() -> None:
    for name in ("summarize_keys", "select", "attend"):
        schema = getattr(OPS, name).default._schema
        assert not schema.is_mutable
        assert all(a.alias_info is None for a in (*schema.arguments, *schema.returns))


@given(call=calls)
def test_the_summary_is_the_mean_of_visible_keys(call: Call) -> None:
    k = call.tensors()[1]
    summary = OPS.summarize_keys(*call.summarize(k))
    blocks = -(-k.shape[2] // call.block_k)
    if not any(pattern.summary_keys for pattern in call.used):
        assert summary.shape == (call.batch, call.kv_heads, 0, call.dim)
        return
    assert summary.shape == (call.batch, call.kv_heads, blocks, call.dim)
    if call.budget >= 1 or call.min_tokens > k.shape[2]:
        return
    mask = call.key_mask()
    for b in range(call.batch):
        for n in range(blocks):
            part = slice(n * call.block_k, (n + 1) * call.block_k)
            keys = k[b, :, part] if mask is None else k[b, :, part][:, mask[b, part]]
            expected = keys.double().mean(1) if keys.shape[1] else torch.zeros(call.dim).double()
            torch.testing.assert_close(
                summary[b, :, n].double(),
                expected.expand(call.kv_heads, -1),
                rtol=2 * torch.finfo(call.dtype).eps,
                atol=8 * torch.finfo(call.dtype).eps + 1e-6,
            )


def test_cuda_graphs_leave_the_operators_out() -> None:
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    for name in ("summarize_keys", "select", "attend"):
        tags = getattr(torch.ops.sparse_compiler, name).default.tags
        assert tag is None or tag in tags
