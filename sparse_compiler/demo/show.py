"""The demo for people: progress bars while it runs, tables when it is done."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sparse_compiler.demo.measure import DemoPlan, DemoResult, run_demo
from sparse_compiler.explanation import sites_table

__all__ = ["print_result", "run_with_progress"]


def run_with_progress(plan: DemoPlan, console: Console) -> DemoResult:
    """Run the plan with a bar for each part."""
    with Progress(console=console) as progress:

        def track(description: str, items: Iterable[Any]) -> Iterable[Any]:
            items = list(items)
            yield from progress.track(items, total=len(items), description=description)

        return run_demo(plan, track)


def print_result(result: DemoResult, console: Console) -> None:
    """Answers, times, density, and every decision about the model's attention."""
    figures = result.as_dict()
    table = Table(title=f"{result.plan.tokens} tokens on {figures['device']}")
    for name in ("", "dense", "minference"):
        table.add_column(name, justify="left" if not name else "right")
    for name, (dense, sparse) in result.right.items():
        asked = len(dense)
        table.add_row(f"right, {name}", f"{sum(dense)} / {asked}", f"{sum(sparse)} / {asked}")
    table.add_row(
        "first call, s", f"{result.dense.first_call_s:.1f}", f"{result.sparse.first_call_s:.1f}"
    )
    table.add_row(
        "time to first token, s", f"{result.dense.ttft_s:.3f}", f"{result.sparse.ttft_s:.3f}"
    )
    table.add_row("attention density", "1", f"{result.density:.3f}")
    table.add_row("speed-up", "1", f"{result.speedup:.2f}")
    table.add_row("how", result.dense.name, result.sparse.name)
    console.print(table)
    ways = ", ".join(f"{v.name} {v.ttft_s:.2f} s" for v in result.variants)
    console.print(f"All ways timed: {ways}.")
    console.print(f"Haystack: this Python's standard library, sha256 {result.haystack_sha256}.")
    console.print(sites_table(result.sites))
    if result.lost:
        console.print(f"[red]{result.lost} answers of dense were lost.[/red]")
    else:
        console.print("Every answer that dense gives in the last 64 tokens was kept.")
