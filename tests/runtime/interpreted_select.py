"""Runs the selection kernels in Triton's interpreter against the PyTorch path; fails loudly.

A program of its own, because ``TRITON_INTERPRET`` is read when a kernel is decorated:
``TRITON_INTERPRET=1 python tests/runtime/interpreted_select.py CACHE_DIRECTORY TEST``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from sparse_compiler import ops  # noqa: E402
from sparse_compiler.ir.index import INDEX_FIELDS, AttentionIndex, Geometry  # noqa: E402
from sparse_compiler.patterns import registry  # noqa: E402
from sparse_compiler.patterns.base import Limits, SelectRequest  # noqa: E402
from sparse_compiler.runtime import select, triton_select  # noqa: E402
from sparse_compiler.runtime.triton_executor import TritonExecutor  # noqa: E402
from sparse_compiler.runtime.triton_launch import Launcher  # noqa: E402
from sparse_compiler.runtime.triton_probe import Scores, empty_scores  # noqa: E402

DENSE, A_SHAPE, SLASH = 0, 1, 2
CACHE = Path(sys.argv[1]) if len(sys.argv) > 1 else None
QUICK = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@dataclass(frozen=True)
class Layer:
    """One layer: a pattern and two numbers for each band slot, and what its scores look like."""

    seed: int
    heads: tuple[tuple[int, int, int], ...]
    geometry: Geometry
    num_q: int
    num_k: int
    batch: int = 1
    padding: bool = False
    budget: float = -1.0
    values: str = "spread"
    without_slot: bool = False

    def params(self) -> torch.Tensor:
        """Slots in descending order; one more head has none where asked."""
        last = len(self.heads) - 1
        lines = [[*head, last - slot, -1] for slot, head in enumerate(self.heads)]
        if self.without_slot:
            lines.insert(0, [3, 1, 1, -1, 0])
        return torch.tensor(lines, dtype=torch.int32)

    def limits(self) -> list[int]:
        joined = Limits()
        for number, first, second in self.heads:
            pattern = registry.by_number(number)
            if self.budget >= 0:
                head = pattern.from_budget(self.budget, self.num_k, self.geometry.block_q)
            else:
                head = replace(pattern.default(), first=first, second=second)
            limits = pattern.limits(head, self.geometry.block_q, self.geometry.block_k)
            joined = joined.join(limits)
        return [joined.columns, joined.distances, joined.blocks]

    def key_mask(self) -> torch.Tensor | None:
        if not self.padding:
            return None
        mask = torch.ones(self.batch, self.num_k, dtype=torch.bool)
        mask[0, : self.num_k // 3] = False
        mask[0, self.num_k // 2] = False
        return mask

    def scores(self, size: int) -> torch.Tensor:
        """[B, S, size]: few values (ties), many, or broken ones."""
        draw = torch.Generator().manual_seed(self.seed + size)
        shape = (self.batch, len(self.heads), size)
        random = torch.randn(shape, generator=draw)
        if self.values == "ties":
            return random.mul(2).round().clamp(min=0)
        if self.values == "broken":
            strange = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 1e-40])
            picked = strange[torch.randint(0, 6, shape, generator=draw)]
            return torch.where(random > 0.5, random, picked)
        if self.values == "periodic":  # all large ones in the same lanes of every step
            return random + 9.0 * (torch.arange(size) % 32 < 3)
        return random.exp()

    def request(self, q: torch.Tensor, k: torch.Tensor) -> SelectRequest:
        mask = self.key_mask()
        none = torch.zeros(0, dtype=torch.int64)
        rows = select.default_rows(
            self.batch, self.num_q, self.num_k, self.geometry.q_offset, mask, q.device
        )

        def probe(heads: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
            raise AssertionError("no probe was expected")

        return SelectRequest(
            q=q,
            k=k,
            summary=k.new_zeros(0),
            heads=none,
            first=none,
            second=none,
            geometry=self.geometry,
            rows=rows,
            key_mask=mask,
            scale=0.25,
            limits=Limits(*self.limits()),
            probe=probe,
        )

    def sizes(self) -> tuple[int, ...]:
        geometry = self.geometry
        return ops.capacities(
            self.num_q,
            self.num_k,
            geometry.q_offset,
            geometry.block_q,
            geometry.block_k,
            self.limits(),
        )

    def by_pytorch(self, request: SelectRequest) -> AttentionIndex:
        numbers = sorted({head[0] for head in self.heads})
        return select.select_index(
            request,
            self.params(),
            numbers,
            [len(self.heads), 0],
            self.limits(),
            self.budget,
        )


head = st.one_of(
    st.tuples(st.just(SLASH), st.integers(0, 120), st.integers(0, 200)),
    st.tuples(st.just(A_SHAPE), st.integers(0, 60), st.integers(0, 90)),
    st.just((DENSE, 0, 0)),
)
layers = st.builds(
    Layer,
    seed=st.integers(0, 10**6),
    heads=st.lists(head, min_size=1, max_size=3).map(tuple),
    geometry=st.builds(
        Geometry,
        q_offset=st.sampled_from([0, 0, 5, 64]),
        left=st.sampled_from([-1, -1, 0, 40, 150]),
        right=st.just(0),
        block_q=st.sampled_from([16, 32, 64]),
        block_k=st.sampled_from([16, 32, 64]),
    ),
    num_q=st.sampled_from([2, 90, 150]),
    num_k=st.sampled_from([65, 150, 200]),
    batch=st.integers(1, 2),
    padding=st.booleans(),
    budget=st.sampled_from([-1.0, -1.0, 0.3]),
    values=st.sampled_from(["spread", "ties", "broken", "periodic"]),
    without_slot=st.booleans(),
)
PLAIN = Geometry(0, -1, 0, 64, 64)
WINDOW = Layer(2, ((SLASH, 60, 120),), Geometry(0, 100, 0, 64, 64), 200, 200, values="ties")
SLOW = Layer(1, ((SLASH, 60, 120),), PLAIN, 200, 200, values="periodic")


def assert_same(got: tuple[torch.Tensor, ...], want: AttentionIndex) -> None:
    """Equal counts, equal lists as far as they count, equal coverage."""
    found = dict(zip([*INDEX_FIELDS[:8], "slots"], got, strict=True))
    assert torch.equal(found["slots"], want.slots)
    assert torch.equal(found["covered"], want.covered)
    for name, count in (
        ("full", "num_full"),
        ("edge", "num_edge"),
        ("edge_len", "num_edge"),
        ("columns", "num_columns"),
    ):
        assert torch.equal(found[count], getattr(want, count)), count
        assert found[name].shape == getattr(want, name).shape, name
        inside = torch.arange(found[name].shape[-1]) < found[count][..., None]
        assert torch.equal(found[name][inside], getattr(want, name)[inside]), name


@QUICK
@given(layer=layers)
@example(layer=SLOW)
@example(layer=WINDOW)
@example(layer=replace(WINDOW, values="spread", seed=5))
def same_scores_give_the_same_index(layer: Layer) -> None:
    size = layer.geometry.distance_size(layer.num_q)
    columns, distances = layer.scores(layer.num_k), layer.scores(size)
    empty = torch.zeros(layer.batch, len(layer.params()), layer.num_q, 16)
    request = layer.request(empty, torch.zeros(layer.batch, 1, layer.num_k, 16))
    want = layer.by_pytorch(replace(request, probe=lambda *_: (columns, distances)))
    lines = layer.batch * len(layer.heads)
    row_size = -(-max(layer.num_k, size) // 64) * 64
    data = empty_scores(lines, row_size, torch.device("cpu")).fill_(float("nan"))
    data[0, :, : layer.num_k] = columns.reshape(lines, -1)
    data[1, :, :size] = distances.reshape(lines, -1)
    patterns = [registry.by_number(number) for number in {head[0] for head in layer.heads}]
    rules = {pattern.rule.kind: pattern.rule for pattern in patterns if pattern.rule}
    spec = triton_select.select_spec(
        rules,
        heads=len(layer.params()),
        geometry=layer.geometry,
        most=256,
        longest=row_size,
        key_mask=layer.padding,
        interpret=True,
    )
    got = triton_select.launch_select(
        EXECUTOR._cache,
        Launcher(),
        spec,
        Scores(data, row_size),
        layer.params(),
        rules,
        select._numbers_by_kind(patterns, layer.budget, layer.num_k, layer.geometry.block_q),
        layer.geometry,
        layer.sizes()[:4],
        num_slots=len(layer.heads),
        num_k=layer.num_k,
        most_distances=layer.limits()[1],
        rows=request.rows,
        key_mask=request.key_mask,
    )
    assert_same(got, want)


@settings(QUICK, max_examples=4)
@given(
    layer=layers,
    groups=st.sampled_from([1, 2, 3, 5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    broken=st.sampled_from([0.0, 0.0, float("nan"), float("inf")]),
)
def the_whole_selection_agrees(
    layer: Layer, groups: int, dtype: torch.dtype, broken: float
) -> None:
    """Probe, choice and lowering, heads of mixed patterns in one KV group or several."""
    layer = replace(layer, heads=(layer.heads * 5)[: 3 * groups], without_slot=False)
    layer = replace(layer, num_k=layer.num_q + layer.geometry.q_offset)
    draw = torch.Generator().manual_seed(layer.seed)
    heads = len(layer.heads)
    q = torch.randn(layer.batch, heads, layer.num_q, 16, generator=draw).to(dtype)
    k = torch.randn(layer.batch, heads // groups, layer.num_k, 16, generator=draw).to(dtype)
    if broken != 0.0:
        k[-1, 0, layer.num_k // 2, 3] = broken
    request = layer.request(q, k)

    def probe(
        wanted: torch.Tensor, first: torch.Tensor, num_rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"scale": request.scale, "rows": request.rows, "key_mask": request.key_mask}
        return EXECUTOR.probe(q, k, wanted, first, layer.geometry, num_rows=num_rows, **options)

    want = layer.by_pytorch(replace(request, probe=probe))
    patterns = [registry.by_number(number) for number in {head[0] for head in layer.heads}]
    rules = {pattern.rule.kind: pattern.rule for pattern in patterns if pattern.rule}
    numbers = select._numbers_by_kind(patterns, layer.budget, layer.num_k, layer.geometry.block_q)
    got = EXECUTOR.select_band(
        request, layer.params(), rules, numbers, layer.sizes()[:4], len(layer.heads)
    )
    assert got is not None
    assert_same(got, want)


TESTS = {
    function.__name__: function
    for function in (same_scores_give_the_same_index, the_whole_selection_agrees)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    EXECUTOR = TritonExecutor(CACHE)
    TESTS[sys.argv[2]]()
